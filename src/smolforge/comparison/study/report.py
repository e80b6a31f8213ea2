"""A study's findings for people: report.md, index.html, the figures, and study.json with every number."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from smolforge import commit
from smolforge.comparison import page, style
from smolforge.comparison.statistics import POWER
from smolforge.comparison.study.figures import FIGURES, NAMES, UNITS
from smolforge.comparison.study.plan import UNITS as BUDGETS
from smolforge.comparison.study.record import Findings
from smolforge.comparison.study.tables import tables
from smolforge.comparison.told import written

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
    commit.make_folder(out)
    drawn = {name: style.save(partial(draw, found), out / name) for name, draw in FIGURES.items()}
    drawn = {name: files for name, files in drawn.items() if files}
    pages = {page.PAGE: html(found, drawn), REPORT: markdown(found, list(drawn)), NUMBERS: numbers(found)}
    for name, text in pages.items():
        commit.replace(out / name, text)
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
