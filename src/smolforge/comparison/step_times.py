"""Compute where the time of a run's last start went, from its own lines of metrics.jsonl.

Lines of other starts may come from other machines, so they do not count. Old runs lack keys: a missing key is skipped,
and nothing here raises for it.

Pauses between steps are split by kind: measuring, sampling, saving and so on. Kinds with different intervals may be due
after the same step, so they are told apart step by step:

    base pause                  median pause after steps with nothing due
    a kind that comes alone     its mean pause minus the base pause
    kinds that come together    those not known yet share the remainder; two that always come together count as one
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

from smolforge.comparison.history import Record, finite_number
from smolforge.config import Recipe
from smolforge.training.step_timer import Phase

PHASES = get_args(Phase)
BETWEEN = "between"


class Step(NamedTuple):
    """One step with its times, and the line before its own: what happened after that is what it came after."""

    before: Record
    phase_seconds: dict[str, float]
    """Seconds by part; 0 where it does not say."""
    between: float
    """Seconds since the step before ended; 0 where old runs do not say."""

    @property
    def seconds(self) -> float:
        """Of the step itself."""
        return sum(self.phase_seconds.values())


def records_of_start(records: Sequence[Record], start: Record) -> list[Record]:
    """The lines written since a start; all where it has none."""
    start_step = finite_number(start, "step") or 0
    return [record for record in records if (finite_number(record, "step") or 0) > start_step] or list(records)


def timed_steps(records: Sequence[Record]) -> list[Step]:
    """Those that say how long they took."""
    steps = []
    for before, record in zip([{}, *records], records, strict=False):
        phase_seconds = {phase: max(0.0, finite_number(record, f"seconds_{phase}") or 0.0) for phase in PHASES}
        between = max(0.0, finite_number(record, "seconds_between") or 0.0)
        if sum(phase_seconds.values()) > 0:
            steps.append(Step(before, phase_seconds, between))
    return steps


def phase_shares(steps: Sequence[Step]) -> dict[str, float]:
    """What each part takes of all their time, and what passes between them; empty without steps."""
    total = sum(step.seconds + step.between for step in steps)
    if not total:
        return {}
    shares = {phase: sum(step.phase_seconds[phase] for step in steps) / total for phase in PHASES}
    return shares | {BETWEEN: sum(step.between for step in steps) / total}


def time_shares(records: Sequence[Record], start: Record) -> dict[str, float]:
    """`shares` of a run's last start, its first step aside, which compiles and allocates."""
    return phase_shares(timed_steps(records_of_start(records, start))[1:])


@dataclass(frozen=True)
class RunTimings:
    """What a diagnosis is made from."""

    recipe: Recipe
    start: Record
    records: Sequence[Record]
    first_step: Step
    steps: Sequence[Step]
    """After the first."""
    shares: Mapping[str, float]
    fastest_dtype: str | None = None

    @property
    def device(self) -> str:
        return str(self.start.get("device") or "cpu")

    @property
    def ranks(self) -> int:
        return int(finite_number(self.start, "ranks") or 1)

    @property
    def step_seconds(self) -> list[float]:
        """Of each step."""
        return [step.seconds for step in self.steps]

    @property
    def total_seconds(self) -> float:
        return sum(step.seconds + step.between for step in self.steps)

    @property
    def planned_seconds(self) -> float:
        """Seconds this start takes to the last step of its recipe, its first step aside."""
        remaining = self.recipe.train.steps - int(finite_number(self.start, "step") or 0) - 1
        return self.total_seconds / len(self.steps) * max(remaining, len(self.steps))

    def median(self, key: str) -> float | None:
        """Of the lines that have such a figure."""
        values = [value for record in self.records if (value := finite_number(record, key)) is not None]
        return statistics.median(values) if values else None


class PauseKind(NamedTuple):
    """What may be due after a step."""

    description: str
    setting: str
    """How often it comes."""


PAUSE_KINDS = {
    "measured": PauseKind("measuring on held-out text", "train.evaluate_every"),
    "sampled": PauseKind("sampling text", "train.sample_every"),
    "saved": PauseKind("saving checkpoints", "train.checkpoint_every"),
    "normed": PauseKind("the norms of the weights", "report.norms_every"),
    "watched": PauseKind("watching gradients and weights", "report.watch_every"),
}


class PauseCost(NamedTuple):
    """Of kinds that come together: how often, and how long each time."""

    kinds: frozenset[str]
    count: int
    seconds: float


def kinds_due(record: Record, recipe: Recipe) -> frozenset[str]:
    """What was done after the step of a line."""
    step = int(finite_number(record, "step") or 0)

    def in_turn(interval: int | None) -> bool:
        return interval is not None and step > 0 and step % interval == 0

    is_due = {
        "measured": any(key.startswith("validation_") for key in record),
        "sampled": in_turn(recipe.train.sample_every),
        "saved": in_turn(recipe.train.checkpoint_every),
        "normed": "weight_norm" in record,
        "watched": recipe.report.watch is not None and in_turn(recipe.report.watch_every),
    }
    return frozenset(kind for kind, due in is_due.items() if due)


def pause_costs(steps: Sequence[Step], recipe: Recipe) -> list[PauseCost]:
    """What each kind took; that of no kind is what every step has."""
    pauses: dict[frozenset[str], list[float]] = defaultdict(list)
    for step in steps:
        pauses[kinds_due(step.before, recipe)].append(step.between)
    no_kinds = frozenset[str]()
    base_pause = statistics.median(pauses.get(no_kinds, [0.0]))
    mean_seconds = {no_kinds: base_pause}
    for kinds in sorted(pauses, key=lambda kinds: (len(kinds), sorted(kinds))):
        subsets = [subset for subset in mean_seconds if subset <= kinds]
        new_kinds = kinds.difference(*subsets)
        if new_kinds:
            mean_seconds[new_kinds] = max(
                0.0, statistics.fmean(pauses[kinds]) - sum(mean_seconds[subset] for subset in subsets)
            )
    return [
        PauseCost(kinds, sum(len(seconds) for subset, seconds in pauses.items() if kinds <= subset), cost_seconds)
        for kinds, cost_seconds in mean_seconds.items()
    ]
