"""Requests in, tokens out, a step at a time: many sequences in one batch, each joining and leaving between steps.

    submit -> waiting -> reading the prompt, a chunk a step -> answering, a token a step -> gone
                         one request at a time, in a slot      the slots before it, side by side

The cache has a fixed number of slots, all of one length. Those in use are the first ones, without holes, so that a
step's keys and values are one slice: when an answer ends, the last row takes its slot. Not safe for several threads.

Axes: b batch, t tokens, c hidden, v vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from smolforge.errors import SettingError
from smolforge.generation.cpu_decoding import Network, packed
from smolforge.generation.samplers import Sampling
from smolforge.models.attention import Cache
from smolforge.models.decoder import LanguageModel

FinishReason = Literal["stop", "length"]
CHUNK_TOKENS = 512
"""Of a prompt, read between two tokens of the answers beside it."""
SCORED_TOKENS = 64
"""Of a prompt, whose logits exist at the same time."""


class Scores(NamedTuple):
    """The log-probability of a token as the model sees it, in nats, and the likeliest tokens in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Token(NamedTuple):
    """One token of one row; the last of a row says why it is the last. Prompt tokens come where they were asked for."""

    row: int
    id: int
    finish_reason: FinishReason | None
    scores: Scores | None = None
    of_prompt: bool = False


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued. Every request draws from a generator of its own.

    `top_logprobs` asks for scores, with so many likeliest tokens; `echo` for those of the prompt too, whose
    first token has none. `max_new_tokens` may be 0 with it.
    """

    prompt: Sequence[int]
    choose: Sampling
    max_new_tokens: int
    eos_id: int | None = None
    seed: int | None = None
    top_logprobs: int | None = None
    echo: bool = False


@dataclass
class Row:
    """A request under way: its tokens so far, of which the cache has the first `read`."""

    number: int
    request: Request
    seen: list[int]
    generator: torch.Generator
    last: Tensor  # (0 or 1) c: state of the last token read
    read: int = 0

    @property
    def answered(self) -> int:
        return len(self.seen) - len(self.request.prompt)


class Engine:
    """`slots` sequences at a time, each of at most `capacity` tokens; others wait their turn.

    One that `remembers` does not read again what a request, being alone, begins with as the last one that left.
    Its tokens then are the same to rounding only, so it is for those who talk alone.
    """

    def __init__(self, model: LanguageModel, slots: int, capacity: int, remembers: bool = False) -> None:
        self.model = model
        self.network: Network = model
        self.slots, self.capacity = slots, min(capacity, model.config.max_position_embeddings)
        self.nothing = model.head.new_empty((0, model.config.hidden_size))  # of the model's dtype and device
        self.cache = Cache(model.config, slots, self.capacity, self.nothing)
        self.waiting: deque[Row] = deque()
        self.reading: Row | None = None
        self.answering: list[Row] = []
        self.submitted = 0
        self.remembers = remembers
        self.remembered: list[int] = []
        """The tokens that the first slot has, until it is used again."""

    def submit(self, request: Request) -> int:
        """The number that its tokens will carry. Raises SettingError for a prompt that is empty or too long."""
        length = len(request.prompt)
        if length == 0:
            raise SettingError("a prompt must have at least one token")
        if length + (request.max_new_tokens > 0) > self.capacity:
            raise SettingError(f"the prompt has {length:,} tokens; this model takes {self.capacity:,} with its answer")
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if request.seed is None else request.seed)
        row = Row(self.submitted, request, list(request.prompt), generator, self.nothing)
        self.waiting.append(row)
        self.submitted += 1
        return row.number

    def cancel(self, number: int) -> None:
        """Give up a request, wherever it is; its slot is free before the next step. It may be gone."""
        for row in (*self.answering, *([self.reading] if self.reading else [])):
            if row.number == number:
                self._leave(row)
        self.waiting = deque(row for row in self.waiting if row.number != number)

    def clear(self) -> None:
        """Give up all requests."""
        self.waiting.clear()
        self.answering.clear()
        self.reading = None

    @property
    def used_slots(self) -> int:
        return len(self.answering) + (self.reading is not None)

    @property
    def used_tokens(self) -> int:
        """Tokens that the cache has now, of `slots` times `capacity`."""
        return sum(row.read for row in self.answering) + (self.reading.read if self.reading else 0)

    @property
    def reader(self) -> Network:
        """What reads and scores prompts. Integers laid out for answers round more, and nothing that is said of a prompt
        may depend on whether something was answered before."""
        return self.network if self.model.scheme is None else self.model

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.used_slots)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """A token of every answer, and a chunk of a prompt. After an error no request is left."""
        try:
            tokens = self._answer() if self.answering else []
            if self.reading is None and self.waiting and self.used_slots < self.slots:
                self.reading = self.waiting.popleft()
                self.reading.read = self._known(self.reading)
            return tokens + (self._read(self.reading) if self.reading else [])
        except BaseException:
            self.clear()
            raise

    def _known(self, row: Row) -> int:
        """How many of its first tokens the cache has already; never the last, whose state says what follows."""
        remembered, self.remembered = self.remembered, []
        if not self.remembers or self.answering or row.request.echo:
            return 0
        pairs = zip(remembered, row.request.prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _answer(self) -> list[Token]:
        """The next token of each answer, all in one pass."""
        self.network = packed(self.model) if self.network is self.model else self.network
        device, rows = self.nothing.device, list(self.answering)
        ids = torch.tensor([[row.seen[-1]] for row in rows], device=device)
        positions = torch.tensor([[row.read] for row in rows], device=device)
        hidden = self.network.hidden(ids, positions, self.cache.at(positions))
        logits = self.network.logits(hidden[:, 0])
        for row in rows:
            row.read += 1
        return [self._draw(row, logits[place]) for place, row in enumerate(rows)]

    def _read(self, row: Row) -> list[Token]:
        """The next chunk of a prompt, and after its end the first token of the answer."""
        device, prompt = self.nothing.device, row.request.prompt
        chunk = prompt[row.read : row.read + CHUNK_TOKENS]
        positions = torch.arange(row.read, row.read + len(chunk), device=device)[None]
        window = self.cache.at(positions, first=len(self.answering))
        hidden = self.reader.hidden(torch.tensor([list(chunk)], device=device), positions, window)[0]
        tokens = self._echo(row, hidden) if row.request.echo else []
        row.read += len(chunk)
        if row.read < len(prompt):
            return tokens
        self.reading = None
        if row.request.max_new_tokens == 0:
            return tokens
        self.answering.append(row)
        return [*tokens, self._draw(row, self.reader.logits(hidden[-1:])[0])]

    def _draw(self, row: Row, logits: Float[Tensor, " v"]) -> Token:
        """The row's next token; after its last, the row has left."""
        request, token = row.request, row.request.choose(logits, row.seen, row.generator)
        row.seen.append(token)
        full = row.answered == request.max_new_tokens or len(row.seen) >= self.capacity
        reason: FinishReason | None = "stop" if token == request.eos_id else "length" if full else None
        found = None if request.top_logprobs is None else scores(logits[None], [token], request.top_logprobs)[0]
        if reason is not None:
            self._leave(row)
        return Token(row.number, token, reason, found)

    def _echo(self, row: Row, hidden: Float[Tensor, "t c"]) -> list[Token]:
        """The tokens of a chunk of the prompt, with the scores that the state before each gives it."""
        prompt, top, end = row.request.prompt, row.request.top_logprobs, row.read + len(hidden)
        labels, states = list(prompt[max(row.read, 1) : end]), torch.cat([row.last, hidden[:-1]])
        row.last = hidden[-1:].clone()
        found: list[Scores | None] = [None] * (len(hidden) - len(labels))  # nothing comes before the first token
        if top is None:
            found += [None] * len(labels)
        else:
            for place in range(0, len(labels), SCORED_TOKENS):
                part = slice(place, place + SCORED_TOKENS)
                found += scores(self.reader.logits(states[part]), labels[part], top)
        tokens = [Token(row.number, prompt[row.read + i], None, each, True) for i, each in enumerate(found)]
        if row.request.max_new_tokens == 0 and end == len(prompt):
            tokens[-1] = tokens[-1]._replace(finish_reason="length")
        return tokens

    def _leave(self, row: Row) -> None:
        """Free a slot: the last answer takes it, and the prompt being read takes that one's."""
        if self.used_slots == 1:
            self.remembered = row.seen[: row.read]
        if row is self.reading:
            self.reading = None
            return
        place, last = self.answering.index(row), len(self.answering) - 1
        moved = self.answering.pop()
        if place != last:
            self.answering[place] = moved
            self.cache.move(last, place, moved.read)
        if self.reading is not None:
            self.cache.move(last + 1, last, self.reading.read)


def scores(logits: Float[Tensor, "t v"], ids: Sequence[int], top: int) -> list[Scores]:
    """Log-probabilities of these ids, one a row of logits, and of the `top` likeliest of each row."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor([*ids], device=logits.device)[:, None])[:, 0].tolist()
    values, places = logprobs.topk(min(top, logprobs.shape[-1]), -1)
    likeliest = [tuple(zip(*pair, strict=True)) for pair in zip(places.tolist(), values.tolist(), strict=True)]
    return [Scores(*each) for each in zip(own, likeliest, strict=True)]
