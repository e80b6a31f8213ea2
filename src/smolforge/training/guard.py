"""What happens when metrics go wrong: skip an update, rewind the run, end it.

    loss or gradient not finite -> the update is skipped           (incident "skip")
    several in a row, or a loss spike -> back to the latest valid checkpoint, then on with the data
                                         after the bad batches     (incident "rewind")
    too many of those -> the run ends                              (incident "stop")

A decision is written to disk before it is carried out, and a resumed run decides the same: it reads the incidents, and
in each checkpoint the losses that a spike is measured against. Zhang et al. 2022 (OPT,
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
from smolforge.errors import InvalidFileError

WINDOW = 128
"""Losses a spike is measured against."""
FEWEST = 64
"""Losses without which nothing is called a spike."""
SMALLEST_SPIKE = 0.5
"""In nats: a loss this little above the others is none, however close together they are."""

Incident = dict[str, Any]


class Rewind(Exception):  # noqa: N818 (control flow, as KeyboardInterrupt is)
    """Training should go back to before the `first` bad step, and skip the data up to that of `step`."""

    def __init__(self, step: int, reason: str, first: int) -> None:
        super().__init__(reason)
        self.step, self.reason, self.first = step, reason, first


@dataclass(frozen=True)
class Decisions:
    """What the incidents of a run add up to."""

    skipped: dict[int, str]
    """Step to reason, of updates left out."""
    jumps: tuple[tuple[int, int], ...]
    """(steps done, next batch), in order: where a rewind made the data go on elsewhere."""
    rewinds: int
    repeated_steps: int
    """Steps that rewinds took back, to be done again."""

    def next_batch(self, completed: int) -> int:
        """Return the number, from 0, of the batch that follows `completed` steps."""
        step, batch = max((jump for jump in self.jumps if jump[0] <= completed), default=(0, 0))
        return batch + completed - step

    def consecutive_skips(self, completed: int) -> int:
        """Return the number of skipped updates just before this step."""
        count = 0
        while completed - count in self.skipped:
            count += 1
        return count


def fold_incidents(incidents: Sequence[Incident]) -> Decisions:
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
                raise InvalidFileError(f"an incident of the run is {kind!r}, which this version does not know")
    return Decisions(skipped, tuple(sorted(jumps.items())), rewinds, again)


class LossGuard:
    """Judges the metrics of each step. Its verdict is what the device did: see `training.loop.skip_update_flag`."""

    def __init__(
        self,
        settings: Guard,
        decisions: Decisions,
        completed: int,
        *,
        recent: Iterable[float],
        record: Callable[[Incident], None],
    ) -> None:
        """Start after `completed` steps; `recent` are the losses before, `record` writes an incident to disk."""
        self.settings, self.decisions, self.record = settings, decisions, record
        self.consecutive_skips = decisions.consecutive_skips(completed)
        self.recent = deque(recent, WINDOW)

    @property
    def enabled(self) -> bool:
        """Whether to skip an update whose loss or gradient is not finite."""
        return self.settings.enabled

    def was_skipped(self, step: int) -> bool:
        """Whether the update of this step was skipped before."""
        return step in self.decisions.skipped

    def __call__(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return why the update of a step was skipped, or None. Raises Rewind."""
        reason = self.decisions.skipped.get(step)
        if reason is None and self.settings.enabled:
            reason = not_finite(loss, grad_norm)
            if reason is not None:
                self.record({"kind": "skip", "step": step, "reason": reason})
            elif (spike := self.spike(loss)) is not None:
                raise Rewind(step, spike, first=step - self.consecutive_skips)
        if reason is None:
            self.consecutive_skips = 0
            if math.isfinite(loss):
                self.recent.append(loss)
            return None
        self.consecutive_skips += 1
        if self.settings.enabled and self.consecutive_skips >= self.settings.skips_before_rewind:
            message = f"{reason}, and {self.consecutive_skips} updates in a row had to be left out"
            raise Rewind(step, message, first=step - self.consecutive_skips + 1)
        return reason

    def spike(self, loss: float) -> str | None:
        """Return how a loss stands out from the recent ones, if it does."""
        if self.settings.spike is None or len(self.recent) < FEWEST:
            return None
        mean, deviation = float(np.mean(self.recent)), float(np.std(self.recent))
        if loss <= mean + max(self.settings.spike * deviation, SMALLEST_SPIKE):
            return None
        usual = f"the last {len(self.recent)} were {mean:.4g} with a deviation of {deviation:.2g}"
        return f"the loss is {loss:.4g}, where {usual}"


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Return which of the two is NaN or infinite, if one is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if math.isfinite(grad_norm) else f"the norm of the gradient is {grad_norm}"
