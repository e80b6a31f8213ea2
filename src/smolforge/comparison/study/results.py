"""Compute the results of a study and hold them as data: losses, differences to the baseline, costs of each variant.

study.json holds all of it and reads back as the same data, so a report needs no runs. Whatever depends on the speed of
the machine is under `speed`; everything else is the same however often a study was stopped and resumed.
"""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smolforge import __version__
from smolforge.comparison.history import RunHistory
from smolforge.comparison.statistics import MIN_PAIRS, POWER, MeanDifference, differences
from smolforge.comparison.study.plan import StudyPlan
from smolforge.comparison.study.runner import Outcome, RateOutcomes, best_factor, mean_by_factor
from smolforge.comparison.study.scaling_law import FittedLaw, fit_law
from smolforge.comparison.study.spec import Study, StudySettings
from smolforge.config.base import replace_settings
from smolforge.errors import InvalidFileError
from smolforge.models.stats import active_parameters, flops_per_token, kv_bytes_per_token, parameter_counts
from smolforge.runs.estimate import training_bytes

ACCURACIES = ("acc", "acc_norm", "acc_chars")
MEASURED = ("step", "tokens", "validation_loss", "validation_bits_per_byte", "validation_accuracy")


@dataclass(frozen=True)
class MeanAndSpread:
    """Of a variant's finished runs."""

    n: int
    mean: float
    spread: float | None
    """Standard deviation over seeds; None of one."""


@dataclass(frozen=True)
class LearningRateSearch:
    """How a variant came to its learning rate."""

    means: dict[float, float | None]
    """The metric's mean at each factor; None where a run failed."""
    factor: float | None
    at_the_end: bool
    """Whether the best is the first or the last that was tried, so that a better one may lie beyond."""


@dataclass(frozen=True)
class RunMeasurements:
    """One that came to its end: what it measured on held-out text, and when."""

    variant: str
    measured: list[dict[str, int | float | None]]
    """step, tokens, validation_loss, validation_bits_per_byte, validation_accuracy."""
    speed: dict[str, Any]
    """machine, tokens_per_second, and `seconds` of training until each of those."""


@dataclass(frozen=True)
class VariantResult:
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
    also: dict[str, MeanAndSpread]
    """What else was measured of the trained models: validation_accuracy, and of each task TASK.acc and so on."""
    difference: MeanDifference | None
    """To the baseline; None of the baseline itself."""
    verdict: str
    rates: LearningRateSearch | None
    steps: int
    cost: dict[str, int]
    """parameters, active, flops_per_token, kv_bytes_per_token, tokens, flops, predicted_memory_bytes."""
    speed: dict[str, Any]
    """tokens_per_second and seconds of runs, decode_tokens_per_second of each round, peak_memory_bytes."""


@dataclass(frozen=True)
class StudyResults:
    """All that a study found."""

    study: str
    recipe: str
    """Its name."""
    common: dict[str, Any]
    """What all variants change in it."""
    settings: StudySettings
    variants: list[VariantResult]
    runs: dict[str, RunMeasurements]
    """By name."""
    law: FittedLaw | None

    def runs_of(self, variant: str) -> list[RunMeasurements]:
        """Its runs, by seed."""
        return [run for run in self.runs.values() if run.variant == variant]

    def as_json(self) -> dict[str, Any]:
        """Every number, as study.json has it."""
        head = {"study": self.study, "version": __version__, "power": POWER, "recipe": self.recipe}
        return {
            **head,
            "common": self.common,
            "settings": self.settings.model_dump(mode="json", exclude_none=True),
            "variants": {variant.name: asdict(variant) for variant in self.variants},
            "law": self.law and asdict(self.law),
            "runs": {name: asdict(run) for name, run in self.runs.items()},
        }


def read_results(path: Path) -> StudyResults:
    """The findings in a study.json. Raises InvalidFileError where it is none."""
    try:
        tree = json.loads(path.read_text("utf-8"))
        content = {name: tree[name] for name in ("study", "recipe", "common", "settings", "law", "runs")}
        return TypeAdapter(StudyResults).validate_python({**content, "variants": list(tree["variants"].values())})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise InvalidFileError(f"{path} is no study's: {' '.join(str(error).split())[:200]}") from None


