"""Prompts in, a stream of pieces out: the one place where tokens are produced.

Rows of different lengths share a batch without padding on the left: each row's tokens stand at their own
positions in the cache, and what lies beyond a row's end is never attended to.

    prompts   A B C        positions 0 1 2      next token of row 0 goes to 3
              D E . (pad)            0 1 2                    row 1 goes to 2, over the pad
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from smolforge.config import Generation
from smolforge.errors import InvalidFile, SettingError
from smolforge.generation.samplers import Sampling, sampling
from smolforge.memory import Cache
from smolforge.model import LanguageModel
from smolforge.settings import validated
from smolforge.tokenizer import IncrementalDecoder, Tokenizer

FinishReason = Literal["stop", "length"]
Prompt = str | list[dict[str, str]]
"""A text to go on with, or messages to answer."""


class Token(NamedTuple):
    """One new token of one row; the last of a row says why it is the last."""

    row: int
    id: int
    finish_reason: FinishReason | None


class Piece(NamedTuple):
    """Text that became whole, and the ids behind it; the last piece says why it is the last."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `token_ids` includes the end-of-text token where the model gave one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@torch.inference_mode()
def tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    choose: Sampling,
    max_new_tokens: int,
    eos_id: int | None = None,
    seed: int | None = None,
) -> Generator[Token, bool | None, None]:
    """New tokens of all rows, a step at a time, until each row has ended.

    Every row draws from a generator of its own, seeded alike, so a row gives what it gives alone.
    Raises SettingError for a prompt that is empty or leaves no room in the context.
    """
    longest = max(map(len, prompts))
    limit = model.config.max_position_embeddings
    if min(map(len, prompts)) == 0:
        raise SettingError("a prompt must have at least one token")
    if longest >= limit:
        raise SettingError(f"the prompt has {longest} tokens; this model takes {limit} with its answer")
    device = model.head.device
    seed = torch.Generator().seed() if seed is None else seed
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    seen = [list(prompt) for prompt in prompts]
    active = list(range(len(prompts)))
    cache = Cache(model.config, len(prompts), min(limit, longest + max_new_tokens), model.head)
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in seen], device=device)
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    hidden = model.hidden(padded, positions, cache.at(positions))
    last = hidden[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in seen])]
    while True:
        logits = model.logits(last)
        going = []
        for place, row in enumerate(active):
            token = choose(logits[place], seen[row], generators[row])
            seen[row].append(token)
            full = len(seen[row]) - len(prompts[row]) == max_new_tokens or len(seen[row]) >= limit
            reason: FinishReason | None = "stop" if token == eos_id else "length" if full else None
            if (yield Token(row, token, reason)):  # the reader has enough of this row
                reason = "stop"
            if reason is None:
                going.append(place)
        if not going:
            return
        if len(going) < len(active):
            cache.keep(going)
            active = [active[place] for place in going]
        positions = torch.tensor([[len(seen[row]) - 1] for row in active], device=device)
        ids = torch.tensor([[seen[row][-1]] for row in active], device=device)
        last = model.hidden(ids, positions, cache.at(positions))[:, -1]


class Text:
    """Tokens of one row to pieces of text, held back while they might become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.decoder, self.stop = IncrementalDecoder(tokenizer), tuple(stop)
        self.held, self.ids = "", []
        self.stopped = False

    def push(self, token: Token, eos_id: int) -> Piece | None:
        """The piece this token completes, if any; `stopped` is set where a stop string came up."""
        self.ids.append(token.id)
        if token.id != eos_id:
            self.held += self.decoder.push(token.id)
        if token.finish_reason is not None:
            self.held += self.decoder.finish()
        found = [place for word in self.stop if (place := self.held.find(word)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found), "stop")
        if token.finish_reason is not None:
            return self._give(len(self.held), token.finish_reason)
        ready = len(self.held) - max((_overlap(self.held, word) for word in self.stop), default=0)
        return self._give(ready, None) if ready else None

    def _give(self, length: int, reason: FinishReason | None) -> Piece:
        piece = Piece(self.held[:length], tuple(self.ids), reason)
        self.held, self.ids = self.held[length:], []
        return piece


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word`."""
    return next((size for size in range(min(len(word), len(text)), 0, -1) if text.endswith(word[:size])), 0)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """What a model is given: a text, of which an empty one starts a new document, or a chat up to its turn."""
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt)
    return tokenizer.encode(prompt) or [tokenizer.eos_id]


def pieces(model: LanguageModel, prompts: Sequence[Prompt], options: Generation) -> Iterator[tuple[int, Piece]]:
    """(row, piece) of all prompts, as they come."""
    tokenizer = own(model)
    yield from pieces_behind(model, [prompt_ids(tokenizer, prompt) for prompt in prompts], options)


def pieces_behind(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: Generation
) -> Iterator[tuple[int, Piece]]:
    """The same, of prompts given by their ids."""
    tokenizer = own(model)
    rows = [Text(tokenizer, options.stop) for _ in prompts]
    source = tokens(model, prompts, sampling(options), options.max_new_tokens, tokenizer.eos_id, options.seed)
    token = next(source)
    while True:
        piece = rows[token.row].push(token, tokenizer.eos_id)
        if piece is not None:
            yield token.row, piece
        try:
            token = source.send(rows[token.row].stopped)
        except StopIteration:
            return


def stream(model: LanguageModel, prompt: Prompt, **options: Any) -> Iterator[Piece]:
    """Continue a text, or answer a list of {"role", "content"}, piece by piece. Options are the fields of
    `config.Generation`.

    Ends with finish_reason "stop" at the end-of-text token or a stop string (neither is part of the
    text), or "length" at max_new_tokens or the end of the model's context. Raises SettingError for an
    option that is unknown or out of range, or a prompt that fills the context.
    """
    for _, piece in pieces(model, [prompt], validated(Generation, options)):
        yield piece


def generate(model: LanguageModel, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
    """The joined streams of several prompts, run as one batch. Options and errors as for `stream`."""
    rows: list[list[Piece]] = [[] for _ in prompts]
    if prompts:
        for row, piece in pieces(model, prompts, validated(Generation, options)):
            rows[row].append(piece)
    return [join(row) for row in rows]


def join(row: Sequence[Piece]) -> Completion:
    """All pieces of one stream as one completion."""
    reason = row[-1].finish_reason
    assert reason is not None, "a stream ends with a reason"
    ids = tuple(token for piece in row for token in piece.token_ids)
    return Completion("".join(piece.text for piece in row), ids, reason)


def own(model: LanguageModel) -> Tokenizer:
    """The model's tokenizer. Raises InvalidFile where its folder had none."""
    if model.tokenizer is None:
        raise InvalidFile("this model came without a tokenizer; load one and set model.tokenizer")
    return model.tokenizer
