"""Where the time of a run's last start went, from the lines of metrics.jsonl that are its own.

Lines of other starts were written on other machines perhaps, and lines of old runs lack keys: what is not there is not
counted, and nothing here raises for it.

What happens between the steps of a run, and how long each kind of it takes.

What comes every so many steps may come together, so costs are told apart step by step: the usual pause is that after
steps with nothing due; a kind that comes alone costs what its pauses are longer; of kinds that come together, those
not known yet share the rest, and where two always come together they are one.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from smolforge.config import Recipe
from smolforge.training.step_timer import Part

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


class Kind(NamedTuple):
    """What may be due after a step."""

    says: str
    setting: str
    """How often it comes."""


KINDS = {
    "measured": Kind("measuring on held-out text", "train.evaluate_every"),
    "sampled": Kind("sampling text", "train.sample_every"),
    "saved": Kind("saving checkpoints", "train.checkpoint_every"),
    "normed": Kind("the norms of the weights", "report.norms_every"),
    "watched": Kind("watching gradients and weights", "report.watch_every"),
}


class Cost(NamedTuple):
    """Of kinds that come together: how often, and how long each time."""

    kinds: frozenset[str]
    times: int
    seconds: float


def due(record: Record, recipe: Recipe) -> frozenset[str]:
    """What was done after the step of a line."""
    step = int(number(record, "step") or 0)

    def in_turn(every: int | None) -> bool:
        return every is not None and step > 0 and step % every == 0

    found = {
        "measured": any(key.startswith("validation_") for key in record),
        "sampled": in_turn(recipe.train.sample_every),
        "saved": in_turn(recipe.train.checkpoint_every),
        "normed": "weight_norm" in record,
        "watched": recipe.report.watch is not None and in_turn(recipe.report.watch_every),
    }
    return frozenset(kind for kind, was_done in found.items() if was_done)


def costs(steps: Sequence[Step], recipe: Recipe) -> list[Cost]:
    """What each kind took; that of no kind is what every step has."""
    pauses: dict[frozenset[str], list[float]] = defaultdict(list)
    for step in steps:
        pauses[due(step.before or {}, recipe)].append(step.between)
    idle = frozenset[str]()
    usual = statistics.median(pauses.get(idle, [0.0]))
    found = {idle: usual}
    for kinds in sorted(pauses, key=lambda kinds: (len(kinds), sorted(kinds))):
        known = [each for each in found if each <= kinds]
        new = kinds.difference(*known)
        if new:
            found[new] = max(0.0, statistics.fmean(pauses[kinds]) - sum(found[each] for each in known))
    return [
        Cost(kinds, sum(len(all_) for each, all_ in pauses.items() if kinds <= each), s) for kinds, s in found.items()
    ]
