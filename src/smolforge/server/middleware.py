"""Check, count and log every request before it reaches a route: host, key, size, request id.

The log has method and route, and nothing that a client wrote: no prompt, no key, no path that could forge a line.
Metrics have vLLM's names, so dashboards made for it work: https://docs.vllm.ai/en/latest/usage/metrics/.
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolforge import __version__
from smolforge.server import web
from smolforge.server.responses import APIError, InternalServerError

log = logging.getLogger("smolforge.server")
PUBLIC_ROUTES = ("/health", *web.FILES)
"""Routes that need no key: the health check, and the page, which asks for one."""
BODY_TIMEOUT_SECONDS = 30.0
LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LOCAL_HOST = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class AccessRules:
    """What a request has to satisfy. `local_only` refuses hosts that DNS rebinding would send."""

    key: str | None = None
    max_body_bytes: int = 2 << 20
    local_only: bool = True


class Metrics:
    """One Prometheus registry per server, so that two in one process do not mix."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def metric(metric_class: type, name: str, description: str, **kwargs: object):
            return metric_class(f"vllm:{name}", description, ["model_name"], registry=self.registry, **kwargs).labels(
                model_name=model
            )

        self.running = metric(Gauge, "num_requests_running", "Sequences in the cache.")
        self.waiting = metric(Gauge, "num_requests_waiting", "Sequences without a slot yet.")
        self.kv_cache_usage = metric(
            Gauge, "kv_cache_usage_perc", "Tokens in the cache, of those it has room for; 1 is full."
        )
        latency = partial(metric, Histogram, buckets=LATENCY_BUCKETS)
        self.time_to_first_token = latency("time_to_first_token_seconds", "To the first token.")
        self.inter_token_latency = latency("inter_token_latency_seconds", "To the next token.")
        self.e2e_latency = latency("e2e_request_latency_seconds", "To the last token.")
        self.prompt_tokens = metric(Counter, "prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = metric(Counter, "generation_tokens", "Tokens of answers.")
        success = Counter(
            "vllm:request_success", "Sequences that ended.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.request_success = {reason: success.labels(model, reason) for reason in ("stop", "length", "abort")}
        self.http_requests = Counter("http_requests", "Requests.", ["route", "code"], registry=self.registry)
        Info("build", "What runs.", registry=self.registry).info({"version": __version__})


class RequestGuard:
    """The outermost ASGI application: checks, numbers, counts and logs requests, and answers every error."""

    def __init__(self, app: ASGIApp, rules: AccessRules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, request_id = time.perf_counter(), 0, self._request_id(scope)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._check_and_forward(scope, receive, send_with_id)
        except APIError as error:
            if not status:
                await error.response()(scope, receive, send_with_id)
        except Exception:
            log.exception("a request failed")
            if not status:
                await InternalServerError().response()(scope, receive, send_with_id)
        finally:
            route = route_of(scope)
            self.metrics.http_requests.labels(route, str(status or 499)).inc()
            seconds = time.perf_counter() - start
            log.info("%s %s %d %.3fs %s", known_method(scope), route, status or 499, seconds, request_id.decode())

    async def _check_and_forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if self.rules.local_only and not _LOCAL_HOST.fullmatch(re.sub(r":\d+$", "", host)):
            raise APIError(403, "this server answers to localhost only; --host says where else", code="wrong_host")
        if self.rules.key is not None and scope["path"] not in PUBLIC_ROUTES:
            check_key(headers, self.rules.key)
        if scope["method"] == "POST" and not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            raise APIError(415, "the body should be JSON; send the header Content-Type: application/json")
        await self.app(scope, replay_body(await self._read_body(headers, receive), receive), send)

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Read the body up to the size and time limits; its stated length may be missing or wrong."""
        content_length = headers.get(b"content-length", b"0")[:20]
        if content_length.isdigit() and int(content_length) > self.rules.max_body_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise APIError(499, "the client has gone")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.rules.max_body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise APIError(408, f"the body did not come within {BODY_TIMEOUT_SECONDS:.0f} seconds") from None
        return bytes(body)

    def _too_large(self) -> APIError:
        return APIError(413, f"a body may have {self.rules.max_body_bytes:,} bytes", code="body_too_large")

    def _request_id(self, scope: Scope) -> bytes:
        """Return the client's own request id where it is safe to log, else a new one."""
        request_id = dict(scope["headers"]).get(b"x-request-id", b"")
        return request_id if _REQUEST_ID.fullmatch(request_id) else f"req-{uuid.uuid4().hex}".encode()


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that sends the body, which was read already, once more, and then what follows it."""
    messages: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        return next(messages, None) or await receive()

    return again


def check_key(headers: dict[bytes, bytes], key: str) -> None:
    """Check the API key, in the same time for each wrong one. Raises APIError."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    client_key = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    if not hmac.compare_digest(client_key, key.encode()):
        message = "this server wants its key: Authorization: Bearer KEY"
        raise APIError(401, message, code="invalid_api_key")


def route_of(scope: Scope) -> str:
    """Return the route's own path, "unknown" where there is none."""
    return scope["route"].path if "route" in scope else "unknown"


def known_method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH") else "?"
