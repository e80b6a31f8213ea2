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
LETTER, SAME, LANES = 0.0108, 0.03, 2
"""Of a plot's width: what a letter takes, and how near the same has to happen again to need no word; words' lines."""


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
    ends, last = [-np.inf] * LANES, ("", -np.inf)
    for step, word in happened(run):
        place = _place(run, x, step)
        axes.axvline(place, color=style.QUIET, linestyle=":", linewidth=1)
        share = (place - float(x[0])) / (float(x[-1] - x[0]) or 1.0)
        if not words or (word == last[0] and share - last[1] < SAME):
            continue
        said = f"{word} at step {step:,}"
        side, begin = _side(share, LETTER * len(said))
        lane = next((lane for lane, end in enumerate(ends) if begin > end), None)
        if lane is not None:
            ends[lane], last = begin + LETTER * len(said), (word, share)
            above = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "bottom"}
            axes.annotate(said, (place, 1), (0, 3 + 11 * lane), **above, ha=side, fontsize=8.5, color=style.QUIET)


def _side(share: float, width: float) -> tuple[str, float]:
    """How a word is set at a share of the plot's width, so that it stays within, and where it then begins."""
    if share < width / 2:
        return "left", share
    return ("right", share - width) if share > 1 - width / 2 else ("center", share - width / 2)


def _place(run: History, x: Float[np.ndarray, " n"], step: int) -> float:
    """Where the last record up to a step lies."""
    return float(x[max(0, int(np.searchsorted(run.at, step, "right")) - 1)])
