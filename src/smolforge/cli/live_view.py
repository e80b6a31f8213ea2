"""The live view of a run: how far it is, its loss and speed as curves, the figures of now, the last text.

step ━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━ 180/300 0:01:47
loss         4.912  █▆▅▄▄▃▃▂▂▂▁▁▁▁  4.88 to 8.78
tokens/s     5,591  ▇▇█▇▇▇▇█▇▇▇▇▇▇  0 to 5,702
MFU 40%  lr 1.50e-02  grad 1.16  0.71 GiB  33 s left

Numbers drawn with Unicode's block characters: bars and sparklines, for terminals.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

LEVELS = "▁▂▃▄▅▆▇"
"""Without the full block, so that curves below each other do not touch."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
BROKEN = "!"
"""Stands where a number is none: seldom, and it must be seen."""


def bar(share: float, width: int) -> str:
    """A share of 1 fills the width; one that is not zero shows."""
    eighths = max(round(8 * width * min(1.0, max(0.0, share))), int(share > 0))
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def sparkline(values: Sequence[float | None], width: int, ends: tuple[float, float] | None = None) -> str:
    """All values, oldest first, in at most so many characters, each the mean of as many neighbours as any other.

    The lowest block is the least of all values, and the highest the greatest, unless other `ends` are given.
    """
    ends = ends or extent(values)
    cells = squeezed(values, width)
    if ends is None:
        return BROKEN * len(cells)
    return "".join(BROKEN if cell is None else LEVELS[level(cell, *ends)] for cell in cells)


def extent(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Least and greatest of what is a finite number."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return (min(finite), max(finite)) if finite else None


def level(value: float, least: float, greatest: float) -> int:
    """Which of LEVELS; the middle where nothing ever changed."""
    span = greatest / 2 - least / 2  # of halves, which do not overflow
    if span <= 0:
        return len(LEVELS) // 2
    return max(0, min(len(LEVELS) - 1, int((value / 2 - least / 2) / span * len(LEVELS))))


def squeezed(values: Sequence[float | None], width: int) -> list[float | None]:
    """At most `width` means of neighbours; None where one of them is no finite number."""
    count = max(0, min(len(values), width))
    edges = [len(values) * place // count for place in range(count + 1)] if count else []
    return [mean(values[first:last]) for first, last in pairwise(edges)]


def mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < len(values):
        return None
    return math.fsum(value / len(finite) for value in finite)


MOST_CELLS = 512
"""More than a terminal is wide, and few enough to draw four times a second."""
SAMPLE_LETTERS = 600
NAMES = 20
"""Columns of a curve's name and value."""
WIDE = 60
"""Columns, from which on there is room for a curve's scale."""


class Cell(NamedTuple):
    """Neighbouring steps, the last of them, and what their values sum up to."""

    last: int
    count: int
    total: float

    def joined(self, later: "Cell") -> "Cell":
        return Cell(later.last, self.count + later.count, self.total + later.total)


class Curve:
    """Values over all steps of a start, as means of neighbours, so that a million steps take no more room."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.stride = 1
        """Steps of a full cell."""

    def add(self, step: int, value: float | None) -> None:
        """Going back forgets what came after."""
        while self.cells and self.cells[-1].last >= step:
            self.cells.pop()
        one = Cell(step, 1, math.nan if value is None else value)
        if self.cells and self.cells[-1].count < self.stride:
            self.cells[-1] = self.cells[-1].joined(one)
        else:
            self.cells.append(one)
        if len(self.cells) > MOST_CELLS:
            pairs = [self.cells[place : place + 2] for place in range(0, len(self.cells), 2)]
            self.cells = [pair[0].joined(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
            self.stride *= 2

    def values(self) -> list[float]:
        """Oldest first; not finite where one of the values was not."""
        return [cell.total / cell.count for cell in self.cells]


class Board:
    """What there is to see of a start; drawn as wide as the terminal is at that moment."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss, self.speed = Curve(), Curve()
        self.now: dict[str, Any] = {}
        self.figures: list[str] = []
        self.sample = ""

    def stepped(self, metrics: dict[str, Any], figures: list[str]) -> None:
        """The first step of a start compiles and allocates: its speed says nothing of the others."""
        self.now, self.figures = metrics, figures
        self.loss.add(metrics["step"], metrics["loss"])
        if "tokens_per_second_median" in metrics:
            self.speed.add(metrics["step"], metrics["tokens_per_second"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        yield self.progress
        if not self.now:
            return
        rate = self.now.get("tokens_per_second_median", self.now["tokens_per_second"])
        yield from rows(
            Shown("loss", f"{self.now['loss']:.3f}", self.loss.values(), "{:.2f}".format, "cyan"),
            Shown("tokens/s", f"{rate:,.0f}", self.speed.values(), "{:,.0f}".format, "green", from_zero=True),
            width=width,
        )
        yield from (Text(line, no_wrap=True, overflow="ellipsis") for line in packed(self.figures, width))
        if self.sample:
            text = Text(" ".join(self.sample.split())[-SAMPLE_LETTERS:], no_wrap=False, overflow="fold")
            yield Panel(text, title="last sample", width=width)


class Shown(NamedTuple):
    """A curve with a name and the present value; how its scale is said, which begins at 0 or the least value."""

    name: str
    value: str
    values: Sequence[float]
    said: Callable[[float], str]
    style: str
    from_zero: bool = False

    @property
    def ends(self) -> tuple[float, float] | None:
        ends = extent(self.values)
        return (0.0, ends[1]) if ends and self.from_zero else ends

    @property
    def scale(self) -> str:
        return f"  {self.said(self.ends[0])} to {self.said(self.ends[1])}" if self.ends else ""


def rows(*shown: Shown, width: int) -> Iterator[Text]:
    """A line for each, the curves equally long, and their scales beside them where there is room."""
    room = max(len(each.scale) for each in shown) if width >= WIDE else 0
    curve = max(0, min(width - NAMES - room, max(len(each.values) for each in shown)))
    for each in shown:
        line = Text(f"{each.name:<9}{each.value:>{NAMES - 11}}  ", no_wrap=True, overflow="crop")
        line.append(f"{sparkline(each.values, curve, each.ends):<{curve}}", style=each.style)
        yield line.append(each.scale, style="dim") if room else line


def packed(parts: Sequence[str], width: int) -> list[str]:
    """As many parts in each line as go in, none of them broken."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines
