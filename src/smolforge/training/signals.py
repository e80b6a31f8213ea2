"""Signals that stop a run: a flag that the loop checks between steps, and nothing else.

Nothing is written in a handler, so no save is ever cut in the middle of a backward pass.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from smolforge.errors import Stopped
from smolforge.operating_system import SCHEDULER_SIGNALS

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, **dict.fromkeys(SCHEDULER_SIGNALS, 75)}


class StopRequest:
    """The signal that asked the run to stop, once there is one."""

    received: signal.Signals | None = None
    stepping = False
    """While it is true, an end has to wait for the step; before, there is nothing to wait for."""

    def is_set(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handle signals by setting the flag; a second SIGINT stops at once, as it does without us.

    Raises Stopped for a signal before the first step.
    """
    stop = StopRequest()

    def ask(number: int, frame: object) -> None:
        first = stop.received is None
        stop.received = stop.received or signal.Signals(number)
        if (first and not stop.stepping) or (not first and number == signal.SIGINT):
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    before = {number: signal.signal(number, ask) for number in EXIT_CODES} if main else {}
    try:
        yield stop
    except KeyboardInterrupt:
        if stop.received is None or stop.stepping:
            raise
        message = f"stopped by {stop.received.name} before the first step; the same command begins again, or goes on"
        raise Stopped(message, EXIT_CODES[stop.received]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
