"""Style all figures: colors, fonts, lines, legends, files. Draw step times as stacked bars, one for each run.

Colors are Okabe and Ito's, which colorblind people tell apart (https://jfly.uni-koeln.de/color/). Lines and markers
differ as well, for print without color. A page may replace the colors: each is one word of an SVG.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch

from smolforge.comparison.history import RunHistory

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


LegendEntries = list[tuple[str, Artist]]
"""What a legend says: name and sample."""
PHASE_STYLES = {
    "data": ("waiting for data", "#8c8c8c", DARK),
    "forward": ("forward", SKY, DARK),
    "backward": ("backward", BLUE, LIGHT),
    "optimizer": ("optimizer", ORANGE, DARK),
    "other": ("other", GREEN, LIGHT),
    "between": ("between steps", PURPLE, DARK),
}
"""Of each part: its name, its colour, the colour of a word on it."""
MIN_LABEL_SHARE = 0.08
"""Of the whole width, for a number to stand inside."""
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds"}


class LineStyle(NamedTuple):
    """What tells one run from the others."""

    color: str
    dashes: tuple[float, tuple[float, ...]]
    marker: str


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


def draw_and_save(draw: Callable[[], Figure | None], stem: Path) -> list[Path]:
    """Draw, and write it as `stem`.svg and .png; no files where there is nothing to draw."""
    with style_context(stem.name):
        figure = draw()
        if figure is None:
            return []
        files = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
        for file in files:
            write_figure(figure, file)
    return files


def write_figure(figure: Figure, file: Path) -> None:
    """A PNG, or an SVG that says neither when nor by what it was made."""
    figure.savefig(file, dpi=DPI, metadata=SVG_METADATA if file.suffix == ".svg" else {"Software": None})


def style_axes(axes: Axes) -> None:
    """Short ticks, a little room at the sides."""
    axes.tick_params(length=3, width=0.6)
    axes.margins(x=0.015)


def mean_phase_seconds(run: RunHistory) -> dict[str, float]:
    """Seconds a step, for each part the run knows; the first step of each start, which compiles, is left out."""
    first_steps = [0, *run.resumes]
    after_first = ~np.isin(run.record_steps - 1, first_steps)
    included = after_first if after_first.any() else np.ones_like(after_first)
    return {
        phase: float(np.nanmean(values[included]))
        for phase, values in run.phase_seconds.items()
        if _has_values(values[included])
    }


def _has_values(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def step_time_figure(runs: Sequence[RunHistory]) -> Figure | None:
    """One bar for each run that knows its parts, the first on top."""
    runs_with_phases = [(run, mean_phase_seconds(run)) for run in runs if run.phase_seconds]
    if not runs_with_phases:
        return None
    max_seconds = max(sum(phase_seconds.values()) for _, phase_seconds in runs_with_phases)
    scale, unit = (1.0, "s") if max_seconds >= 1 else (1e3, "ms")
    figure = new_figure(0.7 + 0.42 * len(runs_with_phases))
    axes = figure.subplots()
    for row, (_, phase_seconds) in enumerate(runs_with_phases):
        _draw_bar(
            axes,
            row,
            {phase: seconds * scale for phase, seconds in phase_seconds.items()},
            max_value=max_seconds * scale,
            unit=unit,
        )
    axes.set_yticks(range(len(runs_with_phases)), [printable_name(run.name) for run, _ in runs_with_phases])
    axes.set(
        xlabel=f"{_UNIT_NAMES[unit]} per step",
        xlim=(0, 1.1 * max_seconds * scale),
        ylim=(len(runs_with_phases) - 0.45, -0.55),
    )
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    phases = [phase for phase in PHASE_STYLES if any(phase in phase_seconds for _, phase_seconds in runs_with_phases)]
    add_legend(figure, [(PHASE_STYLES[phase][0], Patch(color=PHASE_STYLES[phase][1])) for phase in phases])
    return figure


def _draw_bar(axes: Axes, row: int, phase_values: dict[str, float], *, max_value: float, unit: str) -> None:
    """Parts one after the other, the whole at the end."""
    left = 0.0
    for phase, (_, color, text_color) in PHASE_STYLES.items():
        width = phase_values.get(phase, 0.0)
        axes.barh(row, width, left=left, height=0.62, color=color, edgecolor=PAPER, linewidth=0.8)
        if width > MIN_LABEL_SHARE * max_value:
            axes.text(
                left + width / 2, row, _format_seconds(width), ha="center", va="center", fontsize=8.5, color=text_color
            )
        left += width
    axes.text(left + 0.008 * max_value, row, f"{_format_seconds(left)} {unit}", ha="left", va="center", fontsize=9)


def _format_seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
