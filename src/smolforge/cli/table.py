"""Print the results of commands: JSON or lines, one kind of table, bars."""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

EIGHTHS = " ▏▎▍▌▋▊▉█"
UNLIMITED_WIDTH = 1_000_000
MISSING = "-"


def print_result(result: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """Print a command's result: as one JSON object, or as lines."""
    print(json.dumps(result) if as_json else "\n".join(lines))


def table_lines(
    rows: Iterable[Sequence[object]], head: Sequence[str] = (), align: str = "<>", *, width: int = UNLIMITED_WIDTH
) -> list[str]:
    """Return rows as lines with aligned columns, under a heading where there is one.

    `align` has `<` or `>` for each column; its last one is for all columns after. Whole numbers get their commas.
    A cell that is wider than `width` allows is wrapped inside its column.
    """
    cells = [[Text(_format_cell(cell)) for cell in row] for row in rows]
    if not cells:
        return []
    grid = Table(box=None, pad_edge=False, show_header=bool(head))
    for index in range(len(cells[0])):
        side = align[min(index, len(align) - 1)]
        grid.add_column(Text(head[index]) if head else "", justify="left" if side == "<" else "right")
    for row in cells:
        grid.add_row(*row)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return [line.rstrip() for line in capture.get().splitlines()]


def _format_cell(cell: object) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return MISSING if cell is None else str(cell)


def bar(fraction: float, width: int) -> str:
    """Draw a bar: a fraction of 1 fills the width, and one above zero is visible."""
    eighths = max(round(8 * width * min(1.0, max(0.0, fraction))), int(fraction > 0))
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def counting_progress(console: Console, *, disable: bool) -> Progress:
    """Return rich's progress display for something that is counted; it disappears at the end."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=disable)


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error, where that is a terminal; yield a function that advances it by a count."""
    console = Console(file=sys.stderr)
    with counting_progress(console, disable=not console.is_terminal) as progress:
        yield partial(progress.advance, progress.add_task(name, total=total))
