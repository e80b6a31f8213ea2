"""What a study found, as data: study.json is all of it, and reads back as the same, so that a report needs no runs.

Whatever depends on how fast the machine was stands under `speed`; all else is the same however often a study was
stopped and went on.

Numbers from what the runs say: of each variant its losses, its difference to the baseline, what it costs.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smolforge import __version__
from smolforge.comparison.history import History
from smolforge.comparison.statistics import FEWEST, POWER, Difference, differences
from smolforge.comparison.study.benchmarks import Measured
from smolforge.comparison.study.plan import Plan
from smolforge.comparison.study.runner import Outcome, best
from smolforge.comparison.study.scaling_law import LawFound, law
from smolforge.comparison.study.spec import Study, StudySettings
from smolforge.errors import InvalidFile
from smolforge.models.stats import active_parameters, flops_per_token, kv_bytes_per_token, parameter_counts
from smolforge.runs.estimate import training_bytes


@dataclass(frozen=True)
class Mean:
    """Of a variant's finished runs."""

    n: int
    mean: float
    spread: float | None
    """Standard deviation over seeds; None of one."""


@dataclass(frozen=True)
class Rates:
    """How a variant came to its learning rate."""

    means: dict[float, float | None]
    """The metric's mean at each factor; None where a run failed."""
    factor: float | None
    at_the_end: bool
    """Whether the best is the first or the last that was tried, so that a better one may lie beyond."""


@dataclass(frozen=True)
class Run:
    """One that came to its end: what it measured on held-out text, and when."""

    variant: str
    measured: list[dict[str, int | float | None]]
    """step, tokens, validation_loss, validation_bits_per_byte, validation_accuracy."""
    speed: dict[str, Any]
    """machine, tokens_per_second, and `seconds` of training until each of those."""


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
    also: dict[str, Mean]
    """What else was measured of the trained models: validation_accuracy, and of each task TASK.acc and so on."""
    difference: Difference | None
    """To the baseline; None of the baseline itself."""
    verdict: str
    rates: Rates | None
    steps: int
    cost: dict[str, int]
    """parameters, active, flops_per_token, kv_bytes_per_token, tokens, flops, predicted_memory_bytes."""
    speed: dict[str, Any]
    """tokens_per_second and seconds of runs, decode_tokens_per_second of each round, peak_memory_bytes."""


@dataclass(frozen=True)
class Findings:
    """All that a study found."""

    study: str
    recipe: str
    """Its name."""
    common: dict[str, Any]
    """What all variants change in it."""
    settings: StudySettings
    variants: list[Variant]
    runs: dict[str, Run]
    """By name."""
    law: LawFound | None

    def of(self, variant: str) -> list[Run]:
        """Its runs, by seed."""
        return [run for run in self.runs.values() if run.variant == variant]

    def as_json(self) -> dict[str, Any]:
        """Every number, as study.json has it."""
        head = {"study": self.study, "version": __version__, "power": POWER, "recipe": self.recipe}
        return {
            **head,
            "common": self.common,
            "settings": self.settings.model_dump(mode="json", exclude_none=True),
            "variants": {each.name: asdict(each) for each in self.variants},
            "law": self.law and asdict(self.law),
            "runs": {name: asdict(run) for name, run in self.runs.items()},
        }


def recorded(path: Path) -> Findings:
    """The findings in a study.json. Raises InvalidFile where it is none."""
    try:
        tree = json.loads(path.read_text("utf-8"))
        known = {name: tree[name] for name in ("study", "recipe", "common", "settings", "law", "runs")}
        return TypeAdapter(Findings).validate_python({**known, "variants": list(tree["variants"].values())})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise InvalidFile(f"{path} is no study's: {' '.join(str(error).split())[:200]}") from None


ACCURACIES = ("acc", "acc_norm", "acc_chars")
MEASURED = ("step", "tokens", "validation_loss", "validation_bits_per_byte", "validation_accuracy")
Tried = Mapping[float, Sequence[Outcome]]
"""Outcomes by the factor of the learning rate."""


