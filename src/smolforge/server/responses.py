"""Pieces of text in OpenAI's words: whole answers, chunks of a stream, log-probabilities.

A choice's answer is made up as its pieces come, so a stream and a whole answer cannot differ.

Everything that can go wrong, in the one shape that OpenAI's clients read.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from smolforge.generation.engine import Scores, Token
from smolforge.generation.stream import Piece
from smolforge.tokenizer import Tokenizer, byte_symbols
from smolforge.tokenizer.incremental import IncrementalDecoder

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON has no number for; OpenAI's."""
DONE = "data: [DONE]\n\n"
BYTES = {symbol: byte for byte, symbol in byte_symbols().items()}


class Words:
    """How single tokens are shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, token: int) -> str:
        """The token's text; of one that is no whole character, its id, so that no two look alike."""
        text = self.tokenizer.decode([token])
        return f"token_id:{token}" if "\ufffd" in text or not text else text

    def bytes(self, token: int) -> list[int]:
        symbols = self.tokenizer.backend.id_to_token(token) or ""
        if self.tokenizer.byte_level and all(symbol in BYTES for symbol in symbols):
            return [BYTES[symbol] for symbol in symbols]
        return list(self.tokenizer.decode([token]).encode())

    def top(self, own: int, scores: Scores) -> dict[str, float]:
        """Text to log-probability, likeliest first, the token itself among them, and no two under one text."""
        found: dict[str, float] = {}
        for token, logprob in (dict(scores.top) | {own: scores.logprob}).items():
            text = self.text(token)
            found[f"token_id:{token}" if text in found else text] = bounded(logprob)
        return found


def bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class LegacyLogprobs:
    """What /v1/completions says of tokens; `text_offset` counts characters from the beginning of the text."""

    def __init__(self, words: Words) -> None:
        self.words, self.decoder, self.offset = words, IncrementalDecoder(words.tokenizer), 0

    def of(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """Of the next tokens; the first of a prompt has no score."""
        rows = []
        for token in tokens:
            top = None if token.scores is None else self.words.top(token.id, token.scores)
            own = None if token.scores is None else bounded(token.scores.logprob)
            rows.append((self.words.text(token.id), own, top, self.offset))
            if token.of_prompt or token.id != self.words.tokenizer.eos_id:  # an answer's end has no text
                self.offset += len(self.decoder.push(token.id))
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}


class ChatLogprobs:
    """What /v1/chat/completions says of tokens."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            assert token.scores is not None, "asked for"
            top = [self._one(*each) for each in token.scores.top]
            content.append({**self._one(token.id, token.scores.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.words.text(token), "logprob": bounded(logprob), "bytes": self.words.bytes(token)}


class Answer:
    """One HTTP answer: what all its chunks share, and what its choices have said so far."""

    def __init__(self, model: str, chat: bool, words: Words, prompts: Sequence[Sequence[int]], choices: int) -> None:
        self.chat, self.model, self.prompts, self.choices = chat, model, prompts, choices
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        count = len(prompts) * choices
        self.logprobs = [(ChatLogprobs if chat else LegacyLogprobs)(words) for _ in range(count)]
        self.pieces: list[list[Piece]] = [[] for _ in range(count)]
        self.generated = 0

    def hear(self, place: int, piece: Piece) -> None:
        self.pieces[place].append(piece)
        self.generated += len(piece.token_ids)

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
        }

    def whole(self, echoed: Sequence[str], scored: bool) -> dict[str, Any]:
        """The body of an answer that is not streamed. `echoed` is what each choice's text begins with."""
        choices = []
        for place, pieces in enumerate(self.pieces):
            text = echoed[place] + "".join(piece.text for piece in pieces)
            tokens = [token for piece in pieces for token in piece.tokens]
            choice = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            )
            said = self.logprobs[place].of(tokens) if scored else None
            choices.append({"index": place, **choice, "logprobs": said, "finish_reason": pieces[-1].finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage}

    def chunk(
        self, place: int, said: str | dict[str, str], tokens: Sequence[Token] = (), why: str | None = None
    ) -> str:
        """One event: text of a completion or a delta of a chat, the tokens that are to be scored, and its end."""
        content = {"delta": said} if self.chat else {"text": said}
        scored = self.logprobs[place].of(tokens) if tokens else None
        choice = {"index": place, **content, "logprobs": scored, "finish_reason": why}
        return event({**self._chunk_head(), "choices": [choice]})

    def usage_chunk(self) -> str:
        return event({**self._chunk_head(), "choices": [], "usage": self.usage})

    def events(self, place: int, piece: Piece, scored: bool) -> list[str]:
        """The chunks of a piece: what it says, and behind the last an empty one with the reason."""
        found = []
        tokens = piece.tokens if scored else ()
        if piece.text or tokens:
            found.append(self.chunk(place, {"content": piece.text} if self.chat else piece.text, tokens))
        if piece.finish_reason is not None:
            found.append(self.chunk(place, {} if self.chat else "", (), piece.finish_reason))
        return found

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that gets an error: its status, and what OpenAI's clients show."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of it; no half characters, which JSON cannot carry."""
        message = str(self).encode(errors="replace").decode()
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


class Broken(Refused):
    """Our own fault. What it was stands in the log, not in the answer."""

    def __init__(self) -> None:
        super().__init__(500, "the server failed; its log says how", code="internal_error")


def closing() -> Refused:
    return Refused(503, "the server is shutting down; ask again when it is back", code="shutting_down", retry_after=5)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """The first thing that is wrong with a request's fields, by its name."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    # Of a union pydantic names each kind it tried; people know fields.
    param = ".".join(part for part in place if part.replace("_", "").isalnum() and part not in ("str", "int", "bool"))
    if first["type"] == "json_invalid":
        return Refused(400, "the body is not valid JSON")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"there is no field {param[:60]!r} here", param[:60], "unknown_parameter")
    said = str(first["msg"]).removeprefix("Value error, ")
    return Refused(400, f"{param or 'the body'}: {said}"[:500], param[:100] or None)
