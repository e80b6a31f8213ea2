"""Prompts in, a stream of pieces out: the one place where tokens become text.

`generate`, `stream`, chat and the server are readers of the engine through `Writer`; none has a loop of its own.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from smolforge.config import Generation
from smolforge.config.base import validated
from smolforge.errors import InvalidFile
from smolforge.generation.engine import Engine, FinishReason, Request, Token
from smolforge.generation.samplers import Sampling, sampling
from smolforge.models.decoder import LanguageModel
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.incremental import IncrementalDecoder

Prompt = str | list[dict[str, str]]
"""A text to go on with, or messages to answer."""


class Piece(NamedTuple):
    """Text that became whole, and the tokens behind it; the last piece says why it is the last."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the answer, without the prompt's."""
        return tuple(token.id for token in self.tokens if not token.of_prompt)


@dataclass(frozen=True)
class Completion:
    """A whole answer. `token_ids` includes the end-of-text token where the model gave one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    choose: Sampling,
    max_new_tokens: int,
    eos_id: int | None = None,
    seed: int | None = None,
) -> Generator[Token, None, None]:
    """New tokens of all rows, a step at a time, until each row has ended.

    Every row draws from a generator of its own, seeded alike, so a row gives what it gives alone.
    Raises SettingError for a prompt that is empty or leaves no room in the context.
    """
    requests = [Request(prompt, choose, max_new_tokens, eos_id, seed) for prompt in prompts]
    engine = engine_for(model, requests)
    for request in requests:
        engine.submit(request)
    while engine.busy:
        yield from engine.step()


def engine_for(model: LanguageModel, requests: Sequence[Request]) -> Engine:
    """An engine that takes all of these at once. They are numbered in the order they are submitted, from 0."""
    return Engine(model, len(requests), max(len(each.prompt) + each.max_new_tokens for each in requests))


class Text:
    """Tokens of one row to pieces of text, held back while they might become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.decoder, self.stop = IncrementalDecoder(tokenizer), tuple(stop)
        self.held: str = ""
        self.tokens: list[Token] = []
        self.stopped = False

    def push(self, token: Token, eos_id: int) -> Piece | None:
        """The piece this token completes, if any; `stopped` is set where a stop string came up.

        Tokens of the prompt go along with the first piece and are no part of the text.
        """
        self.tokens.append(token)
        if token.of_prompt:
            return self._give(0, token.finish_reason) if token.finish_reason else None
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
        piece = Piece(self.held[:length], tuple(self.tokens), reason)
        self.held, self.tokens = self.held[length:], []
        return piece


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word`."""
    return next((size for size in range(min(len(word), len(text)), 0, -1) if text.endswith(word[:size])), 0)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """What a model is given: a text, of which an empty one starts a new document, or a chat up to its turn."""
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt)
    return tokenizer.encode(prompt) or [tokenizer.eos_id]


class Writer:
    """An engine whose tokens come out as text, cut at stop strings."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.rows: dict[int, Text] = {}

    def submit(self, request: Request, stop: Sequence[str] = ()) -> int:
        """The number that its pieces will carry. Raises what `Engine.submit` does."""
        number = self.engine.submit(request)
        self.rows[number] = Text(self.tokenizer, stop)
        return number

    def cancel(self, number: int) -> None:
        """Nothing more comes of this request, and its slot is free."""
        self.engine.cancel(number)
        self.rows.pop(number, None)

    def clear(self) -> None:
        """Nothing more comes of any."""
        self.engine.clear()
        self.rows.clear()

    def step(self) -> Iterator[tuple[int, Piece]]:
        """What one step of the engine made whole. A request whose stop string came up has left the engine."""
        for token in self.engine.step():
            piece = self.rows[token.row].push(token, self.tokenizer.eos_id)
            if piece is not None:
                if piece.finish_reason is not None:
                    self.cancel(token.row)
                yield token.row, piece


class Voice:
    """One answer after another from one cache: what a prompt begins with as the last did is not read again."""

    def __init__(self, model: LanguageModel, capacity: int) -> None:
        self.tokenizer = own(model)
        self.writer = Writer(Engine(model, 1, capacity, remembers=True), self.tokenizer)
        self.capacity = self.writer.engine.capacity

    def stream(
        self, prompt: Sequence[int], options: Generation, stopped: Callable[[], bool] = lambda: False
    ) -> Generator[Piece, None, None]:
        """The answer to a prompt, as it comes, given up between two tokens when it is to be `stopped`.

        Raises as `stream`.
        """
        request = Request(prompt, sampling(options), options.max_new_tokens, self.tokenizer.eos_id, options.seed)
        number = self.writer.submit(request, options.stop)
        try:
            while self.writer.engine.busy and not stopped():
                for _, piece in self.writer.step():
                    yield piece
        finally:
            self.writer.cancel(number)


def pieces(model: LanguageModel, prompts: Sequence[Prompt], options: Generation) -> Iterator[tuple[int, Piece]]:
    """(row, piece) of all prompts, as they come."""
    tokenizer = own(model)
    yield from pieces_behind(model, [prompt_ids(tokenizer, prompt) for prompt in prompts], options)


def pieces_behind(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: Generation
) -> Iterator[tuple[int, Piece]]:
    """The same, of prompts given by their ids."""
    tokenizer, choose = own(model), sampling(options)
    requests = [Request(row, choose, options.max_new_tokens, tokenizer.eos_id, options.seed) for row in prompts]
    writer = Writer(engine_for(model, requests), tokenizer)
    for request in requests:
        writer.submit(request, options.stop)
    while writer.engine.busy:
        yield from writer.step()


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
