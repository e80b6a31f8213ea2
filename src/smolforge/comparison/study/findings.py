"""What a study found: of each variant its losses, its difference to the baseline, what it costs, in words too.

Whatever depends on how fast the machine was stands under `speed`; all else is the same however often a study was
stopped and went on.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smolforge import __version__
from smolforge.comparison.history import History
from smolforge.comparison.statistics import FEWEST, POWER, Difference, differences
from smolforge.comparison.study.plan import Plan, as_json
from smolforge.comparison.study.read import Study
from smolforge.comparison.study.trials import Outcome, best
from smolforge.recipe.plan import training_bytes
from smolforge.sizes import active_parameters, flops_per_token, kv_bytes_per_token, parameter_counts

UNITS = {"validation_loss": "nats a token", "validation_bits_per_byte": "bits a byte"}


@dataclass(frozen=True)
class Rates:
    """How a variant came to its learning rate."""

    means: dict[float, float | None]
    """The metric's mean at each factor; None where a run failed."""
    factor: float | None
    at_the_end: bool
    """Whether the best is the first or the last that was tried, so that a better one may lie beyond."""


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    changes: dict[str, Any]
    values: dict[int, float]
    """The metric by seed, of the runs that came to their end."""
    failed: dict[str, str]
    """Why each other run did not, by its name."""
    mean: float | None
    spread: float | None
    """Standard deviation over seeds."""
    difference: Difference | None
    """To the baseline; None of the baseline itself."""
    verdict: str
    rates: Rates | None
    steps: int
    cost: dict[str, int]
    """parameters, active, flops_per_token, kv_bytes_per_token, tokens, flops, predicted_memory_bytes."""
    speed: dict[str, float]
    """Means over runs: tokens_per_second, seconds."""


@dataclass(frozen=True)
class Findings:
    """All that a study found."""

    study: Study
    variants: list[Variant]
    histories: dict[str, list[History]]
    """Of the runs that came to their end, by variant."""

    @property
    def complete(self) -> bool:
        return not any(variant.failed for variant in self.variants)

    def as_json(self) -> dict[str, Any]:
        """Every number, as study.json has it."""
        return {
            "study": self.study.name,
            "version": __version__,
            "metric": self.study.settings.metric,
            "baseline": self.study.settings.baseline,
            "power": POWER,
            **{key: value for key, value in as_json(self.study).items() if key == "settings"},
            "variants": {variant.name: asdict(variant) for variant in self.variants},
            "runs": {run.name: of_run(run) for runs in self.histories.values() for run in runs},
        }


def of_run(run: History) -> dict[str, Any]:
    """What a run measured on held-out text, and when."""
    measured = [record for record in run.metrics if "validation_loss" in record]
    keys = ("step", "tokens", "validation_loss", "validation_bits_per_byte", "validation_accuracy")
    speed = {"tokens_per_second": run.tokens_per_second, "seconds": float(run.seconds[-1])}
    return {"measured": [{key: record.get(key) for key in keys} for record in measured], "speed": speed}


def findings(
    study: Study,
    plan: Plan,
    tried: Mapping[str, Mapping[float, Sequence[Outcome]]],
    judged: Mapping[str, Sequence[Outcome]],
) -> Findings:
    """Put numbers to what the runs say."""
    settings, base = study.settings, study.settings.baseline
    values = {
        name: {each.trial.seed: each.value for each in outcomes if each.value is not None}
        for name, outcomes in judged.items()
    }
    others = {name: each for name, each in values.items() if name != base}
    against = differences(others, values[base], settings.test, settings.alpha)
    variants = [
        Variant(
            name=name,
            changes=study.own[name],
            values=values[name],
            failed=failures([*outcomes, *(each for those in tried.get(name, {}).values() for each in those)]),
            mean=statistics.fmean(values[name].values()) if values[name] else None,
            spread=statistics.stdev(values[name].values()) if len(values[name]) > 1 else None,
            difference=against.get(name),
            verdict=verdict(against[name]) if name in against else "the baseline",
            rates=rates(tried.get(name, {})),
            steps=plan.steps[name],
            cost=cost(study, plan, name),
            speed=speed([each.history for each in outcomes if each.history and each.value is not None]),
        )
        for name, outcomes in judged.items()
    ]
    done = {
        name: [each.history for each in those if each.history and each.value is not None]
        for name, those in judged.items()
    }
    return Findings(study, variants, done)


def failures(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {each.trial.name: each.why for each in outcomes if each.value is None}


def rates(tried: Mapping[float, Sequence[Outcome]]) -> Rates | None:
    """What was tried, and whether the best of it may not be the best there is."""
    if not tried:
        return None
    means = {}
    for factor, outcomes in tried.items():
        known = [each.value for each in outcomes if each.value is not None]
        means[factor] = statistics.fmean(known) if len(known) == len(outcomes) else None
    factor = best(tried)
    return Rates(means, factor, factor in (min(means), max(means)))


def cost(study: Study, plan: Plan, name: str) -> dict[str, int]:
    """What follows from shape and plan alone."""
    recipe = study.recipes[name]
    tokens = plan.steps[name] * recipe.train.batch_tokens
    flops = flops_per_token(recipe.model, recipe.train.sequence_length)
    train = recipe.train.model_copy(update={key.removeprefix("train."): at for key, at in plan.decided[name].items()})
    return {
        "parameters": sum(parameter_counts(recipe.model).values()),
        "active": active_parameters(recipe.model),
        "flops_per_token": flops,
        "kv_bytes_per_token": kv_bytes_per_token(recipe.model),
        "tokens": tokens,
        "flops": tokens * flops,
        "predicted_memory_bytes": training_bytes(recipe.model_copy(update={"train": train})),
    }


def speed(runs: Sequence[History]) -> dict[str, float]:
    """Of runs one after the other on a machine that may have other things to do."""
    rate = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
    seconds = [float(run.seconds[-1]) for run in runs]
    return {"tokens_per_second": float(np.mean(rate)), "seconds": float(np.mean(seconds))} if rate else {}


def verdict(found: Difference) -> str:
    """What may be said, and no more."""
    if found.mean is None:
        return "nothing to compare: no seed was finished by both"
    if found.n < FEWEST:
        return f"nothing to say: {found.n} of the {FEWEST} pairs of runs that are the fewest"
    if found.called:
        return f"{'better' if found.mean < 0 else 'worse'}, by {abs(found.mean):.4f}"
    if not found.smallest_visible:
        return "no difference: each pair of runs is the same"
    return f"no difference seen; one of {found.smallest_visible:.4f} would have been {POWER:.0%} of the time"
