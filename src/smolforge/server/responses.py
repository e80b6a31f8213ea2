"""Write text chunks as OpenAI's JSON: whole responses, stream events, log-probabilities, errors.

A response is built from its chunks as they come, so a streamed and a whole response cannot differ.
Every error has the one shape that OpenAI's clients read.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from smolforge.generation.engine import Token, TokenLogprobs
from smolforge.generation.stream import TextChunk
from smolforge.tokenizer import IncrementalDecoder, Tokenizer, byte_symbols

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot express; OpenAI's value."""
DONE = "data: [DONE]\n\n"
BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in byte_symbols().items()}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class TokenText:
    """Show single tokens as text and bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, token: int) -> str:
        """Return the token's text; for an incomplete character its id, so that no two look alike."""
        text = self.tokenizer.decode([token])
        return f"token_id:{token}" if "\ufffd" in text or not text else text

    def bytes(self, token: int) -> list[int]:
        symbols = self.tokenizer.backend.id_to_token(token) or ""
        if self.tokenizer.byte_level and all(symbol in BYTE_OF_SYMBOL for symbol in symbols):
            return [BYTE_OF_SYMBOL[symbol] for symbol in symbols]
        return list(self.tokenizer.decode([token]).encode())

    def top_logprobs(self, token_id: int, scores: TokenLogprobs) -> dict[str, float]:
        """Return text to log-probability, most likely first, the token itself included, no two under one text."""
        logprobs: dict[str, float] = {}
        for token, logprob in (dict(scores.top_logprobs) | {token_id: scores.logprob}).items():
            text = self.text(token)
            logprobs[f"token_id:{token}" if text in logprobs else text] = clamp_logprob(logprob)
        return logprobs


class LegacyLogprobs:
    """The log-probabilities of /v1/completions; `text_offset` counts characters from the start of the text."""

    def __init__(self, token_text: TokenText, echo_text: str) -> None:
        self.token_text, self.decoder, self.text_offset = token_text, IncrementalDecoder(token_text.tokenizer), 0
        tokenizer = token_text.tokenizer
        self.hidden_ids = [] if echo_text.startswith(tokenizer.decode(tokenizer.bos_ids)) else tokenizer.bos_ids
        """A BOS that was added to the prompt, and so is not in its text."""

    def to_json(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """Return the log-probabilities of the next tokens; the first of a prompt has none."""
        rows = []
        for token in tokens:
            top = None if token.logprobs is None else self.token_text.top_logprobs(token.id, token.logprobs)
            logprob = None if token.logprobs is None else clamp_logprob(token.logprobs.logprob)
            rows.append((self.token_text.text(token.id), logprob, top, self.text_offset))
            without_text = self.hidden_ids if token.is_prompt else self.token_text.tokenizer.eos_ids
            if token.id not in without_text:
                self.text_offset += len(self.decoder.push(token.id))
            self.hidden_ids = []
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[index] for row in rows] for index, name in enumerate(names)}


class ChatLogprobs:
    """The log-probabilities of /v1/chat/completions."""

    def __init__(self, token_text: TokenText, echo_text: str) -> None:
        self.token_text = token_text

    def to_json(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            assert token.logprobs is not None, "asked for"
            top = [self._entry(*pair) for pair in token.logprobs.top_logprobs]
            content.append({**self._entry(token.id, token.logprobs.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.token_text.text(token),
            "logprob": clamp_logprob(logprob),
            "bytes": self.token_text.bytes(token),
        }


def clamp_logprob(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


class ResponseBuilder:
    """Build one HTTP response from chunks: the fields that all its events share, and its choices so far.

    `echo_texts` is the start of each choice's text.
    """

    def __init__(
        self,
        model: str,
        chat: bool,
        token_text: TokenText,
        *,
        prompt_tokens: int,
        echo_texts: Sequence[str],
        with_logprobs: bool,
    ) -> None:
        self.is_chat, self.echo_texts, self.with_logprobs = chat, echo_texts, with_logprobs
        self.fields = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self.logprobs = [(ChatLogprobs if chat else LegacyLogprobs)(token_text, text) for text in echo_texts]
        self.chunks: list[list[TextChunk]] = [[] for _ in echo_texts]
        self.prompt_tokens, self.num_generated = prompt_tokens, 0

    def add(self, index: int, chunk: TextChunk) -> None:
        self.chunks[index].append(chunk)
        self.num_generated += len(chunk.token_ids)

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.num_generated,
            "total_tokens": self.prompt_tokens + self.num_generated,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        choices = []
        for index, chunks in enumerate(self.chunks):
            text = self.echo_texts[index] + "".join(chunk.text for chunk in chunks)
            tokens = [token for chunk in chunks for token in chunk.tokens]
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
            )
            choices.append(self._choice(index, content, tokens, finish_reason=chunks[-1].finish_reason))
        kind = {"object": "chat.completion"} if self.is_chat else {}
        return {**self.fields, **kind, "choices": choices, "usage": self.usage}

    def first_events(self) -> Iterator[str]:
        """Yield the events before the first chunk: the role in a chat, the prompt in a completion that echoes it."""
        for index, text in enumerate(self.echo_texts):
            if self.is_chat or text:
                content = {"delta": {"role": "assistant", "content": ""}} if self.is_chat else {"text": text}
                yield self._event([self._choice(index, content)])

    def events(self, index: int, chunk: TextChunk) -> Iterator[str]:
        """Yield the events of a chunk; after the last one comes an empty one with the finish reason."""
        if chunk.text or (chunk.tokens and self.with_logprobs):
            content = {"delta": {"content": chunk.text}} if self.is_chat else {"text": chunk.text}
            yield self._event([self._choice(index, content, chunk.tokens)])
        if chunk.finish_reason is not None:
            content = {"delta": {}} if self.is_chat else {"text": ""}
            yield self._event([self._choice(index, content, finish_reason=chunk.finish_reason)])

    def usage_event(self) -> str:
        return self._event([], usage=self.usage)

    def _choice(
        self, index: int, content: dict[str, Any], tokens: Sequence[Token] = (), *, finish_reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self.logprobs[index].to_json(tokens) if self.with_logprobs and tokens else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return sse_event({**self.fields, "choices": choices, **more})


def sse_event(body: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class APIError(Exception):
    """A request that gets an error: its HTTP status, and the message OpenAI's clients show."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as JSON, without half characters, which JSON cannot carry."""
        message = str(self).encode(errors="replace").decode()
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


class InternalServerError(APIError):
    """An error of our own. The cause is in the log, not in the response."""

    def __init__(self) -> None:
        super().__init__(500, "the server failed; its log says how", code="internal_error")


def shutting_down() -> APIError:
    return APIError(503, "the server is shutting down; ask again when it is back", code="shutting_down", retry_after=5)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Return the first error in a request's fields, by the field's name."""
    first = errors[0]
    location = [str(part) for part in first["loc"] if part != "body"]
    # Of a union pydantic names each type it tried; users know fields.
    param = ".".join(
        part for part in location if part.replace("_", "").isalnum() and part not in ("str", "int", "bool")
    )
    if first["type"] == "json_invalid":
        return APIError(400, "the body is not valid JSON")
    if first["type"] == "extra_forbidden":
        return APIError(400, f"there is no field {param[:60]!r} here", param[:60], code="unknown_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return APIError(400, f"{param or 'the body'}: {message}"[:500], param[:100] or None)
