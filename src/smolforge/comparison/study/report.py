"""A study's findings for people: report.md, index.html, the figures, and study.json with every number.

A study's tables, as both reports have them: rows of words, the first column of most the variant.
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
from smolforge.comparison.statistics import POWER, Difference
from smolforge.comparison.study.figures import FIGURES, NAMES, UNITS
from smolforge.comparison.study.plan import UNITS as BUDGETS
from smolforge.comparison.study.results import Findings, Mean, Variant
from smolforge.comparison.summaries import written

NOTHING = "-"
TIMES = ("tokens_per_second", "seconds")


class Table(NamedTuple):
    """A heading, and rows of which the first column is words."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(found: Findings) -> list[Table]:
    """What both reports have."""
    several = [results(found), *([predictions(found)] if found.law else []), also(found), costs(found), speeds(found)]
    return [*several, changes(found), *([learning_rates(found)] if any(each.rates for each in found.variants) else [])]


def results(found: Findings) -> Table:
    settings = found.settings
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


def also(found: Findings) -> Table:
    """What else the trained models were measured on; more is better."""
    names = list(dict.fromkeys(name for each in found.variants for name in each.also))
    rows = [[each.name, *(share(each.also.get(name)) for name in names)] for each in found.variants]
    said = {"validation_accuracy": "held-out accuracy"}
    return Table(
        "What else was measured", ["variant", *(said.get(name, name.replace(".", " ")) for name in names)], rows
    )


def share(of: Mean | None) -> str:
    if of is None:
        return NOTHING
    return f"{of.mean:.2%}" + ("" if of.spread is None else f" ± {100 * of.spread:.2f}")


def costs(found: Findings) -> Table:
    head = ["variant", "parameters", "active", "FLOPs a token", "KV bytes a token (fp32)", "memory, predicted"]
    head += ["steps", "tokens", "FLOPs"]
    rows = []
    for each in found.variants:
        cost = each.cost
        sizes = ("parameters", "active", "flops_per_token", "kv_bytes_per_token")
        row = [each.name, *(f"{cost[name]:,}" for name in sizes), mebibytes(cost["predicted_memory_bytes"])]
        rows.append([*row, f"{each.steps:,}", f"{cost['tokens']:,}", f"{cost['flops']:.3g}".replace("e+", "e")])
    return Table("What it cost, a run", head, rows)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def speeds(found: Findings) -> Table:
    """What depends on the machine, and on what else it had to do."""
    head = ["variant", "training, tokens/s", "seconds a run", "decoding, tokens/s: median (lowest to highest)"]
    rows = []
    for each in found.variants:
        train, seconds = (Mean(**speed) if (speed := each.speed.get(name)) else None for name in TIMES)
        decoding, memory = each.speed.get("decode_tokens_per_second"), each.speed.get("peak_memory_bytes")
        row = [each.name, rate(train, 0), rate(seconds, 1), rounds(decoding) if decoding else NOTHING]
        rows.append([*row, NOTHING if memory is None else mebibytes(memory)])
    where = " and ".join(dict.fromkeys(run.speed["machine"] for run in found.runs.values()))
    return Table(f"How fast it was on {where or 'this machine'}", [*head, "memory of training, measured"], rows)


def rate(of: Mean | None, digits: int) -> str:
    if of is None:
        return NOTHING
    return f"{of.mean:,.{digits}f}" + ("" if of.spread is None else f" ± {of.spread:,.{digits}f}")


def rounds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def predictions(found: Findings) -> Table:
    """What the small sizes say of the larger ones, and what came."""
    made, sure = found.law, f"{1 - found.settings.alpha:.0%}"
    assert made is not None
    head = ["variant", "predicted", f"{sure} interval", "measured", "measured - predicted", "its interval"]
    rows = []
    for each in made.predictions:
        row = [each.name, f"{each.predicted:.4f}", f"{each.low:.4f} to {each.high:.4f}", f"{each.measured:.4f}"]
        gap = each.measured - each.predicted
        rows.append([*row, f"{gap:+.4f}", f"{each.missed_low:+.4f} to {each.missed_high:+.4f}"])
    return Table("What the sizes predicted", head, rows)


def changes(found: Findings) -> Table:
    """A row for each setting, since they are many and variants few."""
    names = list(dict.fromkeys(name for each in found.variants for name in each.changes))
    rows = [
        [name, *(written(each.changes[name]) if name in each.changes else NOTHING for each in found.variants)]
        for name in names
    ]
    return Table("What each changes in the recipe", ["setting", *(each.name for each in found.variants)], rows)


def learning_rates(found: Findings) -> Table:
    factors = found.settings.learning_rates
    rows = []
    for each in found.variants:
        if each.rates is None:
            continue
        means = [each.rates.means.get(factor) for factor in factors]
        chosen = NOTHING if each.rates.factor is None else f"{each.rates.factor:g}"
        said = "at the end of what was tried: a better one may lie beyond" if each.rates.at_the_end else ""
        rows.append([each.name, *(NOTHING if mean is None else f"{mean:.4f}" for mean in means), chosen, said])
    seeds = ", ".join(map(str, found.settings.learning_rate_seeds))
    head = ["variant", *(f"x {factor:g}" for factor in factors), "chosen", ""]
    return Table(f"Learning rates, tried with seed {seeds}", head, rows)


