"""Numbers that go wrong: an update left out, a run taken back, a run ended.

    loss or gradient not finite -> the update is left out          (incident "skip")
    several in a row, or a spike of the loss -> back to the last sound checkpoint, on with the data
                                                after the bad one   (incident "rewind")
    too many of those -> the run ends                               (incident "stop")

What was decided is written down before it is done, and a run that starts again decides the same: its memory is the
incidents, and in each checkpoint the losses that a spike is measured against. Zhang et al. 2022 (OPT,
https://arxiv.org/abs/2205.01068) and Chowdhery et al. 2022 (PaLM, https://arxiv.org/abs/2204.02311) describe both
remedies, by hand.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smolforge.config import Guard
from smolforge.errors import InvalidFile

WINDOW = 128
"""Losses a spike is measured against."""
FEWEST = 64
"""Losses without which nothing is called a spike."""
SMALLEST_SPIKE = 0.5
"""In nats: a loss this little above the others is none, however close together they are."""

Incident = dict[str, Any]


class Rewind(Exception):
    """Training should go back to before the `first` bad step, and leave out the data up to that of `step`."""

    def __init__(self, step: int, reason: str, first: int) -> None:
        super().__init__(reason)
        self.step, self.reason, self.first = step, reason, first


@dataclass(frozen=True)
class Decisions:
    """What the incidents of a run come to."""

    skipped: dict[int, str]
    """Step to reason, of updates left out."""
    jumps: tuple[tuple[int, int], ...]
    """(steps done, next batch), in order: where a rewind made the data go on elsewhere."""
    rewinds: int
    again: int
    """Steps that rewinds took back, to be done again."""

    def batch(self, done: int) -> int:
        """The batch, counted from 0, that follows so many finished steps."""
        step, batch = max((jump for jump in self.jumps if jump[0] <= done), default=(0, 0))
        return batch + done - step

    def in_a_row(self, done: int) -> int:
        """Updates left out just before this point."""
        count = 0
        while done - count in self.skipped:
            count += 1
        return count


def decided(incidents: Sequence[Incident]) -> Decisions:
    """Fold incidents, oldest first: a rewind undoes what was decided for the steps it takes back."""
    skipped: dict[int, str] = {}
    jumps: dict[int, int] = {}
    rewinds = again = 0
    for incident in incidents:
        match incident["kind"]:
            case "skip":
                skipped[incident["step"]] = incident["reason"]
            case "rewind":
                to = incident["to"]
                skipped = {step: reason for step, reason in skipped.items() if step <= to}
                jumps = {step: batch for step, batch in jumps.items() if step < to} | {to: incident["next_batch"]}
                rewinds, again = rewinds + 1, again + incident["step"] - to
            case "stop":
                pass
            case kind:
                raise InvalidFile(f"an incident of the run is {kind!r}, which this version does not know")
    return Decisions(skipped, tuple(sorted(jumps.items())), rewinds, again)


class Judge:
    """Looks at the numbers of each step. What it says of them is what the device did: see `training.unwanted`."""

    def __init__(
        self,
        settings: Guard,
        decisions: Decisions,
        done: int,
        recent: Iterable[float],
        record: Callable[[Incident], None],
    ) -> None:
        """`recent` is what this was when `done` steps were; `record` writes an incident down for good."""
        self.settings, self.decisions, self.record = settings, decisions, record
        self.in_a_row = decisions.in_a_row(done)
        self.recent = deque(recent, WINDOW)

    @property
    def guards(self) -> bool:
        """Whether an update is left out when its loss or gradient is not finite."""
        return self.settings.enabled

    def knows(self, step: int) -> bool:
        """Whether the update of this step was left out before."""
        return step in self.decisions.skipped

    def __call__(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the update of a step was left out, or None. Raises Rewind."""
        reason = self.decisions.skipped.get(step)
        if reason is None and self.settings.enabled:
            reason = not_finite(loss, grad_norm)
            if reason is not None:
                self.record({"kind": "skip", "step": step, "reason": reason})
            elif (spike := self.spike(loss)) is not None:
                raise Rewind(step, spike, first=step - self.in_a_row)
        if reason is None:
            self.in_a_row = 0
            if math.isfinite(loss):
                self.recent.append(loss)
            return None
        self.in_a_row += 1
        if self.settings.enabled and self.in_a_row >= self.settings.skips_before_rewind:
            said = f"{reason}, and {self.in_a_row} updates in a row had to be left out"
            raise Rewind(step, said, first=step - self.in_a_row + 1)
        return reason

    def spike(self, loss: float) -> str | None:
        """What makes a loss stand out of the latest ones, if it does."""
        if self.settings.spike is None or len(self.recent) < FEWEST:
            return None
        mean, deviation = float(np.mean(self.recent)), float(np.std(self.recent))
        if loss <= mean + max(self.settings.spike * deviation, SMALLEST_SPIKE):
            return None
        usual = f"the last {len(self.recent)} were {mean:.4g} with a deviation of {deviation:.2g}"
        return f"the loss is {loss:.4g}, where {usual}"


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Which of the two is no number, if one is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if math.isfinite(grad_norm) else f"the norm of the gradient is {grad_norm}"
