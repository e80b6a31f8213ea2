"""How fast training goes: rates against the clock and the device's peak, where a step's time goes, the time left.

    with meter.step():
        with meter.part("data"): ...         wait for the batch
        with meter.part("forward"): ...      as often as there are micro-batches
        ...
    figures = meter.read()                   of the oldest step not read yet

A step is a row of marks in the timeline in which its work happens: the clock of a CPU, the stream of a GPU. They cost
a microsecond to make and are compared only when the step is read, so that nothing inside a step waits.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch

Part = Literal["data", "forward", "backward", "optimizer", "other"]
WINDOW = 20
"""Steps a running median is of."""


@runtime_checkable
class Clock(Protocol):
    """Marks moments of the work, and says later how far apart they are."""

    def mark(self) -> Any: ...
    def seconds(self, first: Any, last: Any) -> float: ...


@dataclass(frozen=True)
class HostClock:
    """For work that is done when a call returns."""

    now: Callable[[], float] = time.perf_counter

    def mark(self) -> float:
        return self.now()

    def seconds(self, first: float, last: float) -> float:
        return last - first


@dataclass(frozen=True)
class StreamClock:
    """For work that is queued in a GPU's stream: a mark is an event among it.

    So a part takes what its work does, and where the stream ran dry, for want of data above all, the wait as well.
    """

    device: torch.device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Waits until the stream has come to `last`, and not for what was queued after it."""
        last.synchronize()
        return first.elapsed_time(last) / 1000


def clock(device: torch.device) -> Clock:
    """The timeline of a device's work."""
    return StreamClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Work:
    """What a step does, and what the devices that do it could do."""

    tokens: int
    """Of a step, over all devices."""
    flops_per_token: int
    """Causal attention counted as half."""
    flops_per_token_full_attention: int
    peak_flops_per_second: float
    """Of one device."""
    devices: int = 1

    def rates(self, seconds: float) -> dict[str, float]:
        """Tokens a second of a step that took so long, and model FLOPs utilisation in both conventions.

        PaLM, https://arxiv.org/abs/2204.02311, appendix B.
        """
        rate = self.tokens / seconds
        peak = self.peak_flops_per_second * self.devices
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / peak,
            "mfu_full_attention": rate * self.flops_per_token_full_attention / peak,
        }


class Meter:
    """Times the steps of one start of a run, of which there are `steps` to go.

    `annotate` is entered with each part's name around it: torch.profiler.record_function shows parts in a trace.
    """

    def __init__(
        self,
        work: Work,
        steps: int,
        clock: Clock,
        annotate: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        self.work, self.steps, self.clock, self.annotate = work, steps, clock, annotate
        self._marks: list[tuple[Part, Any]] = []
        self._unread: deque[list[tuple[Part, Any]]] = deque()
        self._end: Any = None
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._read, self._between = 0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; what happens in none of its parts is `other`."""
        self._marks = []
        self._mark("other")
        yield
        self._mark("other")
        self._unread.append(self._marks)
        self._marks = []

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """A part of the step, as often as it comes; one inside another is taken out of that other."""
        assert self._marks, "a part belongs to a step"
        outside = self._marks[-1][0]
        self._mark(name)
        with self.annotate(name):
            yield
        self._mark(outside)

    def _mark(self, name: Part) -> None:
        self._marks.append((name, self.clock.mark()))

    def read(self) -> dict[str, float]:
        """Figures of the oldest step not read yet, once the device has finished it.

        `seconds_between` is what passed since the step before, in none of the parts: measuring, sampling, saving.
        Running figures leave out the first step, which compiles and allocates, and are not there for it.
        """
        marks = self._unread.popleft()
        parts = dict.fromkeys(get_args(Part), 0.0)
        for (name, begin), (_, end) in pairwise(marks):
            parts[name] += self.clock.seconds(begin, end)
        whole, between = sum(parts.values()), 0.0
        if self._read:
            self._recent.append(whole)
            between = self.clock.seconds(self._end, marks[0][1])
        self._read, self._end, self._between = self._read + 1, marks[-1][1], self._between + between
        told = self.work.rates(whole) | {f"seconds_{name}": seconds for name, seconds in parts.items()}
        told["seconds_between"] = between
        return told | self._running() if self._recent else told

    def _running(self) -> dict[str, float]:
        """From the median of recent steps. The time left also has what is done between steps, evaluation and saving:
        rare and long, so by its mean since the start.
        """
        typical = statistics.median(self._recent)
        between = self._between / (self._read - 1)
        return {
            "tokens_per_second_median": self.work.tokens / typical,
            "seconds_left": (self.steps - self._read) * (typical + between),
        }
