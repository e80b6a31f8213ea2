"""The routes: OpenAI's, those that lm-evaluation-harness and operators need, and the page at /.

`create_app` builds them for a loaded model; only the engine thread has state.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from smolforge import __version__
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.generation import engine
from smolforge.server import web
from smolforge.server.engine_thread import Choice, EngineThread, ResponseStream
from smolforge.server.middleware import AccessRules, Metrics, RequestGuard
from smolforge.server.responses import (
    DONE,
    APIError,
    InternalServerError,
    ResponseBuilder,
    TokenText,
    sse_event,
    validation_error,
)
from smolforge.server.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    TextFields,
    TokenizeRequest,
)
from smolforge.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as OpenAI's; a chat may go on to the end of the context."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
ERROR_SCHEMA = {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"description": description, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    for code, description in {
        400: "A field is wrong, missing or not offered",
        401: "The key is missing or wrong",
        403: "The host is not one of this server's",
        404: "No such route or model",
        405: "No such method",
        408: "The body did not come in time",
        413: "The body is too large",
        415: "The body is no JSON",
        429: "Too many requests wait",
        500: "The server failed",
        503: "The server is shutting down",
    }.items()
}


class Service:
    """A model under a name, and the engine thread that runs it."""

    def __init__(
        self, name: str, tokenizer: Tokenizer, engine_thread: EngineThread, *, parse_special: bool = False
    ) -> None:
        self.name, self.tokenizer, self.engine_thread = name, tokenizer, engine_thread
        self.parse_special = parse_special
        self.token_text, self.max_model_len = TokenText(tokenizer), engine_thread.text_engine.engine.capacity
        self.vocab_size = engine_thread.text_engine.engine.model.config.vocab_size
        self.created = int(time.time())

    async def complete(self, request: CompletionRequest, raw_request: Request) -> Response:
        """Answer /v1/completions."""
        self.check_name(request.model)
        prompts = await run_in_threadpool(lambda: [self.token_ids(prompt, request) for prompt in request.prompt_list])
        if len(prompts) * request.num_choices > 128:
            raise APIError(400, "prompts times n may be 128", "n")
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        if not request.echo:
            return await self._respond(request, raw_request, prompts, max_tokens=max_tokens)
        texts = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in request.prompt_list]
        return await self._respond(request, raw_request, prompts, max_tokens=max_tokens, echo_texts=texts)

    async def chat(self, request: ChatCompletionRequest, raw_request: Request) -> Response:
        """/v1/chat/completions."""
        self.check_name(request.model)
        template_kwargs = (
            request.chat_template_kwargs.model_dump(exclude_none=True) if request.chat_template_kwargs else {}
        )
        prompt = await run_in_threadpool(self.chat_ids, request.messages, **template_kwargs)
        max_tokens = request.max_completion_tokens or request.max_tokens or self.max_model_len
        return await self._respond(request, raw_request, [prompt], max_tokens=max_tokens)

    async def _respond(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        raw_request: Request,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        echo_texts: Sequence[str] | None = None,
    ) -> Response:
        """Answer with JSON or a stream of events. With `echo_texts`, one a prompt, answers begin with their prompt."""
        if request.logit_bias and max(map(int, request.logit_bias)) >= self.vocab_size:
            raise APIError(400, f"logit_bias: this model has token ids below {self.vocab_size:,}", "logit_bias")
        is_chat, count = isinstance(request, ChatCompletionRequest), request.num_choices
        choices = [
            self.make_choice(request, prompt, max_tokens, echo=echo_texts is not None, index=index)
            for prompt in prompts
            for index in range(count)
        ]
        builder = ResponseBuilder(
            self.name,
            is_chat,
            self.token_text,
            prompt_tokens=sum(map(len, prompts)),
            echo_texts=[text for text in echo_texts or [""] * len(prompts) for _ in range(count)],
            with_logprobs=request.num_logprobs is not None,
        )
        stream = self.engine_thread.submit(choices)
        stream.disconnect_task = asyncio.ensure_future(close_on_disconnect(raw_request, stream))
        if request.stream:
            events = stream_events(stream, builder, request.stream_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        try:
            async for index, chunk in stream.chunks():
                builder.add(index, chunk)
            return JSONResponse(builder.to_json())
        finally:
            stream.close()

    def make_choice(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        echo: bool,
        index: int,
    ) -> Choice:
        """Return one choice. Raises APIError for a prompt that leaves no room for an answer."""
        available = self.max_model_len - len(prompt)
        if available < (max_tokens > 0):
            raise APIError(
                400,
                f"this model's maximum context length is {self.max_model_len:,} tokens, and the prompt has "
                f"{len(prompt):,}; shorten it, so that there is room for an answer",
                "messages" if isinstance(request, ChatCompletionRequest) else "prompt",
                code="context_length_exceeded",
            )
        eos_ids = () if request.ignore_eos else self.tokenizer.eos_ids
        sampler, seed = request.sampler(len(prompt)), request.seed_for_choice(index)
        max_new_tokens, top_logprobs = min(max_tokens, available), request.num_logprobs
        return Choice(
            engine.Request(prompt, sampler, max_new_tokens, eos_ids, seed, top_logprobs, echo), request.stop_strings
        )

    def text_ids(self, text: str, fields: TextFields) -> list[int]:
        """Return the token ids of a text; `fields` say whether special tokens in it are meant, and BOS is added."""
        parse_special = self.parse_special if fields.parse_special is None else fields.parse_special
        if fields.add_special_tokens is not False:
            return self.tokenizer.encode_prompt(text, parse_special=parse_special)
        return self.tokenizer.encode_with_special_tokens(text) if parse_special else self.tokenizer.encode(text)

    def token_ids(self, prompt: str | Sequence[int], fields: TextFields) -> Sequence[int]:
        """Return the token ids of a prompt; an empty one starts a document."""
        if isinstance(prompt, str):
            return self.text_ids(prompt, fields) or [self.tokenizer.eos_id]
        if max(prompt) >= self.vocab_size:
            raise APIError(400, f"prompt: this model has token ids below {self.vocab_size:,}", "prompt")
        return prompt

    def chat_ids(self, messages: Sequence[ChatMessage], **template_kwargs: Any) -> list[int]:
        """Return the token ids of a conversation. Raises APIError with the template's message."""
        try:
            return self.tokenizer.chat([message.as_template_message() for message in messages], **template_kwargs)
        except (ConfigError, InvalidFileError) as error:
            raise APIError(400, str(error), "messages") from None

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise APIError(
                404, f"there is no model {name[:100]!r} here, but {self.name!r}", "model", code="model_not_found"
            )

    def model_card(self) -> dict[str, Any]:
        """Return the model as /v1/models lists it."""
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "smolforge"}
        return {**card, "max_model_len": self.max_model_len}


