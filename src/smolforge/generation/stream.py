"""Prompts in, a stream of text chunks out: the one place where tokens become text.

`generate`, `stream`, chat and the server are readers of the engine through `TextEngine`; none has a loop of its own.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from smolforge.config import Generation
from smolforge.config.base import validate_settings
from smolforge.errors import InvalidFileError
from smolforge.generation.engine import Engine, FinishReason, Request, Token
from smolforge.generation.samplers import SamplerChain, make_sampler
from smolforge.models.decoder import LanguageModel
from smolforge.tokenizer import IncrementalDecoder, Tokenizer

Prompt = str | list[dict[str, str]]
"""A text to go on with, or messages to answer."""


class TextChunk(NamedTuple):
    """Text that is complete, and its tokens; the last chunk has the finish reason."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the answer, without the prompt's."""
        return tuple(token.id for token in self.tokens if not token.is_prompt)


@dataclass(frozen=True)
class Completion:
    """A whole answer. `token_ids` includes the end-of-text token where the model gave one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampler: SamplerChain,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
) -> Generator[Token, None, None]:
    """New tokens of all rows, a step at a time, until each row has ended.

    Every row draws from a generator of its own, seeded alike, so a row gives what it gives alone.
    Raises ConfigError for a prompt that is empty or leaves no room in the context.
    """
    requests = [Request(prompt, sampler, max_new_tokens, eos_ids, seed) for prompt in prompts]
    engine = engine_for(model, requests)
    for request in requests:
        engine.submit(request)
    while engine.busy:
        yield from engine.step()


def engine_for(model: LanguageModel, requests: Sequence[Request]) -> Engine:
    """An engine that takes all of these at once. They are numbered in the order they are submitted, from 0."""
    return Engine(model, len(requests), max(len(request.prompt) + request.max_new_tokens for request in requests))


class StopBuffer:
    """Turn the tokens of one row into chunks of text, held back while they might become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.decoder, self.stop = IncrementalDecoder(tokenizer), tuple(stop)
        self.pending_text: str = ""
        self.tokens: list[Token] = []
        self.stopped = False

    def push(self, token: Token, eos_ids: Collection[int]) -> TextChunk | None:
        """Return the chunk that this token completes, if any; `stopped` is set where a stop string came up.

        Tokens of the prompt go along with the first chunk and are no part of the text.
        """
        self.tokens.append(token)
        if token.is_prompt:
            return self._emit(0, token.finish_reason) if token.finish_reason else None
        if token.id not in eos_ids:
            self.pending_text += self.decoder.push(token.id)
        if token.finish_reason is not None:
            self.pending_text += self.decoder.finish()
        matches = [position for stop_string in self.stop if (position := self.pending_text.find(stop_string)) >= 0]
        if matches:
            self.stopped = True
            return self._emit(min(matches), "stop")
        if token.finish_reason is not None:
            return self._emit(len(self.pending_text), token.finish_reason)
        ready = len(self.pending_text) - max(
            (_overlap(self.pending_text, stop_string) for stop_string in self.stop), default=0
        )
        return self._emit(ready, None) if ready else None

    def _emit(self, length: int, reason: FinishReason | None) -> TextChunk:
        chunk = TextChunk(self.pending_text[:length], tuple(self.tokens), reason)
        self.pending_text, self.tokens = self.pending_text[length:], []
        return chunk


def _overlap(text: str, stop_string: str) -> int:
    """Return the length of the longest end of `text` that starts `stop_string`."""
    return next(
        (size for size in range(min(len(stop_string), len(text)), 0, -1) if text.endswith(stop_string[:size])), 0
    )


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """What a model is given: a text, of which an empty one starts a new document, or a chat up to its turn."""
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt)
    return tokenizer.encode_prompt(prompt) or [tokenizer.eos_id]


