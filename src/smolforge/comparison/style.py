"""Style all figures: colors, fonts, lines, legends, files.

Colors are Okabe and Ito's, which colorblind people tell apart (https://jfly.uni-koeln.de/color/). Lines and markers
differ as well, for print without color. A page may replace the colors: each is one word of an SVG.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
INK, QUIET, RULE, PAPER = "#1c1c1c", "#6f6f6f", "#dcdcdc", "#ffffff"
DARK, LIGHT = "#111111", "#fefefe"
"""Of words on a colour, which stay as they are when a page turns dark."""
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
SOLID = (0.0, ())
DASHES = (SOLID, (0.0, (5.0, 1.5)), (0.0, (5.0, 1.5, 1.0, 1.5)), (0.0, (1.5, 1.0)))
MARKERS = "os^Dv"
WIDTH = 7.0
"""Inches: a text's width."""
DPI = 300
MAX_NAME_CHARS = 30
LINE, SAMPLE, LINE_HEIGHT = 88, 7, 0.18
"""Letters in a line of a legend, those a sample takes, and its inches."""
SVG_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
"""What an SVG says of itself, so that the same runs make the same file."""
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.columnspacing": 1.6,
    "legend.handlelength": 2.4,
    "svg.fonttype": "none",  # text stays text: smaller, searchable, and read aloud
    "text.color": INK,
    "text.parse_math": False,  # names are people's own, dollars included
    "xtick.color": QUIET,
    "xtick.labelsize": 9,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelsize": 9,
    "ytick.labelcolor": INK,
}


LegendEntries = Sequence[tuple[str, Artist]]
"""What a legend says: name and sample."""


def dots(marker: str, color: str = QUIET, **settings: Any) -> Line2D:
    """Markers without a line, as a legend shows them."""
    return Line2D([], [], color=color, linestyle="", marker=marker, **settings)


class LineStyle(NamedTuple):
    """What tells one run from the others."""

    color: str
    dashes: tuple[float, tuple[float, ...]]
    marker: str

    def sample(self, alpha: float | None = None, with_marker: bool = True) -> Line2D:
        """The line as a legend shows it."""
        marker = self.marker if with_marker else ""
        return Line2D([], [], color=self.color, linestyle=self.dashes, marker=marker, markersize=4, alpha=alpha)


def line_styles(count: int) -> list[LineStyle]:
    """One for each run, in order: no two of the first 140 alike."""
    combinations = zip(cycle(COLORS), cycle(DASHES), cycle(MARKERS), strict=False)
    return [LineStyle(*values) for values in islice(combinations, count)]


def new_figure(height: float = 3.6) -> Figure:
    """An empty figure, `height` inches high without its legend."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def add_legend(figure: Figure, entries: LegendEntries) -> None:
    """Above the axes, where no data is, in as many columns as have room; the figure grows by what it takes."""
    if not entries:
        return
    names, lines = [printable_name(name) for name, _ in entries], [line for _, line in entries]
    columns = next(count for count in range(len(names), 0, -1) if count == 1 or _legend_width(names, count) <= LINE)
    by_row = [index for column in range(columns) for index in range(column, len(entries), columns)]
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * math.ceil(len(entries) / columns))
    figure.legend(
        [lines[index] for index in by_row],
        [names[index] for index in by_row],
        loc="outside upper left",
        ncols=columns,
        fontsize=9,
    )


def add_title(figure: Figure, title: str) -> None:
    """A title over the legend, which has the top of the figure; it grows by that."""
    for legend in figure.legends:
        legend.set_title(title, prop=FontProperties(size=10))
        legend.set_alignment("left")
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT)


def _legend_width(names: list[str], columns: int) -> int:
    """How wide a legend of so many columns is, with a sample before each name."""
    return sum(max(map(len, names[column::columns])) + SAMPLE for column in range(columns))


def printable_name(name: str) -> str:
    """A name as a figure can show it: not too long, nothing that its letters lack."""
    plain = "".join(letter if letter.isprintable() and ord(letter) in _font_characters() else "?" for letter in name)
    half = MAX_NAME_CHARS // 2
    return plain if len(plain) <= MAX_NAME_CHARS else f"{plain[: half - 1]}\N{HORIZONTAL ELLIPSIS}{plain[-half:]}"


@cache
def _font_characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


@contextmanager
def style_context(salt: str) -> Iterator[None]:
    """Everything is drawn and written in here; the salt keeps the ids of two figures on one page apart."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        yield


def draw_all(figures: Mapping[str, Callable[[], Figure | None]], out: Path) -> dict[str, tuple[Path, Path]]:
    """Draw figures into a folder, each as NAME.svg and NAME.png; returns the files of those that have something."""
    files = {}
    for name, draw in figures.items():
        with style_context(name):
            if figure := draw():
                files[name] = (out / f"{name}.svg", out / f"{name}.png")
                for file in files[name]:
                    write_figure(figure, file)
    return files


def write_figure(figure: Figure, file: Path) -> None:
    """A PNG, or an SVG that says neither when nor by what it was made."""
    figure.savefig(file, dpi=DPI, metadata=SVG_METADATA if file.suffix == ".svg" else {"Software": None})


def finish_axes(axes: Axes, entries: LegendEntries = (), **settings: Any) -> None:
    """Set labels, limits, short ticks, margins at the sides, and the legend of the figure."""
    axes.set(**settings)
    axes.tick_params(length=3, width=0.6)
    axes.margins(x=0.015)
    assert isinstance(axes.figure, Figure)
    add_legend(axes.figure, entries)
