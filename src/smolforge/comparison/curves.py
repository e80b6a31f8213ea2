"""Long rows of numbers made fit to draw: fewer points, less noise, readable units. NaN is a gap, and stays one.

Axes: n points, k points left.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from smolforge.comparison.history import History
from smolforge.sizes import flops_per_token

Curve = tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]
"""x and y."""
Over = Literal["tokens", "steps", "seconds", "flops"]
"""What a curve runs over."""
UNITS: dict[Over, list[tuple[float, str]]] = {
    "tokens": [(1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1.0, "tokens")],
    "steps": [(1.0, "step")],
    "seconds": [(3600.0, "hours of training"), (60.0, "minutes of training"), (1.0, "seconds of training")],
    "flops": [(1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")],
}
ENOUGH_OF_A_UNIT = 1.5
SMOOTHED_SHARE = 1 / 50
"""Of a curve, that each of its smoothed values is a mean of."""

STEEP_SHARE = 0.03
"""Of a run, at its beginning, that a plot need not show to its height."""
BROKEN = 1.25
"""Times what a run begins with, or half of it stays below: a loss above that need not be shown to its height either."""


def along(history: History, over: Over) -> Float[np.ndarray, " n"]:
    """Where each step lies, in tokens, steps, seconds or FLOPs."""
    match over:
        case "tokens":
            return history.tokens
        case "steps":
            return history.at.astype(np.float64)
        case "seconds":
            return history.seconds
        case "flops":
            recipe = history.recipe
            return history.tokens * flops_per_token(recipe.model, recipe.train.sequence_length)


def unit(over: Over, longest: float) -> tuple[float, str]:
    """The largest unit that something so long is still more than one of, and its name."""
    return next((each for each in UNITS[over] if longest >= ENOUGH_OF_A_UNIT * each[0]), UNITS[over][-1])


def thinned(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], most: int) -> Curve:
    """At most so many points (3 or more): the first, the last, and means of equally many points between them."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(1, len(x) - 1, most - 1).astype(int)[:-1]
    counts = np.diff([*edges, len(x) - 1])
    known = np.isfinite(y)
    with np.errstate(invalid="ignore"):
        means = _sums(np.where(known, y, 0.0), edges) / _sums(known.astype(float), edges)
    return np.array([x[0], *(_sums(x, edges) / counts), x[-1]]), np.array([y[0], *means, y[-1]])


def _sums(values: Float[np.ndarray, " n"], edges: Int[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Of the stretches that begin at the edges; the very last value belongs to none."""
    return np.add.reduceat(values[:-1], edges)


def smoothed(y: Float[np.ndarray, " n"], share: float = SMOOTHED_SHARE) -> Float[np.ndarray, " n"]:
    """A running mean, centred; at the steep beginning of fewer values, so that it begins as the curve does."""
    half = int(len(y) * share) // 2
    stretches = (y[i - min(half, i) : i + min(half, i) + 1] for i in range(len(y)))
    known = (stretch[np.isfinite(stretch)] for stretch in stretches)
    return np.array([stretch.mean() if len(stretch) else np.nan for stretch in known], dtype=np.float64)


def known(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Curve:
    """Without the gaps."""
    there = np.isfinite(y)
    return x[there], y[there]


def extent(curves: list[Float[np.ndarray, " _"]]) -> tuple[float, float] | None:
    """From where to where a plot of losses goes: neither first steps nor a run that broke press the others flat.

    That is up to the highest value after the very beginning, if that is near what is usual. None has no numbers.
    """
    there = [curve[np.isfinite(curve)] for curve in curves]
    there = [curve for curve in there if len(curve)]
    if not there:
        return None
    usual = max(max(float(curve[0]), float(np.median(curve))) for curve in there)
    later = max(float(curve[int(len(curve) * STEEP_SHARE) :].max()) for curve in there)
    low, high = min(float(curve.min()) for curve in there), min(later, BROKEN * usual)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
