"""Where a step's time goes: stacked parts, one bar a run."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from smolforge.comparison import style
from smolforge.comparison.history import History

KINDS = {
    "data": ("waiting for data", "#8c8c8c", style.DARK),
    "forward": ("forward", style.SKY, style.DARK),
    "backward": ("backward", style.BLUE, style.LIGHT),
    "optimizer": ("optimizer", style.ORANGE, style.DARK),
    "other": ("other", style.GREEN, style.LIGHT),
    "between": ("between steps", style.PURPLE, style.DARK),
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
    figure = style.canvas(0.7 + 0.42 * len(known))
    axes = figure.subplots()
    for row, (_, parts) in enumerate(known):
        _bar(axes, row, {part: seconds * scale for part, seconds in parts.items()}, longest * scale, unit)
    axes.set_yticks(range(len(known)), [style.drawable(run.name) for run, _ in known])
    axes.set(xlabel=f"{_A[unit]} per step", xlim=(0, 1.1 * longest * scale), ylim=(len(known) - 0.45, -0.55))
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    seen = [part for part in KINDS if any(part in parts for _, parts in known)]
    style.legend(figure, [(KINDS[part][0], Patch(color=KINDS[part][1])) for part in seen])
    return figure


_A = {"s": "seconds", "ms": "milliseconds"}


def _bar(axes: Axes, row: int, parts: dict[str, float], longest: float, unit: str) -> None:
    """Parts one after the other, the whole at the end."""
    left = 0.0
    for part, (_, color, word) in KINDS.items():
        width = parts.get(part, 0.0)
        axes.barh(row, width, left=left, height=0.62, color=color, edgecolor=style.PAPER, linewidth=0.8)
        if width > WIDE_ENOUGH * longest:
            axes.text(left + width / 2, row, _number(width), ha="center", va="center", fontsize=8.5, color=word)
        left += width
    axes.text(left + 0.008 * longest, row, f"{_number(left)} {unit}", ha="left", va="center", fontsize=9)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
