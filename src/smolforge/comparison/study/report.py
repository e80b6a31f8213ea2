"""Write the results of a study: report.md, index.html, the figures, and study.json with every number.

Both reports have the same tables: rows of text cells, in most of them the variant first.
"""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from smolforge import atomic
from smolforge.comparison import page, style
from smolforge.comparison.statistics import POWER, MeanDifference
from smolforge.comparison.study.figures import FIGURES, METRIC_NAMES, METRIC_UNITS
from smolforge.comparison.study.plan import BUDGET_UNITS as BUDGETS
from smolforge.comparison.study.results import MeanAndSpread, StudyResults, VariantResult
from smolforge.comparison.summaries import format_setting

MISSING = "-"
TIMES = ("tokens_per_second", "seconds")
REPORT, NUMBERS = "report.md", "study.json"
TABS = {"loss-tokens": "tokens", "loss-flops": "FLOPs", "loss-seconds": "time"}
CAPTIONS = {
    "loss-tokens": "Means over seeds, all seeds as a band; of the beginning, what lies above the frame is cut.",
    "loss-flops": "Matrix FLOPs, attention counted as causal.",
    "loss-seconds": "Of training, measuring and saving included, on a machine that may have had other things to do.",
    "difference": "Below zero is better than the baseline.",
    "law": "Each seed as a point; the line is fitted to the filled means, and dashed where it predicts.",
}


class Table(NamedTuple):
    """A heading, and rows of which the first column is words."""

    title: str
    head: list[str]
    rows: list[list[str]]


def report_tables(results: StudyResults) -> list[Table]:
    """What both reports have."""
    tables = [
        results_table(results),
        *([predictions_table(results)] if results.law else []),
        extra_metrics_table(results),
        cost_table(results),
        speed_table(results),
    ]
    return [
        *tables,
        changes_table(results),
        *([learning_rates_table(results)] if any(variant.rates for variant in results.variants) else []),
    ]


def results_table(results: StudyResults) -> Table:
    settings = results.settings
    confidence = f"{1 - settings.alpha:.0%}"
    head = ["variant", "n", f"{settings.metric.replace('_', ' ')}, mean ± deviation"]
    head += ["difference", f"{confidence} interval", "p (Holm)", "smallest visible", "verdict"]
    rows = [
        [*loss_cells(variant), *difference_cells(variant.difference), variant.verdict] for variant in results.variants
    ]
    return Table("What came of it", head, rows)


def loss_cells(variant: VariantResult) -> list[str]:
    mean = MISSING if variant.mean is None else f"{variant.mean:.4f}"
    spread = "" if variant.spread is None else f" ± {variant.spread:.4f}"
    return [variant.name, str(len(variant.values)), mean + spread]


def difference_cells(difference: MeanDifference | None) -> list[str]:
    if difference is None or difference.mean is None:
        return [MISSING] * 4
    interval = (
        MISSING
        if difference.low is None or difference.high is None
        else f"{difference.low:+.4f} to {difference.high:+.4f}"
    )
    p = MISSING if difference.adjusted_p is None else f"{difference.adjusted_p:.2g}"
    visible = MISSING if difference.smallest_visible is None else f"{difference.smallest_visible:.4f}"
    return [f"{difference.mean:+.4f}", interval, p, visible]


def extra_metrics_table(results: StudyResults) -> Table:
    """What else the trained models were measured on; more is better."""
    names = list(dict.fromkeys(name for variant in results.variants for name in variant.also))
    rows = [[variant.name, *(percent_cell(variant.also.get(name)) for name in names)] for variant in results.variants]
    labels = {"validation_accuracy": "held-out accuracy"}
    return Table(
        "What else was measured", ["variant", *(labels.get(name, name.replace(".", " ")) for name in names)], rows
    )


def percent_cell(metric: MeanAndSpread | None) -> str:
    if metric is None:
        return MISSING
    return f"{metric.mean:.2%}" + ("" if metric.spread is None else f" ± {100 * metric.spread:.2f}")


