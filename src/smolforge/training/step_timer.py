"""The speed of training: tokens/s, MFU, the time of each phase of a step, the time left.

    with timer.step():
        with timer.phase("data"): ...        wait for the batch
        with timer.phase("forward"): ...     as often as there are micro-batches
        ...
    figures = timer.read()                   of the oldest step not read yet

A step is a list of timestamps on the timeline of its work: the clock of a CPU, the stream of a GPU. A timestamp costs a
microsecond and is read only with its step, so nothing inside a step waits.
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

Phase = Literal["data", "forward", "backward", "optimizer", "other"]
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
    """Return the clock of a device."""
    return StreamClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class StepCost:
    """What a step computes, and the peak of the devices that share it."""

    tokens: int
    """Of a step, over all devices."""
    flops_per_token: int
    """Causal attention counted as half."""
    flops_per_token_full_attention: int
    peak_flops_per_second: float
    """Of one device."""
    devices: int = 1

    def rates(self, seconds: float) -> dict[str, float]:
        """Return tokens per second of a step of this duration, and model FLOPs utilization in both conventions.

        PaLM, https://arxiv.org/abs/2204.02311, appendix B.
        """
        rate = self.tokens / seconds
        peak = self.peak_flops_per_second * self.devices
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / peak,
            "mfu_full_attention": rate * self.flops_per_token_full_attention / peak,
        }


class StepTimer:
    """Times the `steps` remaining steps of one start of a run.

    `annotate` is entered with each phase's name: torch.profiler.record_function shows phases in a trace.
    """

    def __init__(
        self,
        cost: StepCost,
        steps: int,
        clock: Clock,
        *,
        annotate: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        self.cost, self.steps, self.clock, self.annotate = cost, steps, clock, annotate
        self._marks: list[tuple[Phase, Any]] = []
        self._unread: deque[list[tuple[Phase, Any]]] = deque()
        self._end: Any = None
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._read, self._between = 0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step; what happens in none of its phases is `other`."""
        self._marks = []
        self._mark("other")
        yield
        self._mark("other")
        self._unread.append(self._marks)
        self._marks = []

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a phase of the step, as often as it comes; one inside another is subtracted from that other."""
        assert self._marks, "a part belongs to a step"
        outside = self._marks[-1][0]
        self._mark(name)
        with self.annotate(name):
            yield
        self._mark(outside)

    def _mark(self, name: Phase) -> None:
        self._marks.append((name, self.clock.mark()))

    def read(self) -> dict[str, float]:
        """Return the figures of the oldest step not read yet, once the device has finished it.

        `seconds_between` is the time since the step before outside all phases: validating, sampling, saving. Running
        figures leave out the first step, which compiles and allocates.
        """
        marks = self._unread.popleft()
        phases = dict.fromkeys(get_args(Phase), 0.0)
        for (name, start), (_, end) in pairwise(marks):
            phases[name] += self.clock.seconds(start, end)
        step_seconds, between = sum(phases.values()), 0.0
        if self._read:
            self._recent.append(step_seconds)
            between = self.clock.seconds(self._end, marks[0][1])
        self._read, self._end, self._between = self._read + 1, marks[-1][1], self._between + between
        figures = self.cost.rates(step_seconds) | {f"seconds_{name}": seconds for name, seconds in phases.items()}
        figures["seconds_between"] = between
        return figures | self._running() if self._recent else figures

    def _running(self) -> dict[str, float]:
        """Return medians of recent steps and the time left; what happens between steps counts by its mean."""
        typical = statistics.median(self._recent)
        between = self._between / (self._read - 1)
        return {
            "tokens_per_second_median": self.cost.tokens / typical,
            "seconds_left": (self.steps - self._read) * (typical + between),
        }
