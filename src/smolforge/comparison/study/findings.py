"""Numbers from what the runs say: of each variant its losses, its difference to the baseline, what it costs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from smolforge.comparison.history import History
from smolforge.comparison.statistics import FEWEST, POWER, Difference, differences
from smolforge.comparison.study.law import LawFound, law
from smolforge.comparison.study.machine import Measured
from smolforge.comparison.study.plan import Plan
from smolforge.comparison.study.read import Study, StudySettings
from smolforge.comparison.study.record import Findings, Mean, Rates, Run, Variant
from smolforge.comparison.study.trials import Outcome, best
from smolforge.recipe.plan import training_bytes
from smolforge.sizes import active_parameters, flops_per_token, kv_bytes_per_token, parameter_counts

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
