"""The routes: OpenAI's, those that lm-evaluation-harness and operators need, and the page at /.

`application` makes them of a model that is loaded; nothing here keeps state but the desk.
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
from smolforge.errors import InvalidFile, SettingError
from smolforge.generation import engine
from smolforge.server import web
from smolforge.server.engine_thread import Desk, Job, Ticket
from smolforge.server.middleware import Guard, Metrics, Rules
from smolforge.server.responses import DONE, Answer, Broken, Refused, Words, event, of_validation
from smolforge.server.schemas import Chat, Completion, Detokenize, Message, Tokenize
from smolforge.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as OpenAI's; a chat may go on to the end of the context."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
ERROR = {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": said, "content": {"application/json": {"schema": ERROR}}}
    for code, said in {
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
    """A model under a name, and its desk."""

    def __init__(self, name: str, tokenizer: Tokenizer, desk: Desk) -> None:
        self.name, self.tokenizer, self.desk = name, tokenizer, desk
        self.words, self.context = Words(tokenizer), desk.writer.engine.capacity
        self.vocabulary = desk.writer.engine.model.config.vocab_size
        self.created = int(time.time())

    async def complete(self, asked: Completion, request: Request) -> Response:
        """/v1/completions."""
        self.check_name(asked.model)
        prompts = await run_in_threadpool(lambda: [self.ids(prompt) for prompt in asked.prompts])
        if len(prompts) * asked.choices > 128:
            raise Refused(400, "prompts times n may be 128", "n")
        most = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
        echoed = [""] * len(prompts)
        if asked.echo:
            echoed = [given if isinstance(given, str) else self.decode(given) for given in asked.prompts]
        return await self._answer(asked, prompts, most, echoed, bool(asked.echo), request)

    async def chat(self, asked: Chat, request: Request) -> Response:
        """/v1/chat/completions."""
        self.check_name(asked.model)
        extra = asked.chat_template_kwargs.model_dump(exclude_none=True) if asked.chat_template_kwargs else {}
        prompt = await run_in_threadpool(self.chat_ids, asked.messages, **extra)
        most = asked.max_completion_tokens or asked.max_tokens or self.context
        return await self._answer(asked, [prompt], most, [""], False, request)

    async def _answer(
        self,
        asked: Completion | Chat,
        prompts: Sequence[Sequence[int]],
        most: int,
        echoed: Sequence[str],
        echo: bool,
        request: Request,
    ) -> Response:
        if asked.logit_bias and max(map(int, asked.logit_bias)) >= self.vocabulary:
            raise Refused(400, f"logit_bias: this model has token ids below {self.vocabulary:,}", "logit_bias")
        jobs = [self.job(asked, prompt, most, echo, i) for prompt in prompts for i in range(asked.choices)]
        answer = Answer(self.name, isinstance(asked, Chat), self.words, prompts, asked.choices)
        echoed = [text for text in echoed for _ in range(asked.choices)]
        ticket = self.desk.take(jobs)
        ticket.watch = asyncio.ensure_future(until_gone(request, ticket))
        if asked.stream:
            events = self._events(ticket, answer, asked, echoed)
            return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)
        try:
            async for place, piece in ticket.pieces():
                answer.hear(place, piece)
            return JSONResponse(answer.whole(echoed, asked.scored is not None))
        finally:
            ticket.close()

    async def _events(
        self, ticket: Ticket, answer: Answer, asked: Completion | Chat, echoed: Sequence[str]
    ) -> AsyncIterator[str]:
        """Server-sent events; whoever stops reading closes the ticket."""
        scored = asked.scored is not None
        try:
            for place, text in enumerate(echoed):
                if answer.chat:
                    yield answer.chunk(place, {"role": "assistant", "content": ""})
                elif text:
                    yield answer.chunk(place, text)
            async for place, piece in ticket.pieces():
                answer.hear(place, piece)
                for each in answer.events(place, piece, scored):
                    yield each
            if asked.with_usage:
                yield answer.usage_chunk()
            yield DONE
        except Refused as refused:
            yield event(refused.body())
            yield DONE
        finally:
            ticket.close()

    def job(self, asked: Completion | Chat, prompt: Sequence[int], most: int, echo: bool, choice: int) -> Job:
        """One choice. Raises Refused for a prompt that leaves no room."""
        room = self.context - len(prompt)
        if room < (most > 0):
            raise Refused(
                400,
                f"this model's maximum context length is {self.context:,} tokens, and the prompt has {len(prompt):,}; "
                "shorten it, so that there is room for an answer",
                "messages" if isinstance(asked, Chat) else "prompt",
                "context_length_exceeded",
            )
        end = None if asked.ignore_eos else self.tokenizer.eos_id
        choose, seed = asked.sampling(len(prompt)), asked.seed_of(choice)
        request = engine.Request(prompt, choose, min(most, room), end, seed, asked.scored, echo)
        return Job(request, asked.stops)

    def ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        """Token ids of a prompt; an empty one begins a document."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        if max(prompt) >= self.vocabulary:
            raise Refused(400, f"prompt: this model has token ids below {self.vocabulary:,}", "prompt")
        return prompt

    def chat_ids(self, messages: Sequence[Message], **extra: Any) -> list[int]:
        """Token ids of a conversation. Raises Refused in the template's words."""
        try:
            return self.tokenizer.chat([message.plain() for message in messages], **extra)
        except (SettingError, InvalidFile) as error:
            raise Refused(400, str(error), "messages") from None

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise Refused(404, f"there is no model {name[:100]!r} here, but {self.name!r}", "model", "model_not_found")

    def card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "smolforge"}
        return {**card, "max_model_len": self.context}