class TextEngine:
    """An engine whose tokens come out as text, cut at stop strings."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.buffers: dict[int, StopBuffer] = {}

    def submit(self, request: Request, stop: Sequence[str] = ()) -> int:
        """Submit a request; return the number that its chunks will have. Raises what `Engine.submit` does."""
        request_id = self.engine.submit(request)
        self.buffers[request_id] = StopBuffer(self.tokenizer, stop)
        return request_id

    def cancel(self, request_id: int) -> None:
        """Nothing more comes of this request, and its slot is free."""
        self.engine.cancel(request_id)
        self.buffers.pop(request_id, None)

    def clear(self) -> None:
        """Nothing more comes of any."""
        self.engine.clear()
        self.buffers.clear()

    def step(self) -> Iterator[tuple[int, TextChunk]]:
        """What one step of the engine made whole. A request whose stop string came up has left the engine."""
        for token in self.engine.step():
            chunk = self.buffers[token.row].push(token, self.tokenizer.eos_ids)
            if chunk is not None:
                if chunk.finish_reason is not None:
                    self.cancel(token.row)
                yield token.row, chunk


class ChatSession:
    """One answer after another from one cache: what a prompt begins with as the last did is not read again."""

    def __init__(self, model: LanguageModel, capacity: int) -> None:
        self.tokenizer = require_tokenizer(model)
        self.text_engine = TextEngine(Engine(model, 1, capacity, prefix_caching=True), self.tokenizer)
        self.capacity = self.text_engine.engine.capacity

    def stream(
        self, prompt: Sequence[int], options: Generation, should_stop: Callable[[], bool] = lambda: False
    ) -> Generator[TextChunk, None, None]:
        """Stream the answer to a prompt, ended between two tokens once `should_stop` returns True.

        Raises as `stream`.
        """
        request = Request(prompt, make_sampler(options), options.max_new_tokens, self.tokenizer.eos_ids, options.seed)
        request_id = self.text_engine.submit(request, options.stop)
        try:
            while self.text_engine.engine.busy and not should_stop():
                for _, chunk in self.text_engine.step():
                    yield chunk
        finally:
            self.text_engine.cancel(request_id)


def stream_batch_ids(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: Generation
) -> Iterator[tuple[int, TextChunk]]:
    """Stream (row, chunk) of prompts that are token ids."""
    tokenizer, sampler = require_tokenizer(model), make_sampler(options)
    requests = [Request(row, sampler, options.max_new_tokens, tokenizer.eos_ids, options.seed) for row in prompts]
    engine = TextEngine(engine_for(model, requests), tokenizer)
    for request in requests:
        engine.submit(request, options.stop)
    while engine.engine.busy:
        yield from engine.step()


def stream(model: LanguageModel, prompt: Prompt, **options: Any) -> Iterator[TextChunk]:
    """Continue a text, or answer a list of {"role", "content"}, piece by piece. Options are the fields of
    `config.Generation`.

    Ends with finish_reason "stop" at an end-of-text token or a stop string (neither is part of the
    text), or "length" at max_new_tokens or the end of the model's context. Raises ConfigError for an
    option that is unknown or out of range, or a prompt that fills the context.
    """
    settings = validate_settings(Generation, options)
    ids = prompt_ids(require_tokenizer(model), prompt)
    for _, chunk in stream_batch_ids(model, [ids], settings):
        yield chunk


def generate(model: LanguageModel, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
    """The joined streams of several prompts, run as one batch. Options and errors as for `stream`."""
    settings = validate_settings(Generation, options)
    rows: list[list[TextChunk]] = [[] for _ in prompts]
    if prompts:
        ids = [prompt_ids(require_tokenizer(model), prompt) for prompt in prompts]
        for row, chunk in stream_batch_ids(model, ids, settings):
            rows[row].append(chunk)
    return [join_chunks(row) for row in rows]


def join_chunks(row: Sequence[TextChunk]) -> Completion:
    """Join the chunks of one stream into a completion."""
    reason = row[-1].finish_reason
    assert reason is not None, "a stream ends with a reason"
    ids = tuple(token for chunk in row for token in chunk.token_ids)
    return Completion("".join(chunk.text for chunk in row), ids, reason)


def require_tokenizer(model: LanguageModel) -> Tokenizer:
    """The model's tokenizer. Raises InvalidFileError where its folder had none."""
    if model.tokenizer is None:
        raise InvalidFileError("this model came without a tokenizer; load one and set model.tokenizer")
    return model.tokenizer
