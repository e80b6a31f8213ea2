"""Requests in, tokens out, a step at a time: many sequences in one batch, each joining and leaving between steps.

    submit -> waiting -> prefill, a chunk per step           -> decode, a token per step          -> released
                         one request at a time, in a slot      the slots before it, side by side

The cache has a fixed number of slots, all of one length. Those in use are the first ones, without holes, so that a
step's keys and values are one slice: when an answer ends, the last row takes its slot. Not safe for several threads.

Axes: b batch, t tokens, c hidden, v vocabulary.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from smolforge.errors import ConfigError
from smolforge.generation.cpu_decoding import DecodingModel, prepack
from smolforge.generation.samplers import SamplerChain
from smolforge.models.attention import KVCache
from smolforge.models.decoder import LanguageModel

FinishReason = Literal["stop", "length"]
PREFILL_CHUNK_TOKENS = 512
"""Tokens of a prompt that are prefilled between two decoding steps."""
LOGPROB_CHUNK_TOKENS = 64
"""Tokens of a prompt whose logits exist at the same time."""


class TokenLogprobs(NamedTuple):
    """The log-probability of a token as the model sees it, in nats, and the likeliest tokens in its place."""

    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Token(NamedTuple):
    """One token of one row; the last of a row says why it is the last. Prompt tokens come where they were asked for."""

    row: int
    id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    is_prompt: bool = False


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued. Every request draws from a generator of its own.

    `top_logprobs` asks for scores, with so many likeliest tokens; `echo` for those of the prompt too, whose
    first token has none. `max_new_tokens` may be 0 with it.
    """

    prompt: Sequence[int]
    sampler: SamplerChain
    max_new_tokens: int
    eos_ids: Collection[int] = ()
    seed: int | None = None
    top_logprobs: int | None = None
    echo: bool = False


@dataclass
class ActiveRequest:
    """A request under way: its tokens so far, of which the KV cache has the first `num_computed_tokens`."""

    request_id: int
    request: Request
    token_ids: list[int]
    generator: torch.Generator
    last_hidden: Tensor  # (0 or 1) c: state of the last token read
    num_computed_tokens: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt)