REPORT, NUMBERS = "report.md", "study.json"
TABS = {"loss-tokens": "tokens", "loss-flops": "FLOPs", "loss-seconds": "time"}
CAPTIONS = {
    "loss-tokens": "Means over seeds, all seeds as a band; of the beginning, what lies above the frame is cut.",
    "loss-flops": "Matrix FLOPs, attention counted as causal.",
    "loss-seconds": "Of training, measuring and saving included, on a machine that may have had other things to do.",
    "difference": "Below zero is better than the baseline.",
    "law": "Each seed as a point; the line is fitted to the filled means, and dashed where it predicts.",
}


def write(found: Findings, out: Path) -> list[Path]:
    """Write all of it into a folder; returns the files, the page first. Raises OSError."""
    atomic.make_folder(out)
    drawn = {name: style.save(partial(draw, found), out / name) for name, draw in FIGURES.items()}
    drawn = {name: files for name, files in drawn.items() if files}
    pages = {page.PAGE: html(found, drawn), REPORT: markdown(found, list(drawn)), NUMBERS: numbers(found)}
    for name, text in pages.items():
        atomic.replace(out / name, text)
    return [*(out / name for name in pages), *(file for files in drawn.values() for file in files)]


def numbers(found: Findings) -> str:
    return json.dumps(found.as_json(), indent=2, allow_nan=False) + "\n"


def opening(found: Findings) -> list[str]:
    """What was chosen before the first run, and how to read it."""
    settings, count = found.settings, len(found.variants) - 1
    amount, common = settings.budget.amount, found.common
    budget = f"{f'{amount:,.0f}' if 100 <= amount < 1e12 else power_of_ten(amount)} {BUDGETS[settings.budget.kind]}"
    changed = ", ".join(f"{name} {written(value)}" for name, value in common.items())
    several = f", after Holm for {count} variants" if count > 1 else ""
    return [
        f"Every run had {budget}; seeds {', '.join(map(str, settings.seeds))}; all else is the recipe "
        f"{found.recipe}{f' with {changed}' if changed else ''}.",
        f"Differences are to {settings.baseline}, in {UNITS[settings.metric]}, less is better. Chosen before the runs: "
        f"{settings.test}, alpha {settings.alpha:g}{several}. A true difference as large as the smallest visible one "
        f"would have been called {POWER:.0%} of the time.",
    ]


def power_of_ten(amount: float) -> str:
    return f"{amount:g}".replace("e+", "e")


def about_law(found: Findings) -> list[str]:
    """The law in words, and how far to trust it."""
    made, chosen = found.law, found.settings.law
    if chosen is None:
        return []
    if made is None:
        return ["No law could be fitted: no seed was finished by every size, or the floor is not below every loss."]
    power, (low, high), (least, most) = made.power, made.exponents, made.floors
    metric, sizes = NAMES[found.settings.metric], "FLOPs" if made.over == "flops" else made.over
    floor = f"{power.floor:.4g} + " if power.floor else ""
    formula = f"{metric} = {floor}{power.scale:.4g} / N^{power.exponent:.4f}, N being {sizes}"
    fit = f"fitted to the means of {', '.join(made.fitted)} over {len(made.seeds)} seeds"
    lines = [f"{formula}; {fit}. The exponent is {low:.4f} to {high:.4f} over draws of the seeds."]
    if chosen.floor == "fitted":
        lines.append(
            f"The floor was fitted too, and is {least:.3g} to {most:.3g} over draws of the seeds: where that is wide, "
            "these sizes do not tell it apart from the exponent."
        )
    else:
        lines.append(
            f"The floor of {chosen.floor:g} was chosen before the runs, since few sizes do not tell it apart from the "
            "exponent; a higher one would predict a higher loss beyond the sizes fitted."
        )
    return [*lines, "The intervals are of the seeds alone. Whether the law holds is what the prediction tries."]


def shortfalls(found: Findings) -> list[str]:
    """Runs that did not come to their end."""
    return [f"{run}: {why}" for variant in found.variants for run, why in variant.failed.items()]


def markdown(found: Findings, figures: Sequence[str]) -> str:
    lines = [f"# {found.study}", ""]
    for said in [*opening(found), *about_law(found)]:
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
        title=found.study,
        opening=[*opening(found), *about_law(found)],
        tables=tables(found),
        failed=shortfalls(found),
        swatches=page.swatches(len(found.variants)),
        colors=page.COLORS,
        tabs={name: word for name, word in TABS.items() if name in figures},
        figures=figures or none,
        captions=CAPTIONS,
        runs=found.variants,
        places={each.name: place for place, each in enumerate(found.variants)},
    )
