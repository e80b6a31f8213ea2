"""Write the results of a study: report.md, index.html, the figures, and study.json with every number."""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from smolforge import atomic
from smolforge.comparison import page
from smolforge.comparison.page import MISSING, Report, Table, format_number
from smolforge.comparison.statistics import POWER, MeanDifference
from smolforge.comparison.study.figures import FIGURES, METRIC_NAMES, METRIC_UNITS
from smolforge.comparison.study.plan import BUDGET_UNITS
from smolforge.comparison.study.results import StudyResults, VariantResult
from smolforge.formatting import format_setting

REPORT, NUMBERS = "report.md", "study.json"
TABS = {"loss-tokens": "tokens", "loss-flops": "FLOPs", "loss-seconds": "time"}
CAPTIONS = {
    "loss-tokens": (
        "Loss",
        "Means over seeds, all seeds as a band; of the beginning, what lies above the frame is cut.",
    ),
    "loss-flops": ("Loss", "Matrix FLOPs, attention counted as causal."),
    "loss-seconds": (
        "Loss",
        "Of training, measuring and saving included, on a machine that may have had other things to do.",
    ),
    "difference": ("Differences", "Below zero is better than the baseline."),
    "law": ("Sizes", "Each seed as a point; the line is fitted to the filled means, and dashed where it predicts."),
}
COSTS = {
    "parameters": "parameters",
    "active": "active",
    "FLOPs a token": "flops_per_token",
    "KV bytes a token (fp32)": "kv_bytes_per_token",
}
EXTRA_NAMES = {"validation_accuracy": "held-out accuracy"}
Columns = dict[str, Callable[[VariantResult], str]]
"""Cells of a variant by their heading."""


def variants_table(title: str, results: StudyResults, columns: Columns) -> Table:
    """A row for each variant."""
    rows = [[variant.name, *(cell(variant) for cell in columns.values())] for variant in results.variants]
    return Table(title, ["variant", *columns], rows, ("verdict",))


def results_table(results: StudyResults) -> Table:
    """The metric, its difference to the baseline, and what that says."""
    settings = results.settings

    def difference(variant: VariantResult) -> MeanDifference:
        return variant.difference or MeanDifference(0, None)

    columns: Columns = {
        "n": lambda variant: str(len(variant.values)),
        f"{settings.metric.replace('_', ' ')}, mean ± deviation": lambda variant: metric_cell(variant),
        "difference": lambda variant: format_number(difference(variant).mean, "+.4f"),
        f"{1 - settings.alpha:.0%} interval": lambda variant: interval_cell(
            difference(variant).low, difference(variant).high
        ),
        "p (Holm)": lambda variant: format_number(difference(variant).adjusted_p, ".2g"),
        "smallest visible": lambda variant: format_number(difference(variant).smallest_visible, ".4f"),
        "verdict": lambda variant: variant.verdict,
    }
    return variants_table("What came of it", results, columns)


def metric_cell(variant: VariantResult) -> str:
    """Mean and spread of what is compared."""
    return number_cell(variant.mean, variant.spread, ".4f")


def number_cell(mean: float | None, spread: float | None, spec: str) -> str:
    return format_number(mean, spec) + ("" if spread is None else f" ± {spread:{spec}}")


def interval_cell(low: float | None, high: float | None, spec: str = "+.4f") -> str:
    return MISSING if low is None or high is None else f"{low:{spec}} to {high:{spec}}"


def extra_metrics_table(results: StudyResults) -> Table:
    """What else the trained models were measured on; more is better."""

    def cell(name: str, variant: VariantResult) -> str:
        if (metric := variant.also.get(name)) is None:
            return MISSING
        return f"{metric.mean:.2%}" + ("" if metric.spread is None else f" ± {100 * metric.spread:.2f}")

    names = dict.fromkeys(name for variant in results.variants for name in variant.also)
    columns = {EXTRA_NAMES.get(name, name.replace(".", " ")): partial(cell, name) for name in names}
    return variants_table("What else was measured", results, columns)