def compute_results(
    study: Study,
    plan: StudyPlan,
    rate_outcomes: Mapping[str, RateOutcomes],
    *,
    outcomes_by_variant: Mapping[str, Sequence[Outcome]],
    measured: Mapping[str, Mapping[str, Any]],
) -> StudyResults:
    """Put numbers to what the runs say; `measured` has, by name and variant, what was measured after them."""
    settings, variants, runs = study.settings, [], {}
    values = {
        name: {outcome.trial.seed: outcome.value for outcome in outcomes if outcome.value is not None}
        for name, outcomes in outcomes_by_variant.items()
    }
    others = {name: losses for name, losses in values.items() if name != settings.baseline}
    to_baseline = differences(others, values[settings.baseline], settings.test, alpha=settings.alpha)
    for name, outcomes in outcomes_by_variant.items():
        histories = [run for outcome in outcomes if (run := outcome.finished_run)]
        runs |= {run.name: measure_run(name, run) for run in histories}
        metric, difference, rates = mean_and_spread(values[name].values()), to_baseline.get(name), rate_outcomes[name]
        variants.append(
            VariantResult(
                name=name,
                changes=dict(study.own[name]),
                values=values[name],
                failed={
                    outcome.trial.name: outcome.why
                    for outcome in itertools.chain(outcomes, *rates.values())
                    if outcome.value is None
                },
                mean=metric.mean if metric else None,
                spread=metric.spread if metric else None,
                also=extra_metrics(outcomes),
                difference=difference,
                verdict=verdict(difference),
                rates=summarize_rates(rates),
                steps=plan.steps[name],
                cost=variant_cost(study, plan, name),
                speed=variant_speed(histories)
                | {key: known[name] for key, known in measured.items() if known.get(name)},
            )
        )
    law = fit_study_law(settings, variants)
    return StudyResults(study.name, study.recipe.stem, dict(study.common), settings, variants, runs, law)


def measure_run(variant: str, run: RunHistory) -> RunMeasurements:
    """What a run measured on held-out text, and when."""
    indices = [index for index, record in enumerate(run.metrics) if "validation_loss" in record]
    measured = [{key: run.metrics[index].get(key) for key in MEASURED} for index in indices]
    start = run.starts[-1] if run.starts else {}
    threads = start.get("threads", 0)
    machine = f"{start.get('name', 'unknown')}, {threads} thread{'s' if threads != 1 else ''}"
    speed = {"machine": machine, "tokens_per_second": run.tokens_per_second, "seconds": run.seconds[indices].tolist()}
    return RunMeasurements(variant, measured, speed)


def fit_study_law(settings: StudySettings, variants: Sequence[VariantResult]) -> FittedLaw | None:
    """What the sizes of a ladder say; None of another study."""
    if settings.law is None:
        return None
    sizes = {variant.name: float(variant.cost[settings.law.over]) for variant in variants}
    return fit_law(settings.law, sizes, {variant.name: variant.values for variant in variants}, alpha=settings.alpha)


def extra_metrics(outcomes: Sequence[Outcome]) -> dict[str, MeanAndSpread]:
    """Of finished runs, held-out accuracy after the last step, and every accuracy of every task."""
    values: dict[str, list[float | None]] = defaultdict(list)
    for outcome in outcomes:
        if run := outcome.finished_run:
            values["validation_accuracy"].append(run.newest("validation_accuracy"))
        for task, scores in (outcome.scores or {}).items():
            for name in ACCURACIES:
                values[f"{task}.{name}"].append(scores[name])
    return {name: metric for name, numbers in values.items() if (metric := mean_and_spread(numbers))}


def mean_and_spread(values: Iterable[float | None]) -> MeanAndSpread | None:
    """Of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    spread = statistics.stdev(known) if len(known) > 1 else None
    return MeanAndSpread(len(known), statistics.fmean(known), spread) if known else None


def summarize_rates(rate_outcomes: RateOutcomes) -> LearningRateSearch | None:
    """What was tried, and whether the best of it may not be the best there is."""
    if not rate_outcomes:
        return None
    factor = best_factor(rate_outcomes)
    return LearningRateSearch(mean_by_factor(rate_outcomes), factor, factor in (min(rate_outcomes), max(rate_outcomes)))


def variant_cost(study: Study, plan: StudyPlan, name: str) -> dict[str, int]:
    """What follows from shape and plan alone."""
    recipe = study.recipes[name]
    model, tokens = recipe.model, plan.steps[name] * recipe.train.batch_tokens
    flops = flops_per_token(model, recipe.train.sequence_length)
    return {
        "parameters": sum(parameter_counts(model).values()),
        "active": active_parameters(model),
        "flops_per_token": flops,
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "tokens": tokens,
        "flops": tokens * flops,
        "predicted_memory_bytes": training_bytes(replace_settings(recipe, plan.decided[name])),
    }


def variant_speed(runs: Sequence[RunHistory]) -> dict[str, Any]:
    """Of runs one after the other on a machine that may have other things to do."""
    metrics = {
        "tokens_per_second": mean_and_spread(run.tokens_per_second for run in runs),
        "seconds": mean_and_spread(float(run.seconds[-1]) for run in runs),
    }
    return {name: asdict(metric) for name, metric in metrics.items() if metric is not None}


def verdict(difference: MeanDifference | None) -> str:
    """What may be said, and no more."""
    if difference is None:
        return "the baseline"
    if difference.mean is None:
        return "nothing to compare: no seed was finished by both"
    if difference.n < MIN_PAIRS:
        return f"nothing to say: {difference.n} of the {MIN_PAIRS} pairs of runs that are the fewest"
    if difference.called:
        return f"{'better' if difference.mean < 0 else 'worse'}, by {abs(difference.mean):.4f}"
    if not difference.smallest_visible:
        return "no difference: each pair of runs is the same"
    return f"no difference seen; one of {difference.smallest_visible:.4f} would have been {POWER:.0%} of the time"