def findings(
    study: Study, plan: Plan, tried: Mapping[str, Tried], judged: Mapping[str, Sequence[Outcome]], here: Measured
) -> Findings:
    """Put numbers to what the runs say."""
    settings, base = study.settings, study.settings.baseline
    values = {
        name: {each.trial.seed: each.value for each in outcomes if each.value is not None}
        for name, outcomes in judged.items()
    }
    others = {name: each for name, each in values.items() if name != base}
    against = differences(others, values[base], settings.test, settings.alpha)
    done = {name: [each for each in outcomes if each.value is not None] for name, outcomes in judged.items()}
    histories = {name: [each.history for each in outcomes if each.history] for name, outcomes in done.items()}
    variants = [
        Variant(
            name=name,
            changes=dict(study.own[name]),
            values=values[name],
            failed=failures([*outcomes, *(each for those in tried.get(name, {}).values() for each in those)]),
            mean=statistics.fmean(values[name].values()) if values[name] else None,
            spread=statistics.stdev(values[name].values()) if len(values[name]) > 1 else None,
            also=also(done[name]),
            difference=against.get(name),
            verdict=verdict(against[name]) if name in against else "the baseline",
            rates=rates(tried.get(name, {})),
            steps=plan.steps[name],
            cost=cost(study, plan, name),
            speed=speed(histories[name], here.decoding.get(name), here.memory.get(name)),
        )
        for name, outcomes in judged.items()
    ]
    runs = {run.name: of_run(name, run) for name, those in histories.items() for run in those}
    found = law_through(settings, variants)
    return Findings(study.name, study.recipe.stem, dict(study.common), settings, variants, runs, found)


def of_run(variant: str, run: History) -> Run:
    """What a run measured on held-out text, and when."""
    places = [place for place, record in enumerate(run.metrics) if "validation_loss" in record]
    measured = [{key: run.metrics[place].get(key) for key in MEASURED} for place in places]
    seconds = [float(run.seconds[place]) for place in places]
    start = run.starts[-1] if run.starts else {}
    threads = start.get("threads", 0)
    where = f"{start.get('name', 'unknown')}, {threads} thread{'s' if threads != 1 else ''}"
    return Run(variant, measured, {"machine": where, "tokens_per_second": run.tokens_per_second, "seconds": seconds})


def law_through(settings: StudySettings, variants: Sequence[Variant]) -> LawFound | None:
    """What the sizes of a ladder say; None of another study."""
    if settings.law is None:
        return None
    sizes = {each.name: float(each.cost[settings.law.over]) for each in variants}
    return law(settings.law, sizes, {each.name: each.values for each in variants}, settings.alpha)


def also(outcomes: Sequence[Outcome]) -> dict[str, Mean]:
    """Held-out accuracy after the last step, and every accuracy of every task."""
    runs = [run for each in outcomes if (run := each.history)]
    found = {"validation_accuracy": [value for run in runs if (value := run.newest("validation_accuracy")) is not None]}
    for outcome in outcomes:
        for task, scores in (outcome.scores or {}).items():
            for name in ACCURACIES:
                found.setdefault(f"{task}.{name}", []).append(scores[name])
    return {name: mean_of(values) for name, values in found.items() if values}


def mean_of(values: Sequence[float]) -> Mean:
    return Mean(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def failures(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {each.trial.name: each.why for each in outcomes if each.value is None}


def rates(tried: Tried) -> Rates | None:
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


def speed(runs: Sequence[History], decoding: Sequence[float] | None, memory: int | None) -> dict[str, Any]:
    """Of runs one after the other on a machine that may have other things to do, and of measuring in turn."""
    found: dict[str, Any] = {}
    if rate := [each for run in runs if (each := run.tokens_per_second) is not None]:
        found["tokens_per_second"] = asdict(mean_of(rate))
    if runs:
        found["seconds"] = asdict(mean_of([float(run.seconds[-1]) for run in runs]))
    if decoding:
        found["decode_tokens_per_second"] = list(decoding)
    return found | ({} if memory is None else {"peak_memory_bytes": memory})


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
