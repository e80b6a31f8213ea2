"""Signals that ask a run to end: a flag that the loop looks at between steps, and nothing else.

Nothing is written in a handler, so no save is ever cut in the middle of a backward pass.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


class Stop:
    """The signal that asked for an end, once there was one."""

    asked_by: signal.Signals | None = None

    def asked(self) -> bool:
        return self.asked_by is not None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM set the flag; a second SIGINT ends at once, as it does without us."""
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        if stop.asked() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked_by = signal.Signals(number)

    main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    before = {number: signal.signal(number, ask) for number in EXIT_CODES} if main else {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
