"""The live view of a run: a progress bar, loss and speed as curves, the current metrics, the last sample.

step ━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━ 180/300 0:01:47
loss         4.912  █▆▅▄▄▃▃▂▂▂▁▁▁▁  4.88 to 8.78
tokens/s     5,591  ▇▇█▇▇▇▇█▇▇▇▇▇▇  0 to 5,702
MFU 40%  lr 1.50e-02  grad 1.16  0.71 GiB  33 s left

Bars and sparklines are drawn with Unicode's block characters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

BLOCK_LEVELS = "▁▂▃▄▅▆▇"
"""Without the full block, so that curves below each other do not touch."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
NON_FINITE = "!"
"""Marks a value that is NaN or infinite: seldom, and it must be visible."""
MAX_CELLS = 512
"""More than a terminal is wide, and few enough to draw four times a second."""
MAX_SAMPLE_CHARS = 600
NAME_WIDTH = 20
"""Columns of a curve's name and value."""
MIN_WIDTH_FOR_SCALE = 60
"""Columns from which on a curve's range is shown."""


class LiveView:
    """Draw the progress of a run, as wide as the terminal is at that moment."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss, self.speed = Curve(), Curve()
        self.metrics: dict[str, Any] = {}
        self.parts: list[str] = []
        self.sample = ""

    def on_step(self, metrics: dict[str, Any], parts: list[str]) -> None:
        """Add a step; the speed of the first one is left out, because it compiles and allocates."""
        self.metrics, self.parts = metrics, parts
        self.loss.add(metrics["step"], metrics["loss"])
        if "tokens_per_second_median" in metrics:
            self.speed.add(metrics["step"], metrics["tokens_per_second"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        yield self.progress
        if not self.metrics:
            return
        rate = self.metrics.get("tokens_per_second_median", self.metrics["tokens_per_second"])
        yield from metric_rows(
            MetricCurve("loss", f"{self.metrics['loss']:.3f}", self.loss.values(), "{:.2f}".format, "cyan"),
            MetricCurve("tokens/s", f"{rate:,.0f}", self.speed.values(), "{:,.0f}".format, "green", from_zero=True),
            width=width,
        )
        yield from (Text(line, no_wrap=True, overflow="ellipsis") for line in pack_into_lines(self.parts, width))
        if self.sample:
            text = Text(" ".join(self.sample.split())[-MAX_SAMPLE_CHARS:], no_wrap=False, overflow="fold")
            yield Panel(text, title="last sample", width=width)


class MetricCurve(NamedTuple):
    """A curve with a name, its present value, and a formatter for its range, which starts at 0 or the minimum."""

    name: str
    value: str
    values: Sequence[float]
    format_value: Callable[[float], str]
    style: str
    from_zero: bool = False

    @property
    def value_range(self) -> tuple[float, float] | None:
        ends = finite_range(self.values)
        return (0.0, ends[1]) if ends and self.from_zero else ends

    @property
    def range_text(self) -> str:
        return (
            f"  {self.format_value(self.value_range[0])} to {self.format_value(self.value_range[1])}"
            if self.value_range
            else ""
        )


class Curve:
    """Values over all steps as means of neighbors, so that a million steps take no more memory."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.steps_per_cell = 1
        """Steps of a full cell."""

    def add(self, step: int, value: float | None) -> None:
        """Add a value; a step that goes back drops the values after it."""
        while self.cells and self.cells[-1].last_step >= step:
            self.cells.pop()
        new_cell = Cell(step, 1, math.nan if value is None else value)
        if self.cells and self.cells[-1].count < self.steps_per_cell:
            self.cells[-1] = self.cells[-1].merge(new_cell)
        else:
            self.cells.append(new_cell)
        if len(self.cells) > MAX_CELLS:
            pairs = [self.cells[index : index + 2] for index in range(0, len(self.cells), 2)]
            self.cells = [pair[0].merge(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
            self.steps_per_cell *= 2

    def values(self) -> list[float]:
        """Return the means, oldest first; not finite where one of the values was not."""
        return [cell.total / cell.count for cell in self.cells]


class Cell(NamedTuple):
    """Neighboring steps: the last one, their count, and the sum of their values."""

    last_step: int
    count: int
    total: float

    def merge(self, next_cell: "Cell") -> "Cell":
        return Cell(next_cell.last_step, self.count + next_cell.count, self.total + next_cell.total)


def metric_rows(*curves: MetricCurve, width: int) -> Iterator[Text]:
    """Return one line per curve, all curves equally long, with their ranges where the terminal is wide enough."""
    scale_width = max(len(curve.range_text) for curve in curves) if width >= MIN_WIDTH_FOR_SCALE else 0
    curve_width = max(0, min(width - NAME_WIDTH - scale_width, max(len(curve.values) for curve in curves)))
    for curve in curves:
        line = Text(f"{curve.name:<9}{curve.value:>{NAME_WIDTH - 11}}  ", no_wrap=True, overflow="crop")
        line.append(f"{sparkline(curve.values, curve_width, curve.value_range):<{curve_width}}", style=curve.style)
        yield line.append(curve.range_text, style="dim") if scale_width else line


def pack_into_lines(parts: Sequence[str], width: int) -> list[str]:
    """Put as many parts in each line as fit; no part is broken."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def bar(fraction: float, width: int) -> str:
    """Draw a bar: a fraction of 1 fills the width, and one above zero is visible."""
    eighths = max(round(8 * width * min(1.0, max(0.0, fraction))), int(fraction > 0))
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def sparkline(values: Sequence[float | None], width: int, ends: tuple[float, float] | None = None) -> str:
    """Draw all values, oldest first, in at most `width` characters, each the mean of equally many neighbors.

    The lowest block is the minimum of all values, and the highest the maximum, unless other `ends` are given.
    """
    ends = ends or finite_range(values)
    cells = resample_curve(values, width)
    if ends is None:
        return NON_FINITE * len(cells)
    return "".join(NON_FINITE if cell is None else BLOCK_LEVELS[block_level(cell, *ends)] for cell in cells)


def finite_range(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Return the minimum and maximum of the finite values."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return (min(finite), max(finite)) if finite else None


def block_level(value: float, low: float, high: float) -> int:
    """Return the index into BLOCK_LEVELS; the middle where nothing ever changed."""
    span = high / 2 - low / 2  # of halves, which do not overflow
    if span <= 0:
        return len(BLOCK_LEVELS) // 2
    return max(0, min(len(BLOCK_LEVELS) - 1, int((value / 2 - low / 2) / span * len(BLOCK_LEVELS))))


def resample_curve(values: Sequence[float | None], width: int) -> list[float | None]:
    """Return at most `width` means of neighbors; None where one of them is not finite."""
    num_cells = max(0, min(len(values), width))
    edges = [len(values) * index // num_cells for index in range(num_cells + 1)] if num_cells else []
    return [mean_if_finite(values[first:last]) for first, last in pairwise(edges)]


def mean_if_finite(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < len(values):
        return None
    return math.fsum(value / len(finite) for value in finite)