async def close_on_disconnect(raw_request: Request, stream: ResponseStream) -> None:
    """Close the stream when the client has disconnected."""
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass
    stream.put(APIError(499, "the client has gone"))
    stream.close()


async def stream_events(stream: ResponseStream, builder: ResponseBuilder, with_usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events; a client that stops reading closes the stream."""
    try:
        for event in builder.first_events():
            yield event
        async for index, chunk in stream.chunks():
            builder.add(index, chunk)
            for event in builder.events(index, chunk):
                yield event
        if with_usage:
            yield builder.usage_event()
        yield DONE
    except APIError as error:
        yield sse_event(error.body())
        yield DONE
    finally:
        stream.close()


def create_app(service: Service, metrics: Metrics, rules: AccessRules, *, cors_origins: Sequence[str] = ()) -> ASGIApp:
    """Return the ASGI application. The caller starts and drains the engine thread."""
    app = FastAPI(title="smolforge", version=__version__, docs_url=None, redoc_url=None, responses=ERROR_RESPONSES)
    openai_routes(app, service)
    token_routes(app, service)
    operator_routes(app, service, metrics)
    page_routes(app)

    async def refused(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (RequestValidationError, APIError, InvalidFileError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)
    guarded: ASGIApp = RequestGuard(app, rules, metrics)
    if cors_origins:
        guarded = CORSMiddleware(guarded, cors_origins, allow_methods=["*"], allow_headers=["*"])
    return guarded


def as_api_error(error: Exception) -> APIError:
    """Return the error that the client gets for an exception in a route."""
    match error:
        case APIError():
            return error
        case RequestValidationError():
            return validation_error(error.errors())
        case InvalidFileError():  # a text that the tokenizer cannot encode
            return APIError(400, str(error))
        case HTTPException(status_code=status):
            messages = {404: "there is no such route", 405: "this route does not take this method"}
            return APIError(status, messages.get(status, str(error.detail)))
        case _:
            return InternalServerError()


def openai_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that OpenAI's clients call."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The same, by its name."""
        service.check_name(model)
        return service.model_card()

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, raw_request: Request) -> Response:
        """Continue prompts."""
        return await service.complete(request, raw_request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatCompletionRequest, raw_request: Request) -> Response:
        """Answer a conversation."""
        return await service.chat(request, raw_request)


def token_routes(app: FastAPI, service: Service) -> None:
    """Add the tokenizer's routes, as vLLM's clients and lm-evaluation-harness call them."""

    @app.post("/tokenize")
    def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """Token ids of messages, or of a text, in which special tokens are plain text unless parsed, or all of it."""
        service.check_name(request.model)
        if request.messages is not None:
            add_generation_prompt = request.add_generation_prompt is not False
            ids = service.chat_ids(request.messages, add_generation_prompt=add_generation_prompt)
        elif request.prompt in service.tokenizer.special.by_text:  # how lm-evaluation-harness asks for the id of one
            ids = service.tokenizer.encode_with_special_tokens(request.prompt)
        else:
            ids = service.text_ids(request.prompt or "", request)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len}

    @app.post("/detokenize")
    def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        """Text of token ids."""
        service.check_name(request.model)
        return {"prompt": service.tokenizer.decode(request.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Its special tokens and template, as lm-evaluation-harness asks for them."""
        tokenizer = service.tokenizer
        special_tokens = {name: tokenizer.named_token(name) for name in ("bos_token", "pad_token")}
        template = None if tokenizer.template is None else tokenizer.template.source
        return {**special_tokens, "eos_token": tokenizer.eos_token, "chat_template": template}


def operator_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add health, metrics and version."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives. Needs no key."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether a request would be taken now."""
        if service.engine_thread.draining or not service.engine_thread.thread.is_alive():
            raise APIError(503, "the server is not ready", code="not_ready", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def measured() -> Response:
        """Prometheus' text."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def page_routes(app: FastAPI) -> None:
    """Add the page's files, which are no part of the API."""
    for route in web.FILES:
        app.get(route, include_in_schema=False)(partial(web.respond, route))
