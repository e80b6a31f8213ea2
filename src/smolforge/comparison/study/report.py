"""A study's findings for people: report.md, index.html, the figures, and study.json with every number."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from smolforge import commit
from smolforge.comparison import page, style
from smolforge.comparison.statistics import POWER, Difference
from smolforge.comparison.study.figures import FIGURES
from smolforge.comparison.study.findings import UNITS, Findings, Variant
from smolforge.comparison.study.plan import UNITS as BUDGETS
from smolforge.comparison.told import written

REPORT, NUMBERS = "report.md", "study.json"
TABS = {"loss-tokens": "tokens", "loss-flops": "FLOPs", "loss-seconds": "time"}
CAPTIONS = {
    "loss-tokens": "Means over seeds, all seeds as a band; of the beginning, what lies above the frame is cut.",
    "loss-flops": "Matrix FLOPs, attention counted as causal.",
    "loss-seconds": "Of training, measuring and saving included, on a machine that may have had other things to do.",
    "difference": "Below zero is better than the baseline.",
}
NOTHING = "-"


class Table(NamedTuple):
    """A heading, and rows of which the first column is words."""

    title: str
    head: list[str]
    rows: list[list[str]]


def write(found: Findings, out: Path) -> list[Path]:
    """Write all of it into a folder; returns the files, the page first. Raises OSError."""
    drawn = {name: style.save(partial(draw, found), out / name) for name, draw in FIGURES.items()}
    drawn = {name: files for name, files in drawn.items() if files}
    pages = {page.PAGE: html(found, drawn), REPORT: markdown(found, list(drawn)), NUMBERS: numbers(found)}
    for name, text in pages.items():
        commit.replace(out / name, text)
    return [*(out / name for name in pages), *(file for files in drawn.values() for file in files)]


def numbers(found: Findings) -> str:
    return json.dumps(found.as_json(), indent=2, allow_nan=False) + "\n"


def tables(found: Findings) -> list[Table]:
    """What both reports have."""
    several = [results(found), costs(found), changes(found)]
    return [*several, *([learning_rates(found)] if any(each.rates for each in found.variants) else [])]


def results(found: Findings) -> Table:
    settings = found.study.settings
    sure = f"{1 - settings.alpha:.0%}"
    head = ["variant", "n", f"{settings.metric.replace('_', ' ')}, mean ± deviation"]
    head += ["difference", f"{sure} interval", "p (Holm)", "smallest visible", "verdict"]
    rows = [[*losses(each), *compared(each.difference), each.verdict] for each in found.variants]
    return Table("What came of it", head, rows)


def losses(variant: Variant) -> list[str]:
    mean = NOTHING if variant.mean is None else f"{variant.mean:.4f}"
    spread = "" if variant.spread is None else f" ± {variant.spread:.4f}"
    return [variant.name, str(len(variant.values)), mean + spread]


def compared(made: Difference | None) -> list[str]:
    if made is None or made.mean is None:
        return [NOTHING] * 4
    interval = NOTHING if made.low is None or made.high is None else f"{made.low:+.4f} to {made.high:+.4f}"
    p = NOTHING if made.adjusted_p is None else f"{made.adjusted_p:.2g}"
    visible = NOTHING if made.smallest_visible is None else f"{made.smallest_visible:.4f}"
    return [f"{made.mean:+.4f}", interval, p, visible]


def costs(found: Findings) -> Table:
    head = ["variant", "parameters", "active", "FLOPs a token", "KV bytes a token (fp32)", "memory, predicted"]
    head += ["steps", "tokens", "FLOPs", "tokens/s", "seconds"]
    rows = []
    for each in found.variants:
        cost, speed = each.cost, each.speed
        sizes = ("parameters", "active", "flops_per_token", "kv_bytes_per_token")
        row = [each.name, *(f"{cost[name]:,}" for name in sizes), f"{cost['predicted_memory_bytes'] / 2**20:,.0f} MiB"]
        row += [f"{each.steps:,}", f"{cost['tokens']:,}", f"{cost['flops']:.3g}"]
        row += [f"{speed['tokens_per_second']:,.0f}", f"{speed['seconds']:,.1f}"] if speed else [NOTHING] * 2
        rows.append(row)
    return Table("What it cost, a run", head, rows)


def changes(found: Findings) -> Table:
    names = list(dict.fromkeys(name for each in found.variants for name in each.changes))
    rows = [
        [each.name, *(written(each.changes[name]) if name in each.changes else NOTHING for name in names)]
        for each in found.variants
    ]
    return Table("What each changes in the recipe", ["variant", *names], rows)


def learning_rates(found: Findings) -> Table:
    factors = found.study.settings.learning_rates
    rows = []
    for each in found.variants:
        if each.rates is None:
            continue
        means = [each.rates.means.get(factor) for factor in factors]
        chosen = NOTHING if each.rates.factor is None else f"{each.rates.factor:g}"
        said = "at the end of what was tried: a better one may lie beyond" if each.rates.at_the_end else ""
        rows.append([each.name, *(NOTHING if mean is None else f"{mean:.4f}" for mean in means), chosen, said])
    seeds = ", ".join(map(str, found.study.settings.learning_rate_seeds))
    head = ["variant", *(f"x {factor:g}" for factor in factors), "chosen", ""]
    return Table(f"Learning rates, tried with seed {seeds}", head, rows)


def opening(found: Findings) -> list[str]:
    """What was chosen before the first run, and how to read it."""
    settings, count = found.study.settings, len(found.variants) - 1
    amount, common = settings.budget.amount, found.study.common
    budget = f"{f'{amount:,.0f}' if 100 <= amount < 1e12 else f'{amount:g}'} {BUDGETS[settings.budget.kind]}"
    changed = ", ".join(f"{name} {written(value)}" for name, value in common.items())
    several = f", after Holm for {count} variants" if count > 1 else ""
    return [
        f"Every run had {budget}; seeds {', '.join(map(str, settings.seeds))}; all else is the recipe "
        f"{found.study.recipe.stem}{f' with {changed}' if changed else ''}.",
        f"Differences are to {settings.baseline}, in {UNITS[settings.metric]}, less is better. Chosen before the runs: "
        f"{settings.test}, alpha {settings.alpha:g}{several}. A true difference as large as the smallest visible one "
        f"would have been called {POWER:.0%} of the time.",
    ]


def shortfalls(found: Findings) -> list[str]:
    """Runs that did not come to their end."""
    return [f"{run}: {why}" for variant in found.variants for run, why in variant.failed.items()]


def markdown(found: Findings, figures: Sequence[str]) -> str:
    lines = [f"# {found.study.name}", ""]
    for said in opening(found):
        lines += [said, ""]
    for table in tables(found):
        lines += [f"## {table.title}", "", row(table.head), row(["---", *["---:"] * (len(table.head) - 1)])]
        lines += [*map(row, table.rows), ""]
    if failed := shortfalls(found):
        lines += ["## Runs that did not come to their end", "", *(f"- {said}" for said in failed), ""]
    for name in figures:
        lines += [f"![{name.replace('-', ' ')}]({name}.svg)", "", CAPTIONS[name], ""]
    return "\n".join(lines).rstrip() + "\n"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def html(found: Findings, drawn: dict[str, list[Path]]) -> str:
    """The page by itself: no script, nothing fetched."""
    shelf = Environment(
        loader=FileSystemLoader(Path(page.__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {name: page.inlined(files[0].read_text("utf-8"), name.replace("-", " ")) for name, files in drawn.items()}
    none: dict[str, Markup] = {}
    return shelf.get_template("study/report.html").render(
        title=found.study.name,
        opening=opening(found),
        tables=tables(found),
        failed=shortfalls(found),
        swatches=page.swatches(len(found.variants)),
        colors=page.COLORS,
        tabs={name: word for name, word in TABS.items() if name in figures},
        figures=figures or none,
        captions=CAPTIONS,
        runs=found.variants,
    )
