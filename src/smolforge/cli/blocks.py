"""Numbers drawn with Unicode's block characters: bars and sparklines, for terminals."""

import math
from collections.abc import Sequence
from itertools import pairwise

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