def cost_table(results: StudyResults) -> Table:
    """What follows from shape and plan alone."""
    columns: Columns = {
        heading: lambda variant, name=name: f"{variant.cost[name]:,}" for heading, name in COSTS.items()
    }
    columns |= {
        "memory, predicted": lambda variant: format_mebibytes(variant.cost["predicted_memory_bytes"]),
        "steps": lambda variant: f"{variant.steps:,}",
        "tokens": lambda variant: f"{variant.cost['tokens']:,}",
        "FLOPs": lambda variant: f"{variant.cost['flops']:.3g}".replace("e+", "e"),
    }
    return variants_table("What it cost, a run", results, columns)


def format_mebibytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / 2**20:,.0f} MiB"


def speed_table(results: StudyResults) -> Table:
    """What depends on the machine, and on what else it had to do."""

    def timed(name: str, spec: str, variant: VariantResult) -> str:
        metric = variant.speed.get(name) or {"mean": None, "spread": None}
        return number_cell(metric["mean"], metric["spread"], spec)

    def rounds(variant: VariantResult) -> str:
        if not (values := variant.speed.get("decode_tokens_per_second")):
            return MISSING
        return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"

    columns: Columns = {
        "training, tokens/s": partial(timed, "tokens_per_second", ",.0f"),
        "seconds a run": partial(timed, "seconds", ",.1f"),
        "decoding, tokens/s: median (lowest to highest)": rounds,
        "memory of training, measured": lambda variant: format_mebibytes(variant.speed.get("peak_memory_bytes")),
    }
    machines = " and ".join(dict.fromkeys(run.speed["machine"] for run in results.runs.values()))
    return variants_table(f"How fast it was on {machines or 'this machine'}", results, columns)


def predictions_table(results: StudyResults) -> Table:
    """What the small sizes say of the larger ones, and what came."""
    assert results.law is not None
    head = ["variant", "predicted", f"{1 - results.settings.alpha:.0%} interval", "measured", "measured - predicted"]
    rows = [
        [
            prediction.name,
            f"{prediction.predicted:.4f}",
            interval_cell(prediction.low, prediction.high, ".4f"),
            f"{prediction.measured:.4f}",
            f"{prediction.measured - prediction.predicted:+.4f}",
            interval_cell(prediction.missed_low, prediction.missed_high),
        ]
        for prediction in results.law.predictions
    ]
    return Table("What the sizes predicted", [*head, "its interval"], rows)


def changes_table(results: StudyResults) -> Table:
    """A row for each setting, since they are many and variants few."""
    changes = [variant.changes for variant in results.variants]
    rows = [
        [name, *(format_setting(own[name]) if name in own else MISSING for own in changes)]
        for name in dict.fromkeys(name for own in changes for name in own)
    ]
    return Table("What each changes in the recipe", ["setting", *(variant.name for variant in results.variants)], rows)


def learning_rates_table(results: StudyResults) -> Table:
    """What each factor came to, of variants that tried some."""
    factors, seeds = results.settings.learning_rates, ", ".join(map(str, results.settings.learning_rate_seeds))
    rows = []
    for variant in results.variants:
        if (rates := variant.rates) is not None:
            means = [format_number(rates.means.get(factor), ".4f") for factor in factors]
            note = "at the end of what was tried: a better one may lie beyond" if rates.at_the_end else ""
            rows.append([variant.name, *means, format_number(rates.factor, "g"), note])
    head = ["variant", *(f"x {factor:g}" for factor in factors), "chosen", ""]
    return Table(f"Learning rates, tried with seed {seeds}", head, rows)


