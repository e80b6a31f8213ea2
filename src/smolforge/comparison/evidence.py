"""Where the time of a run's last start went, from the lines of metrics.jsonl that are its own.

Lines of other starts were written on other machines perhaps, and lines of old runs lack keys: what is not there is not
counted, and nothing here raises for it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from smolforge.config import Recipe
from smolforge.meter import Part

PARTS = get_args(Part)
BETWEEN = "between"

Record = Mapping[str, Any]


class Step(NamedTuple):
    """One step with its times, and the line before its own: what happened after that is what it came after."""

    record: Record
    before: Record | None
    parts: dict[str, float]
    """Seconds by part, those there are."""
    between: float
    """Seconds since the step before ended; 0 where old runs do not say."""

    @property
    def seconds(self) -> float:
        """Of the step itself."""
        return sum(self.parts.values())


def number(record: Record, key: str) -> float | None:
    """A finite number, if there is one."""
    value = record.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def of_start(records: Sequence[Record], start: Record) -> list[Record]:
    """The lines written since a start; all where it has none."""
    begun = number(start, "step") or 0
    return [record for record in records if (number(record, "step") or 0) > begun] or list(records)


def timed_steps(records: Sequence[Record]) -> list[Step]:
    """Those that say how long they took."""
    steps = []
    for before, record in zip([None, *records], records, strict=False):
        found = {part: number(record, f"seconds_{part}") for part in PARTS}
        parts = {part: seconds for part, seconds in found.items() if seconds is not None and seconds >= 0}
        between = max(0.0, number(record, "seconds_between") or 0.0)
        if sum(parts.values()) > 0:
            steps.append(Step(record, before, parts, between))
    return steps


def shares(steps: Sequence[Step]) -> dict[str, float]:
    """What each part takes of all their time, and what passes between them; empty without steps."""
    total = sum(step.seconds + step.between for step in steps)
    if not total:
        return {}
    found = {part: sum(step.parts.get(part, 0.0) for step in steps) / total for part in PARTS}
    return found | {BETWEEN: sum(step.between for step in steps) / total}


def time_shares(records: Sequence[Record], start: Record) -> dict[str, float]:
    """`shares` of a run's last start, its first step aside, which compiles and allocates."""
    return shares(timed_steps(of_start(records, start))[1:])


@dataclass(frozen=True)
class Evidence:
    """What a diagnosis is made from."""

    recipe: Recipe
    start: Record
    records: Sequence[Record]
    first: Step
    steps: Sequence[Step]
    """After the first."""
    shares: Mapping[str, float]
    fastest_dtype: str | None = None

    @property
    def device(self) -> str:
        return str(self.start.get("device") or "cpu")

    @property
    def ranks(self) -> int:
        return int(number(self.start, "ranks") or 1)

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [step.seconds for step in self.steps]

    @property
    def total(self) -> float:
        return sum(step.seconds + step.between for step in self.steps)

    @property
    def planned(self) -> float:
        """Seconds this start takes to the last step of its recipe, its first step aside."""
        left = self.recipe.train.steps - int(number(self.start, "step") or 0) - 1
        return self.total / len(self.steps) * max(left, len(self.steps))

    def median(self, key: str) -> float | None:
        """Of the lines that have such a figure."""
        found = [value for record in self.records if (value := number(record, key)) is not None]
        return statistics.median(found) if found else None