async def until_gone(request: Request, ticket: Ticket) -> None:
    """Close the ticket when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.tell(Refused(499, "the client has gone"))
    ticket.close()


def application(service: Service, metrics: Metrics, rules: Rules, cors_origins: Sequence[str] = ()) -> ASGIApp:
    """The whole server as an ASGI application. Its desk's thread is the caller's to start and to drain."""
    app = FastAPI(title="smolforge", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    openai_routes(app, service)
    token_routes(app, service)
    operator_routes(app, service, metrics)
    page_routes(app)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(InvalidFile)
    async def not_encodable(request: Request, error: InvalidFile) -> Response:
        return Refused(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        said = {404: "there is no such route", 405: "this route does not take this method"}
        return Refused(error.status_code, said.get(error.status_code, str(error.detail))).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return Broken().response()

    guarded: ASGIApp = Guard(app, rules, metrics)
    if cors_origins:
        guarded = CORSMiddleware(guarded, cors_origins, allow_methods=["*"], allow_headers=["*"])
    return guarded


def openai_routes(app: FastAPI, service: Service) -> None:
    """What OpenAI's clients call."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The same, by its name."""
        service.check_name(model)
        return service.card()

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: Completion, request: Request) -> Response:
        """Continue prompts."""
        return await service.complete(asked, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: Chat, request: Request) -> Response:
        """Answer a conversation."""
        return await service.chat(asked, request)


def token_routes(app: FastAPI, service: Service) -> None:
    """The tokenizer, as vLLM's clients and lm-evaluation-harness ask for it."""

    @app.post("/tokenize")
    def tokenize(asked: Tokenize) -> dict[str, Any]:
        """Token ids of a text, in which special tokens are plain text unless one is the whole of it, or of messages."""
        service.check_name(asked.model)
        if asked.messages is not None:
            opened = asked.add_generation_prompt is not False
            ids = service.chat_ids(asked.messages, add_generation_prompt=opened)
        elif asked.prompt in service.tokenizer.special.known:  # how lm-evaluation-harness asks for the id of one
            ids = service.tokenizer.encode_with_special_tokens(asked.prompt)
        else:
            ids = service.tokenizer.encode(asked.prompt or "")
        return {"tokens": ids, "count": len(ids), "max_model_len": service.context}

    @app.post("/detokenize")
    def detokenize(asked: Detokenize) -> dict[str, str]:
        """Text of token ids."""
        service.check_name(asked.model)
        return {"prompt": service.decode(asked.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Its special tokens and template, as lm-evaluation-harness asks for them."""
        own = service.tokenizer
        named = {name: own.named(name) for name in ("bos_token", "pad_token")}
        template = None if own.template is None else own.template.source
        return {**named, "eos_token": own.eos_token, "chat_template": template}


def operator_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """What those who run a server ask of it."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives. Needs no key."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether a request would be taken now."""
        if service.desk.draining or not service.desk.thread.is_alive():
            raise Refused(503, "the server is not ready", code="not_ready", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def measured() -> Response:
        """Prometheus' text."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def page_routes(app: FastAPI) -> None:
    """The page's files, which are no part of the interface."""
    for route in web.FILES:
        app.get(route, include_in_schema=False)(partial(web.respond, route))
