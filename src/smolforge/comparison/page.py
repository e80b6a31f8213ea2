"""One page that tells of some runs by itself: no script, nothing fetched, whatever a run wrote shown as text.

index.html   table, figures, samples, settings, what happened        NAME.svg, NAME.png   the same figures for print
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from smolforge import atomic
from smolforge.comparison import history, style, table
from smolforge.comparison.figures import draw_all
from smolforge.comparison.select import Selection
from smolforge.comparison.summaries import compare_settings, environments, samples_by_prompt, timeline

PAGE = "index.html"
TABS = {"loss-tokens": "tokens", "loss-steps": "steps", "loss-seconds": "time"}
CAPTIONS = {
    "learning-rate": ("Learning rate", ""),
    "gradient-norm": ("Gradient norm", "Of all gradients together, before clipping."),
    "speed": ("Speed", "Without the time between steps. Utilisation counts causal attention, after PaLM."),
    "step-time": (
        "Where a step's time goes",
        "Mean of all steps but the first after a start. Between steps lie measuring, sampling and saving.",
    ),
}
COLORS = {
    style.INK: ("ink", "#e6e6e3"),
    style.QUIET: ("quiet", "#9a9a96"),
    style.RULE: ("rule", "#34363a"),
    style.PAPER: ("paper", "#16181b"),
    style.LIGHT: ("on-deep", style.DARK),
    style.BLUE: ("blue", "#4ba3e3"),
    style.VERMILLION: ("vermillion", "#f07f3c"),
    style.GREEN: ("green", "#2fbf94"),
    style.PURPLE: ("purple", "#df9cc3"),
    style.ORANGE: ("orange", "#f2b632"),
    style.SKY: ("sky", "#9ad4f7"),
}
"""A figure's colours: their names on the page, and what they are where it is dark."""


class Swatch(NamedTuple):
    """A run's line, as figures have it."""

    color: str
    dashes: str


def write_page(selection: Selection, out: Path) -> list[Path]:
    """Write the page and the figures into a folder; returns the files, the page first. Raises OSError."""
    atomic.make_dir_durable(out)
    files_by_figure = draw_all(selection.runs, out)
    figures = {
        name: inline_svg(files[0].read_text("utf-8"), name.replace("-", " ")) for name, files in files_by_figure.items()
    }
    page = out / PAGE
    page.write_text(render_page(selection, figures), "utf-8", errors="replace")
    return [page, *(file for files in files_by_figure.values() for file in files)]


def render_page(selection: Selection, figures: dict[str, Markup]) -> str:
    """The page, around figures made ready by `inlined`."""
    runs = selection.runs
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["number"] = table.format_number
    return jinja.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        rows=table.table_rows(selection),
        columns={name: format_cell for name, format_cell in table.COLUMNS.items() if name != "last change"},
        text_columns=table.TEXT_COLUMNS,
        swatches=swatches(len(runs)),
        best=_best_run(table.table_rows(selection)),
        colors=COLORS,
        tabs={name: label for name, label in TABS.items() if name in figures},
        captions={name: caption for name, caption in CAPTIONS.items() if name in figures},
        figures=figures,
        runs=runs,
        mixtures=history.source_totals_by_run(runs),
        samples=samples_by_prompt(runs),
        settings=compare_settings(runs),
        timelines={run.name: list(timeline(run)) for run in runs},
        environments={run.name: list(environments(run)) for run in runs},
    )


def _best_run(rows: Sequence[table.RunRow]) -> str | None:
    """The run with the lowest held-out loss, where there are several to choose from."""
    losses = [(row.validation_loss, row.run) for row in rows if row.validation_loss is not None]
    return min(losses)[1] if len(losses) > 1 else None


def swatches(count: int) -> list[Swatch]:
    """How each run's line looks, in the page's colours; one run alone needs none."""
    if count == 1:
        return []
    return [
        Swatch(_css_color(line_style.color), _svg_dashes(line_style.dashes[1]))
        for line_style in style.line_styles(count)
    ]


def _svg_dashes(lengths: tuple[float, ...]) -> str:
    """Of a line 2.4 wide, whose width matplotlib's lengths are times of, as SVG says them."""
    return " ".join(f"{2.4 * length:g}" for length in lengths)


def inline_svg(svg: str, label: str) -> Markup:
    """An SVG file as a part of the page: in its colours and size, without addresses and repeated ids."""
    body = svg[svg.index("<svg") :]

    def in_page(tag: re.Match[str]) -> str:
        text = re.sub(r' (?:id="[\w.]+_\d+"|xmlns(?::\w+)?="[^"]*")', "", tag[0])
        if text.startswith("<svg"):
            text = re.sub(r' (?:width|height)="[^"]*"', "", text)
        return re.sub(r"#[0-9a-f]{6}\b", lambda match: _css_color(match[0]), text)

    body = re.sub(r"<[^>]*>", in_page, body)
    return Markup(body.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _css_color(color: str) -> str:
    return f"var(--{COLORS[color][0]})" if color in COLORS else color
