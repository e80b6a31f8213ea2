"""What every request passes before it reaches a route: host, key, size, and a line in the log behind it.

Nothing that a client wrote is logged but method and route: no prompt, no key, no path that could forge a line.

What is measured, under vLLM's names, so that dashboards made for it work: https://docs.vllm.ai/en/latest/usage/metrics/.
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolforge import __version__
from smolforge.server import web
from smolforge.server.responses import Broken, Refused

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One registry for each server, so that two in one process do not mix."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def measured(kind: type, name: str, said: str, **given: object):
            return kind(f"vllm:{name}", said, ["model_name"], registry=self.registry, **given).labels(model_name=model)

        self.running = measured(Gauge, "num_requests_running", "Sequences in the cache.")
        self.waiting = measured(Gauge, "num_requests_waiting", "Sequences without a slot yet.")
        self.cache = measured(Gauge, "kv_cache_usage_perc", "Tokens in the cache, of those it has room for; 1 is full.")
        self.first_token = measured(Histogram, "time_to_first_token_seconds", "To the first token.", buckets=SECONDS)
        self.between_tokens = measured(Histogram, "inter_token_latency_seconds", "To the next token.", buckets=SECONDS)
        self.whole = measured(Histogram, "e2e_request_latency_seconds", "To the last token.", buckets=SECONDS)
        self.prompt = measured(Counter, "prompt_tokens", "Tokens of prompts.")
        self.generated = measured(Counter, "generation_tokens", "Tokens of answers.")
        ended = Counter(
            "vllm:request_success", "Sequences that ended.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.finished = {why: ended.labels(model, why) for why in ("stop", "length", "abort")}
        self.requests = Counter("http_requests", "Requests.", ["route", "code"], registry=self.registry)
        Info("build", "What runs.", registry=self.registry).info({"version": __version__})


log = logging.getLogger("smolforge.server")
PUBLIC = ("/health", *web.FILES)
"""Routes that need no key: the sign of life, and the page, which asks for one."""
BODY_SECONDS = 30.0
LOCAL_NAME = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Rules:
    """What a client has to keep to. `local_only` refuses hosts that a rebound name would have."""

    key: str | None = None
    body_bytes: int = 2 << 20
    local_only: bool = True


class Guard:
    """The outermost application: refuses, numbers, counts and logs, and lets no error out without an answer."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, number = time.perf_counter(), 0, self._number(scope)

        async def send_numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number)]
            await send(message)

        try:
            await self._checked(scope, receive, send_numbered)
        except Refused as refused:
            if not status:
                await refused.response()(scope, receive, send_numbered)
        except Exception:
            log.exception("a request failed")
            if not status:
                await Broken().response()(scope, receive, send_numbered)
        finally:
            route = route_of(scope)
            self.metrics.requests.labels(route, str(status or 499)).inc()
            seconds = time.perf_counter() - begun
            log.info("%s %s %d %.3fs %s", known_method(scope), route, status or 499, seconds, number.decode())

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if self.rules.local_only and not LOCAL_NAME.fullmatch(re.sub(r":\d+$", "", host)):
            raise Refused(403, "this server answers to localhost only; --host says where else", code="wrong_host")
        if self.rules.key is not None and scope["path"] not in PUBLIC:
            check_key(headers, self.rules.key)
        if scope["method"] == "POST" and not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            raise Refused(415, "the body should be JSON; send the header Content-Type: application/json")
        await self.app(scope, replayed(await self._body(headers, receive), receive), send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """All of it, as long as it is not too much and does not take for ever; its length may be missing, or a lie."""
        said = headers.get(b"content-length", b"0")[:20]
        if said.isdigit() and int(said) > self.rules.body_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(499, "the client has gone")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.rules.body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise Refused(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
        return bytes(body)

    def _too_large(self) -> Refused:
        return Refused(413, f"a body may have {self.rules.body_bytes:,} bytes", code="body_too_large")

    def _number(self, scope: Scope) -> bytes:
        """The client's own number of the request, where it is one that a log can take."""
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}".encode()


def replayed(body: bytes, receive: Receive) -> Receive:
    """What was received, once more, and then what follows it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def check_key(headers: dict[bytes, bytes], key: str) -> None:
    """Raises Refused, in the same time for each wrong key."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    if not hmac.compare_digest(given, key.encode()):
        said = "this server wants its key: Authorization: Bearer KEY"
        raise Refused(401, said, code="invalid_api_key")


def route_of(scope: Scope) -> str:
    """The route's own path, and one word for all that are none."""
    return scope["route"].path if "route" in scope else "unknown"


def known_method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH") else "?"