def cost_table(results: StudyResults) -> Table:
    head = ["variant", "parameters", "active", "FLOPs a token", "KV bytes a token (fp32)", "memory, predicted"]
    head += ["steps", "tokens", "FLOPs"]
    rows = []
    for variant in results.variants:
        cost = variant.cost
        sizes = ("parameters", "active", "flops_per_token", "kv_bytes_per_token")
        row = [variant.name, *(f"{cost[name]:,}" for name in sizes), format_mebibytes(cost["predicted_memory_bytes"])]
        rows.append([*row, f"{variant.steps:,}", f"{cost['tokens']:,}", f"{cost['flops']:.3g}".replace("e+", "e")])
    return Table("What it cost, a run", head, rows)


def format_mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def speed_table(results: StudyResults) -> Table:
    """What depends on the machine, and on what else it had to do."""
    head = ["variant", "training, tokens/s", "seconds a run", "decoding, tokens/s: median (lowest to highest)"]
    rows = []
    for variant in results.variants:
        train, seconds = (MeanAndSpread(**speed) if (speed := variant.speed.get(name)) else None for name in TIMES)
        decoding, memory = variant.speed.get("decode_tokens_per_second"), variant.speed.get("peak_memory_bytes")
        row = [
            variant.name,
            number_cell(train, 0),
            number_cell(seconds, 1),
            format_rounds(decoding) if decoding else MISSING,
        ]
        rows.append([*row, MISSING if memory is None else format_mebibytes(memory)])
    machines = " and ".join(dict.fromkeys(run.speed["machine"] for run in results.runs.values()))
    return Table(f"How fast it was on {machines or 'this machine'}", [*head, "memory of training, measured"], rows)


def number_cell(metric: MeanAndSpread | None, digits: int) -> str:
    if metric is None:
        return MISSING
    return f"{metric.mean:,.{digits}f}" + ("" if metric.spread is None else f" ± {metric.spread:,.{digits}f}")


def format_rounds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def predictions_table(results: StudyResults) -> Table:
    """What the small sizes say of the larger ones, and what came."""
    law, confidence = results.law, f"{1 - results.settings.alpha:.0%}"
    assert law is not None
    head = ["variant", "predicted", f"{confidence} interval", "measured", "measured - predicted", "its interval"]
    rows = []
    for prediction in law.predictions:
        row = [
            prediction.name,
            f"{prediction.predicted:.4f}",
            f"{prediction.low:.4f} to {prediction.high:.4f}",
            f"{prediction.measured:.4f}",
        ]
        gap = prediction.measured - prediction.predicted
        rows.append([*row, f"{gap:+.4f}", f"{prediction.missed_low:+.4f} to {prediction.missed_high:+.4f}"])
    return Table("What the sizes predicted", head, rows)


def changes_table(results: StudyResults) -> Table:
    """A row for each setting, since they are many and variants few."""
    names = list(dict.fromkeys(name for variant in results.variants for name in variant.changes))
    rows = [
        [
            name,
            *(
                format_setting(variant.changes[name]) if name in variant.changes else MISSING
                for variant in results.variants
            ),
        ]
        for name in names
    ]
    return Table("What each changes in the recipe", ["setting", *(variant.name for variant in results.variants)], rows)


def learning_rates_table(results: StudyResults) -> Table:
    factors = results.settings.learning_rates
    rows = []
    for variant in results.variants:
        if variant.rates is None:
            continue
        means = [variant.rates.means.get(factor) for factor in factors]
        chosen = MISSING if variant.rates.factor is None else f"{variant.rates.factor:g}"
        note = "at the end of what was tried: a better one may lie beyond" if variant.rates.at_the_end else ""
        rows.append([variant.name, *(MISSING if mean is None else f"{mean:.4f}" for mean in means), chosen, note])
    seeds = ", ".join(map(str, results.settings.learning_rate_seeds))
    head = ["variant", *(f"x {factor:g}" for factor in factors), "chosen", ""]
    return Table(f"Learning rates, tried with seed {seeds}", head, rows)


