"""A server from its first to its last request: sockets, signals, and an end that lets answers finish."""

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from smolforge.errors import MissingResource
from smolforge.generation.engine import Engine
from smolforge.generation.stream import Writer, own
from smolforge.models.decoder import LanguageModel
from smolforge.server.api import Service, application
from smolforge.server.engine_thread import Desk
from smolforge.server.middleware import Metrics, Rules

log = logging.getLogger("smolforge.server")
DRAIN_SECONDS = 30.0
IDLE_SECONDS = 30
"""How long a connection may stay open without a request."""


@dataclass(frozen=True)
class Place:
    """Where to listen, and how much at a time."""

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    context: int = 2048
    queue: int = 64
    cors_origins: tuple[str, ...] = ()


def made(model: LanguageModel, name: str, place: Place, rules: Rules) -> tuple[uvicorn.Server, Desk]:
    """A server of a model, and its desk, neither of them started."""
    metrics = Metrics(name)
    desk = Desk(Writer(Engine(model, place.slots, place.context), own(model)), metrics, place.queue)
    app = application(Service(name, own(model), desk), metrics, rules, place.cors_origins)
    config = uvicorn.Config(
        app,
        host=place.host,
        port=place.port,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config), desk


def serve(server: uvicorn.Server, desk: Desk, ready: Callable[[], None]) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what is under way; a second one ends at once.

    `ready` is called when requests are taken. Raises MissingResource where the port is not to be had.
    """
    thread = threading.Thread(target=_run, args=(server,), name="http", daemon=True)
    asked: list[int] = []  # an Event's lock may be held by this very thread when the signal comes
    before = _signals([signal.SIGTERM, signal.SIGINT], lambda number, _: asked.append(number))
    desk.thread.start()
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.02)
        if not server.started:
            where = f"{server.config.host}:{server.config.port}"
            raise MissingResource(f"{where} cannot be listened on; is it in use? --port takes another")
        ready()
        while not asked and thread.is_alive():
            thread.join(0.2)
        _signals([signal.SIGTERM, signal.SIGINT], _end_now)
        desk.drain(DRAIN_SECONDS)
    finally:
        desk.drain(0.0)
        server.should_exit = True
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(server: uvicorn.Server) -> None:
    try:
        server.run()
    except SystemExit:  # how uvicorn says that it could not bind
        log.debug("the server did not start")


def _signals(numbers: Sequence[int], handler: Callable[..., object]) -> dict[int, Any]:
    """Set handlers, where Python lets us; returns those that were."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def _end_now(*_: object) -> None:
    raise KeyboardInterrupt
