"""Start, run and stop the server: sockets, signals, and a shutdown that lets requests finish."""

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn

from smolforge.errors import MissingResourceError
from smolforge.generation.engine import Engine
from smolforge.generation.stream import TextEngine, require_tokenizer
from smolforge.models.decoder import LanguageModel
from smolforge.server.api import Service, create_app
from smolforge.server.engine_thread import EngineThread
from smolforge.server.middleware import AccessRules, Metrics

log = logging.getLogger("smolforge.server")
DRAIN_SECONDS = 30.0
IDLE_SECONDS = 30
"""How long a connection may stay open without a request."""


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen, and how many requests at a time."""

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    context: int = 2048
    queue: int = 64
    cors_origins: tuple[str, ...] = ()
    parse_special: bool = False


def build_server(
    model: LanguageModel, name: str, server_config: ServerConfig, *, rules: AccessRules
) -> tuple[uvicorn.Server, EngineThread]:
    """Return an HTTP server of a model, and its engine thread, neither of them started."""
    metrics, tokenizer = Metrics(name), require_tokenizer(model)
    text_engine = TextEngine(Engine(model, server_config.slots, server_config.context), tokenizer)
    engine_thread = EngineThread(text_engine, metrics, server_config.queue)
    service = Service(name, tokenizer, engine_thread, parse_special=server_config.parse_special)
    app = create_app(service, metrics, rules, cors_origins=server_config.cors_origins)
    config = uvicorn.Config(
        app,
        host=server_config.host,
        port=server_config.port,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config), engine_thread


def serve(server: uvicorn.Server, engine_thread: EngineThread, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish running requests; a second signal ends at once.

    `ready` is called when the server accepts requests. Raises MissingResourceError where the port is in use.
    """
    thread = threading.Thread(target=_run_server, args=(server,), name="http", daemon=True)
    received_signals: list[int] = []  # an Event's lock may be held by this very thread when the signal comes
    previous_handlers = _set_signal_handlers(lambda number, _: received_signals.append(number))
    engine_thread.thread.start()
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.02)
        if not server.started:
            address = f"{server.config.host}:{server.config.port}"
            raise MissingResourceError(f"{address} cannot be listened on; is it in use? --port takes another")
        ready()
        while not received_signals and thread.is_alive():
            thread.join(0.2)
        _set_signal_handlers(signal.default_int_handler)
        engine_thread.drain(DRAIN_SECONDS)
    finally:
        engine_thread.drain(0.0)
        server.should_exit = True
        thread.join()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _run_server(server: uvicorn.Server) -> None:
    try:
        server.run()
    except SystemExit:  # how uvicorn says that it could not bind
        log.debug("the server did not start")


def _set_signal_handlers(handler: Callable[..., object]) -> dict[int, Any]:
    """Set handlers where Python allows it, and return the previous ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