def write_report(results: StudyResults, out: Path) -> list[Path]:
    """Write all of it into a folder; returns the files, the page first. Raises OSError."""
    atomic.make_dir_durable(out)
    files_by_figure = {name: style.draw_and_save(partial(draw, results), out / name) for name, draw in FIGURES.items()}
    files_by_figure = {name: files for name, files in files_by_figure.items() if files}
    pages = {
        page.PAGE: render_html(results, files_by_figure),
        REPORT: render_markdown(results, list(files_by_figure)),
        NUMBERS: results_json(results),
    }
    for name, text in pages.items():
        atomic.write_text_atomic(out / name, text)
    return [*(out / name for name in pages), *(file for files in files_by_figure.values() for file in files)]


def results_json(results: StudyResults) -> str:
    return json.dumps(results.as_json(), indent=2, allow_nan=False) + "\n"


def introduction(results: StudyResults) -> list[str]:
    """What was chosen before the first run, and how to read it."""
    settings, count = results.settings, len(results.variants) - 1
    amount, common = settings.budget.amount, results.common
    budget = (
        f"{f'{amount:,.0f}' if 100 <= amount < 1e12 else format_power_of_ten(amount)} {BUDGETS[settings.budget.kind]}"
    )
    changed = ", ".join(f"{name} {format_setting(value)}" for name, value in common.items())
    correction = f", after Holm for {count} variants" if count > 1 else ""
    return [
        f"Every run had {budget}; seeds {', '.join(map(str, settings.seeds))}; all else is the recipe "
        f"{results.recipe}{f' with {changed}' if changed else ''}.",
        f"Differences are to {settings.baseline}, in {METRIC_UNITS[settings.metric]}, less is better. Chosen before "
        f"the runs: {settings.test}, alpha {settings.alpha:g}{correction}. A true difference as large as the "
        f"smallest visible one would have been called {POWER:.0%} of the time.",
    ]


def format_power_of_ten(amount: float) -> str:
    return f"{amount:g}".replace("e+", "e")


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


def render_markdown(results: StudyResults, figures: Sequence[str]) -> str:
    """Return the report of a study in Markdown, with links to its figures."""
    lines = [f"# {results.study}", ""]
    for paragraph in [*introduction(results), *describe_law(results)]:
        lines += [paragraph, ""]
    for table in report_tables(results):
        lines += [
            f"## {table.title}",
            "",
            markdown_row(table.head),
            markdown_row(["---", *["---:"] * (len(table.head) - 1)]),
        ]
        lines += [*map(markdown_row, table.rows), ""]
    if failed := failed_runs(results):
        lines += ["## Runs that did not come to their end", "", *(f"- {reason}" for reason in failed), ""]
    for name in figures:
        lines += [f"![{name.replace('-', ' ')}]({name}.svg)", "", CAPTIONS[name], ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def render_html(results: StudyResults, files_by_figure: dict[str, list[Path]]) -> str:
    """The page by itself: no script, nothing fetched."""
    jinja = Environment(
        loader=FileSystemLoader(Path(page.__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {
        name: page.inline_svg(files[0].read_text("utf-8"), name.replace("-", " "))
        for name, files in files_by_figure.items()
    }
    no_figures: dict[str, Markup] = {}
    return jinja.get_template("study/report.html").render(
        title=results.study,
        opening=[*introduction(results), *describe_law(results)],
        tables=report_tables(results),
        failed=failed_runs(results),
        swatches=page.swatches(len(results.variants)),
        colors=page.COLORS,
        tabs={name: label for name, label in TABS.items() if name in figures},
        figures=figures or no_figures,
        captions=CAPTIONS,
        runs=results.variants,
        variant_index={variant.name: index for index, variant in enumerate(results.variants)},
    )
