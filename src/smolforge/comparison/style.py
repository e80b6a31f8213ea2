"""How figures look: what tells runs apart, type, lines, legends, files.

Colours are Okabe and Ito's, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/); lines and markers
differ as well, for print without colour. A page may put its own in their place: each is one word of an SVG.

Where a step's time goes: stacked parts, one bar a run.
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

from smolforge.comparison.history import History

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
LONGEST_NAME = 30
LINE, SAMPLE, LINE_HEIGHT = 88, 7, 0.18
"""Letters in a line of a legend, those a sample takes, and its inches."""
NOTHING = dict.fromkeys(("Date", "Creator", "Format", "Type"))
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


Key = list[tuple[str, Artist]]
"""What a legend says: name and sample."""


class Look(NamedTuple):
    """What tells one run from the others."""

    color: str
    dashes: tuple[float, tuple[float, ...]]
    marker: str


def looks(count: int) -> list[Look]:
    """One for each run, in order: no two of the first 140 alike."""
    every = zip(cycle(COLORS), cycle(DASHES), cycle(MARKERS), strict=False)
    return [Look(*each) for each in islice(every, count)]


def canvas(height: float = 3.6) -> Figure:
    """An empty figure, `height` inches high without its legend."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend(figure: Figure, key: Key) -> None:
    """Above the axes, where no data is, in as many columns as have room; the figure grows by what it takes."""
    if not key:
        return
    names, lines = [drawable(name) for name, _ in key], [line for _, line in key]
    columns = next(count for count in range(len(names), 0, -1) if count == 1 or _letters_wide(names, count) <= LINE)
    by_row = [index for column in range(columns) for index in range(column, len(key), columns)]
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * math.ceil(len(key) / columns))
    figure.legend(
        [lines[index] for index in by_row],
        [names[index] for index in by_row],
        loc="outside upper left",
        ncols=columns,
        fontsize=9,
    )


def headed(figure: Figure, title: str) -> None:
    """A title over the legend, which has the top of the figure; it grows by that."""
    for each in figure.legends:
        each.set_title(title, prop=FontProperties(size=10))
        each.set_alignment("left")
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT)


def _letters_wide(names: list[str], columns: int) -> int:
    """How wide a legend of so many columns is, with a sample before each name."""
    return sum(max(map(len, names[column::columns])) + SAMPLE for column in range(columns))


def drawable(name: str) -> str:
    """A name as a figure can show it: not too long, nothing that its letters lack."""
    plain = "".join(each if each.isprintable() and ord(each) in _letters() else "?" for each in name)
    half = LONGEST_NAME // 2
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: half - 1]}\N{HORIZONTAL ELLIPSIS}{plain[-half:]}"


@cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


@contextmanager
def styled(salt: str) -> Iterator[None]:
    """Everything is drawn and written in here; the salt keeps the ids of two figures on one page apart."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        yield


def save(draw: Callable[[], Figure | None], stem: Path) -> list[Path]:
    """Draw, and write it as `stem`.svg and .png; no files where there is nothing to draw."""
    with styled(stem.name):
        figure = draw()
        if figure is None:
            return []
        files = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
        for file in files:
            write(figure, file)
    return files


def write(figure: Figure, file: Path) -> None:
    """A PNG, or an SVG that says neither when nor by what it was made."""
    figure.savefig(file, dpi=DPI, metadata=NOTHING if file.suffix == ".svg" else {"Software": None})


def ruled(axes: Axes) -> None:
    """Short ticks, a little room at the sides."""
    axes.tick_params(length=3, width=0.6)
    axes.margins(x=0.015)


KINDS = {
    "data": ("waiting for data", "#8c8c8c", DARK),
    "forward": ("forward", SKY, DARK),
    "backward": ("backward", BLUE, LIGHT),
    "optimizer": ("optimizer", ORANGE, DARK),
    "other": ("other", GREEN, LIGHT),
    "between": ("between steps", PURPLE, DARK),
}
"""Of each part: its name, its colour, the colour of a word on it."""
WIDE_ENOUGH = 0.08
"""Of the whole width, for a number to stand inside."""


def mean_parts(run: History) -> dict[str, float]:
    """Seconds a step, for each part the run knows; the first step of each start, which compiles, is left out."""
    first = [0, *run.resumes]
    usual = ~np.isin(run.at - 1, first)
    kept = usual if usual.any() else np.ones_like(usual)
    return {part: float(np.nanmean(values[kept])) for part, values in run.parts.items() if _any(values[kept])}


def _any(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def step_time(runs: Sequence[History]) -> Figure | None:
    """One bar for each run that knows its parts, the first on top."""
    known = [(run, mean_parts(run)) for run in runs if run.parts]
    if not known:
        return None
    longest = max(sum(parts.values()) for _, parts in known)
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms")
    figure = canvas(0.7 + 0.42 * len(known))
    axes = figure.subplots()
    for row, (_, parts) in enumerate(known):
        _bar(axes, row, {part: seconds * scale for part, seconds in parts.items()}, longest * scale, unit)
    axes.set_yticks(range(len(known)), [drawable(run.name) for run, _ in known])
    axes.set(xlabel=f"{_A[unit]} per step", xlim=(0, 1.1 * longest * scale), ylim=(len(known) - 0.45, -0.55))
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    seen = [part for part in KINDS if any(part in parts for _, parts in known)]
    legend(figure, [(KINDS[part][0], Patch(color=KINDS[part][1])) for part in seen])
    return figure


_A = {"s": "seconds", "ms": "milliseconds"}


def _bar(axes: Axes, row: int, parts: dict[str, float], longest: float, unit: str) -> None:
    """Parts one after the other, the whole at the end."""
    left = 0.0
    for part, (_, color, word) in KINDS.items():
        width = parts.get(part, 0.0)
        axes.barh(row, width, left=left, height=0.62, color=color, edgecolor=PAPER, linewidth=0.8)
        if width > WIDE_ENOUGH * longest:
            axes.text(left + width / 2, row, _number(width), ha="center", va="center", fontsize=8.5, color=word)
        left += width
    axes.text(left + 0.008 * longest, row, f"{_number(left)} {unit}", ha="left", va="center", fontsize=9)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
