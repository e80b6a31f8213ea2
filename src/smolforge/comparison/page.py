"""Show a report as one HTML page, and as Markdown. What is in it comes from runs or from a study.

index.html   tables, figures, samples, settings, what happened       NAME.svg, NAME.png   the same figures for print

The page tells its story by itself: no script, nothing fetched, whatever a run wrote shown as text.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from smolforge import atomic
from smolforge.comparison import style

PAGE, MISSING = "index.html", "-"
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


class Table(NamedTuple):
    """Rows of cells under a heading each, the first column words."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Collection[str] = ()
    """Other columns of words, which begin at the left."""
    best: tuple[str, str] | None = None
    """First cell of a row, and heading of a column: the cell there stands out."""


@dataclass(frozen=True)
class Report:
    """What a page shows, first to last; in figures and tables each name has the same line."""

    kind: Literal["runs", "study"]
    title: str
    names: Sequence[str]
    tables: Sequence[Table]
    """The first stands above the figures, the others below."""
    tabs: Mapping[str, str]
    """Figures of which one at a time is shown, and what each is over."""
    captions: Mapping[str, tuple[str, str]]
    """Heading and caption of each figure."""
    opening: Sequence[str] = ()
    failed: Sequence[str] = ()
    """Runs that did not come to their end."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only a page of runs has."""


def format_number(value: float | None, spec: str) -> str:
    """Return the value as text, or a dash if it is missing."""
    return MISSING if value is None else format(value, spec)


def render_markdown(report: Report, figures: Sequence[str]) -> str:
    """Return the report in Markdown, with links to these figures."""
    lines = [f"# {report.title}", ""]
    for paragraph in report.opening:
        lines += [paragraph, ""]
    for table in report.tables:
        rows = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        lines += [f"## {table.title}", "", *map(markdown_row, rows), ""]
    if report.failed:
        lines += ["## Runs that did not come to their end", "", *(f"- {reason}" for reason in report.failed), ""]
    for name in figures:
        lines += [f"![{name.replace('-', ' ')}]({name}.svg)", "", report.captions[name][1], ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def write_page(report: Report, figures: Mapping[str, Callable[[], Figure | None]], out: Path) -> list[Path]:
    """Write the page and the figures into a folder; returns the files, the page first. Raises OSError."""
    atomic.make_dir_durable(out)
    files = style.draw_all(figures, out)
    inlined = {name: inline_svg(svg.read_text("utf-8"), name.replace("-", " ")) for name, (svg, _) in files.items()}
    page = render_page(report, inlined).encode("utf-8", "replace").decode()
    atomic.write_text_atomic(out / PAGE, page)
    return [out / PAGE, *(file for pair in files.values() for file in pair)]


def render_page(report: Report, figures: Mapping[str, Markup]) -> str:
    """The page, around figures made ready by `inline_svg`."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = zip(report.names, style.line_styles(len(report.names)), strict=True) if len(report.names) > 1 else ()
    return jinja.get_template("page.html").render(
        report=report,
        title=report.title,
        figures=figures,
        tabs={name: label for name, label in report.tabs.items() if name in figures},
        colors=COLORS,
        swatches={name: (_css_color(line.color), _svg_dashes(line.dashes[1])) for name, line in styles},
        **report.details,
    )


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