def study_report(results: StudyResults) -> Report:
    """What both reports have."""
    return Report(
        kind="study",
        title=results.study,
        names=[variant.name for variant in results.variants],
        tables=[
            results_table(results),
            *([predictions_table(results)] if results.law else []),
            extra_metrics_table(results),
            cost_table(results),
            speed_table(results),
            changes_table(results),
            *([learning_rates_table(results)] if any(variant.rates for variant in results.variants) else []),
        ],
        tabs=TABS,
        captions=CAPTIONS,
        opening=[*introduction(results), *describe_law(results)],
        failed=failed_runs(results),
    )


def write_report(results: StudyResults, out: Path) -> list[Path]:
    """Write all of it into a folder; returns the files, the page first. Raises OSError."""
    figures = {name: partial(draw, results) for name, draw in FIGURES.items()}
    html, *images = page.write_page(study_report(results), figures, out)
    names = [file.stem for file in images if file.suffix == ".svg"]
    atomic.write_text_atomic(out / REPORT, render_markdown(results, names))
    atomic.write_text_atomic(out / NUMBERS, results_json(results))
    return [html, out / REPORT, out / NUMBERS, *images]


def render_markdown(results: StudyResults, figures: Sequence[str]) -> str:
    """Return the report of a study in Markdown, with links to its figures."""
    return page.render_markdown(study_report(results), figures)


def results_json(results: StudyResults) -> str:
    return json.dumps(results.as_json(), indent=2, allow_nan=False) + "\n"


def introduction(results: StudyResults) -> list[str]:
    """What was chosen before the first run, and how to read it."""
    settings, count = results.settings, len(results.variants) - 1
    amount, common = settings.budget.amount, results.common
    number = f"{amount:,.0f}" if 100 <= amount < 1e12 else f"{amount:g}".replace("e+", "e")
    budget = f"{number} {BUDGET_UNITS[settings.budget.kind]}"
    changed = ", ".join(f"{name} {format_setting(value)}" for name, value in common.items())
    correction = f", after Holm for {count} variants" if count > 1 else ""
    return [
        f"Every run had {budget}; seeds {', '.join(map(str, settings.seeds))}; all else is the recipe "
        f"{results.recipe}{f' with {changed}' if changed else ''}.",
        f"Differences are to {settings.baseline}, in {METRIC_UNITS[settings.metric]}, less is better. Chosen before "
        f"the runs: {settings.test}, alpha {settings.alpha:g}{correction}. A true difference as large as the "
        f"smallest visible one would have been called {POWER:.0%} of the time.",
    ]


def describe_law(results: StudyResults) -> list[str]:
    """The law in words, and how far to trust it."""
    law, law_settings = results.law, results.settings.law
    if law_settings is None:
        return []
    if law is None:
        return ["No law could be fitted: no seed was finished by every size, or the floor is not below every loss."]
    power, (low, high), (floor_low, floor_high) = law.power, law.exponents, law.floors
    metric, sizes = METRIC_NAMES[results.settings.metric], "FLOPs" if law.over == "flops" else law.over
    floor = f"{power.floor:.4g} + " if power.floor else ""
    formula = f"{metric} = {floor}{power.scale:.4g} / N^{power.exponent:.4f}, N being {sizes}"
    fit = f"fitted to the means of {', '.join(law.fitted)} over {len(law.seeds)} seeds"
    lines = [f"{formula}; {fit}. The exponent is {low:.4f} to {high:.4f} over draws of the seeds."]
    if law_settings.floor == "fitted":
        lines.append(
            f"The floor was fitted too, and is {floor_low:.3g} to {floor_high:.3g} over draws of the seeds: where that "
            "is wide, these sizes do not tell it apart from the exponent."
        )
    else:
        lines.append(
            f"The floor of {law_settings.floor:g} was chosen before the runs, since few sizes do not tell it apart "
            "from the exponent; a higher one would predict a higher loss beyond the sizes fitted."
        )
    return [*lines, "The intervals are of the seeds alone. Whether the law holds is what the prediction tries."]


def failed_runs(results: StudyResults) -> list[str]:
    """Runs that did not come to their end."""
    return [f"{run}: {reason}" for variant in results.variants for run, reason in variant.failed.items()]
