"""What happens between the steps of a run, and how long each kind of it takes.

What comes every so many steps may come together, so costs are told apart step by step: the usual pause is that after
steps with nothing due; a kind that comes alone costs what its pauses are longer; of kinds that come together, those
not known yet share the rest, and where two always come together they are one.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from smolforge.comparison.evidence import Record, Step, number
from smolforge.config import Recipe


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
