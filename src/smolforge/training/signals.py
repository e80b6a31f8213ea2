"""Signals that ask a run to end: a flag that the loop looks at between steps, and nothing else.

Nothing is written in a handler, so no save is ever cut in the middle of a backward pass.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from smolforge.errors import Stopped

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGUSR2: 75}
"""SIGUSR1 and SIGUSR2 are what schedulers send before they take the machine away."""


class Stop:
    """The signal that asked for an end, once there was one."""

    asked_by: signal.Signals | None = None
    stepping = False
    """While it is true, an end has to wait for the step; before, there is nothing to wait for."""

    def asked(self) -> bool:
        return self.asked_by is not None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """The signals set the flag; once it is set, SIGINT ends at once, as it does without us.

    Raises Stopped for one that comes before the first step.
    """
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        first = stop.asked_by is None
        stop.asked_by = stop.asked_by or signal.Signals(number)
        if (first and not stop.stepping) or (not first and number == signal.SIGINT):
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    before = {number: signal.signal(number, ask) for number in EXIT_CODES} if main else {}
    try:
        yield stop
    except KeyboardInterrupt:
        if stop.asked_by is None or stop.stepping:
            raise
        said = f"stopped by {stop.asked_by.name} before the first step; the same command begins again, or goes on"
        raise Stopped(said, EXIT_CODES[stop.asked_by]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