class Engine:
    """`slots` sequences at a time, each of at most `capacity` tokens; others wait their turn.

    With `prefix_caching`, a request that is alone is not prefilled again where it starts as the last one did.
    Its tokens then are the same to rounding only, so this is for a single user.
    """

    def __init__(self, model: LanguageModel, slots: int, capacity: int, *, prefix_caching: bool = False) -> None:
        self.model = model
        self.decoding_model: DecodingModel = model
        self.slots, self.capacity = slots, min(capacity, model.config.max_position_embeddings)
        # of the model's dtype and device
        self.no_hidden = model.lm_head_weight.new_empty((0, model.config.hidden_size))
        self.cache = KVCache(model.config, slots, self.capacity, like=self.no_hidden)
        self.waiting: deque[ActiveRequest] = deque()
        self.prefilling: ActiveRequest | None = None
        self.decoding: list[ActiveRequest] = []
        self.num_submitted = 0
        self.prefix_caching = prefix_caching
        self.cached_prefix: list[int] = []
        """The tokens that the first slot has, until it is used again."""

    def submit(self, request: Request) -> int:
        """The number that its tokens will carry. Raises ConfigError for a prompt that is empty or too long."""
        length = len(request.prompt)
        if length == 0:
            raise ConfigError("a prompt must have at least one token")
        if length + (request.max_new_tokens > 0) > self.capacity:
            raise ConfigError(f"the prompt has {length:,} tokens; this model takes {self.capacity:,} with its answer")
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if request.seed is None else request.seed)
        row = ActiveRequest(self.num_submitted, request, list(request.prompt), generator, self.no_hidden)
        self.waiting.append(row)
        self.num_submitted += 1
        return row.request_id

    def cancel(self, request_id: int) -> None:
        """Give up a request, wherever it is; its slot is free before the next step. It may be gone."""
        for row in self.active:
            if row.request_id == request_id:
                self._release(row)
        self.waiting = deque(row for row in self.waiting if row.request_id != request_id)

    def clear(self) -> None:
        """Give up all requests."""
        self.waiting.clear()
        self.decoding.clear()
        self.prefilling = None

    @property
    def active(self) -> list[ActiveRequest]:
        """The requests in the cache, by slot."""
        return [*self.decoding, *([self.prefilling] if self.prefilling else [])]

    @property
    def used_slots(self) -> int:
        return len(self.active)

    @property
    def used_tokens(self) -> int:
        """Tokens that the cache has now, of `slots` times `capacity`."""
        return sum(row.num_computed_tokens for row in self.active)

    @property
    def prefill_model(self) -> DecodingModel:
        """What reads and scores prompts. Integers laid out for answers round more, and nothing that is said of a prompt
        may depend on whether something was answered before."""
        return self.decoding_model if self.model.quantization is None else self.model

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.used_slots)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """A token of every answer, and a chunk of a prompt. After an error no request is left."""
        try:
            tokens = self._decode() if self.decoding else []
            if self.prefilling is None and self.waiting and self.used_slots < self.slots:
                self.prefilling = self.waiting.popleft()
                self.prefilling.num_computed_tokens = self._cached_prefix_length(self.prefilling)
            return tokens + (self._prefill(self.prefilling) if self.prefilling else [])
        except BaseException:
            self.clear()
            raise

    def _cached_prefix_length(self, row: ActiveRequest) -> int:
        """How many of its first tokens the cache has already; never the last, whose state says what follows."""
        cached, self.cached_prefix = self.cached_prefix, []
        if not self.prefix_caching or self.decoding or row.request.echo:
            return 0
        return common_prefix_length(cached, row.request.prompt[:-1])

    def _decode(self) -> list[Token]:
        """The next token of each answer, all in one pass."""
        self.decoding_model = prepack(self.model) if self.decoding_model is self.model else self.decoding_model
        device, rows = self.no_hidden.device, list(self.decoding)
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=device)
        positions = torch.tensor([[row.num_computed_tokens] for row in rows], device=device)
        hidden = self.decoding_model.hidden_states(ids, positions, self.cache.view(positions))
        logits = self.decoding_model.logits(hidden[:, 0])
        for row in rows:
            row.num_computed_tokens += 1
        return [self._sample(row, logits[index]) for index, row in enumerate(rows)]

    def _prefill(self, row: ActiveRequest) -> list[Token]:
        """The next chunk of a prompt, and after its end the first token of the answer."""
        device, prompt = self.no_hidden.device, row.request.prompt
        chunk = prompt[row.num_computed_tokens : row.num_computed_tokens + PREFILL_CHUNK_TOKENS]
        positions = torch.arange(row.num_computed_tokens, row.num_computed_tokens + len(chunk), device=device)[None]
        cache_view = self.cache.view(positions, first=len(self.decoding))
        hidden = self.prefill_model.hidden_states(torch.tensor([list(chunk)], device=device), positions, cache_view)[0]
        tokens = self._echo(row, hidden) if row.request.echo else []
        row.num_computed_tokens += len(chunk)
        if row.num_computed_tokens < len(prompt):
            return tokens
        self.prefilling = None
        if row.request.max_new_tokens == 0:
            return tokens
        self.decoding.append(row)
        return [*tokens, self._sample(row, self.prefill_model.logits(hidden[-1:])[0])]

    def _sample(self, row: ActiveRequest, logits: Float[Tensor, " v"]) -> Token:
        """The row's next token; after its last, the row has left."""
        request, token = row.request, row.request.sampler(logits, row.token_ids, row.generator)
        row.token_ids.append(token)
        full = row.num_generated == request.max_new_tokens or len(row.token_ids) >= self.capacity
        reason: FinishReason | None = "stop" if token in request.eos_ids else "length" if full else None
        logprobs = (
            None if request.top_logprobs is None else token_logprobs(logits[None], [token], request.top_logprobs)[0]
        )
        if reason is not None:
            self._release(row)
        return Token(row.request_id, token, reason, logprobs)

    def _echo(self, row: ActiveRequest, hidden: Float[Tensor, "t c"]) -> list[Token]:
        """The tokens of a chunk of the prompt, with the scores that the state before each gives it."""
        prompt, top, end = row.request.prompt, row.request.top_logprobs, row.num_computed_tokens + len(hidden)
        labels, states = list(prompt[max(row.num_computed_tokens, 1) : end]), torch.cat([row.last_hidden, hidden[:-1]])
        row.last_hidden = hidden[-1:].clone()
        # nothing comes before the first token
        scores: list[TokenLogprobs | None] = [None] * (len(hidden) - len(labels))
        if top is None:
            scores += [None] * len(labels)
        else:
            for start in range(0, len(labels), LOGPROB_CHUNK_TOKENS):
                part = slice(start, start + LOGPROB_CHUNK_TOKENS)
                scores += token_logprobs(self.prefill_model.logits(states[part]), labels[part], top)
        tokens = [
            Token(row.request_id, prompt[row.num_computed_tokens + i], None, score, True)
            for i, score in enumerate(scores)
        ]
        if row.request.max_new_tokens == 0 and end == len(prompt):
            tokens[-1] = tokens[-1]._replace(finish_reason="length")
        return tokens

    def _release(self, row: ActiveRequest) -> None:
        """Free a slot: the last answer takes it, and the prompt being read takes that one's."""
        if self.used_slots == 1:
            self.cached_prefix = row.token_ids[: row.num_computed_tokens]
        if row is self.prefilling:
            self.prefilling = None
            return
        slot, last_slot = self.decoding.index(row), len(self.decoding) - 1
        last_row = self.decoding.pop()
        if slot != last_slot:
            self.decoding[slot] = last_row
            self.cache.move(last_slot, slot, last_row.num_computed_tokens)
        if self.prefilling is not None:
            self.cache.move(last_slot + 1, last_slot, self.prefilling.num_computed_tokens)


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens are the same at the beginning of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def token_logprobs(logits: Float[Tensor, "t v"], ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of these ids, one a row of logits, and of the `top` likeliest of each row."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor([*ids], device=logits.device)[:, None])[:, 0].tolist()
    values, top_ids = logprobs.topk(min(top, logprobs.shape[-1]), -1)
    likeliest = [tuple(zip(*pair, strict=True)) for pair in zip(top_ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(*pair) for pair in zip(chosen, likeliest, strict=True)]
