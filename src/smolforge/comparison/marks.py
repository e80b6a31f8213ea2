"""What happened to a run, on its figures: a dotted line and a word for one run, a small mark on each of several curves.

Where a step lies, x says: one value for each of the run's records.
"""

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from smolforge.comparison import style
from smolforge.comparison.curves import Curve
from smolforge.comparison.history import History

SIGNS = {"resumed": "|", "rewound": "<", "left out": "x"}
"""What marks on a curve mean."""
NEAR = 0.28
"""Of the width: words above a plot that are nearer to each other would touch."""


def happened(run: History) -> list[tuple[int, str]]:
    """(step, word) of what interrupted a run's curve, in order."""
    events = {"resumed": run.resumes, "rewound": run.rewinds, "left out": run.left_out}
    return sorted((step, word) for word, steps in events.items() for step in steps)


def mark_curve(
    axes: Axes,
    run: History,
    x: Float[np.ndarray, " n"],
    curve: Curve,
    color: str,
) -> None:
    """Signs on the curve of one run among several."""
    there = np.isfinite(curve[1])
    if there.any():
        for step, word in happened(run):
            place = _place(run, x, step)
            height = np.interp(place, curve[0][there], curve[1][there])
            axes.plot(place, height, color=color, marker=SIGNS[word], markersize=11, markeredgewidth=1.4, zorder=4)


def mark_axes(axes: Axes, run: History, x: Float[np.ndarray, " n"], words: bool = True) -> None:
    """Dotted lines for the only run there is, with words above them where there is room."""
    events = happened(run)
    taken, length = -np.inf, float(x[-1] - x[0]) if events else 0.0
    for step, word in events:
        place = _place(run, x, step)
        axes.axvline(place, color=style.QUIET, linestyle=":", linewidth=1)
        share = (place - float(x[0])) / (length or 1.0)
        if words and share - taken >= NEAR:
            taken = share
            _word(axes, place, share, f"{word} at step {step:,}")


def _word(axes: Axes, place: float, share: float, said: str) -> None:
    side = "left" if share < NEAR / 2 else "right" if share > 1 - NEAR / 2 else "center"
    above = axes.get_xaxis_transform()
    axes.text(place, 1.02, said, transform=above, ha=side, va="bottom", fontsize=8.5, color=style.QUIET)


def _place(run: History, x: Float[np.ndarray, " n"], step: int) -> float:
    """Where the last record up to a step lies."""
    return float(x[max(0, int(np.searchsorted(run.at, step, "right")) - 1)])
