"""A study's figures: held-out loss with a band over seeds, over what was spent; differences seed by seed."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from smolforge.comparison import style
from smolforge.comparison.curves import Over, along, unit
from smolforge.comparison.history import History
from smolforge.comparison.study.findings import UNITS, Findings

NAMES = {"validation_loss": "held-out loss", "validation_bits_per_byte": "held-out bits per byte"}
BEGINNING = 0.1
"""Of a budget; what lies above what comes after it is cut."""
BAND = 0.18
"""How opaque."""
BELOW = 0.2
"""Of a row, that single seeds are drawn below its mean."""


def curve(
    runs: list[History], metric: str, over: Over
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]] | None:
    """Where a variant's runs were all measured, as a mean over them, and what each measured there."""
    values = [run.column(metric) for run in runs]
    at = [
        {int(step): place for place, step in enumerate(run.at) if np.isfinite(column[place])}
        for run, column in zip(runs, values, strict=True)
    ]
    steps = sorted(set.intersection(*map(set, at))) if at else []
    if not steps:
        return None
    x = np.mean([[along(run, over)[places[step]] for step in steps] for run, places in zip(runs, at, strict=True)], 0)
    y = np.array([[column[places[step]] for step in steps] for column, places in zip(values, at, strict=True)])
    return x, y


def loss(found: Findings, over: Over) -> Figure | None:
    """Means as lines, from the lowest to the highest seed as a band."""
    metric = found.study.settings.metric
    curves = {name: curve(runs, metric, over) for name, runs in found.histories.items()}
    known = [each for each in curves.values() if each is not None]
    if not known:
        return None
    longest = max(float(x[-1]) for x, _ in known)
    scale, name = unit(over, longest)
    figure = style.canvas()
    axes = figure.subplots()
    key: style.Key = []
    for (variant, each), look in zip(curves.items(), style.looks(len(curves)), strict=True):
        if each is None:
            continue
        x, y = each[0] / scale, each[1]
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=look.color, alpha=BAND, linewidth=0)
        axes.plot(x, y.mean(axis=0), color=look.color, linestyle=look.dashes, marker=look.marker, markersize=3.6)
        key.append((variant, Line2D([], [], color=look.color, linestyle=look.dashes, marker=look.marker, markersize=4)))
    frame(axes, known, longest)
    axes.set(xlabel=name, ylabel=f"{NAMES[metric]} ({UNITS[metric]})")
    style.ruled(axes)
    style.legend(figure, [*key, ("lowest to highest seed", Patch(color=style.QUIET, alpha=BAND))])
    return figure


def frame(axes: Axes, curves: list[tuple[np.ndarray, np.ndarray]], longest: float) -> None:
    """From the lowest loss to the highest after the beginning."""
    later = [y[:, x >= BEGINNING * longest] for x, y in curves]
    low, high = min(float(y.min()) for _, y in curves), max(float(y.max()) for y in later if y.size)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)


def difference(found: Findings) -> Figure | None:
    """Each variant minus the baseline: every seed, their mean, its interval."""
    base = found.study.settings.baseline
    theirs = next(variant.values for variant in found.variants if variant.name == base)
    places = [each.name for each in found.variants]
    rows = [(each, each.difference) for each in found.variants if each.difference and each.difference.mean is not None]
    if not rows:
        return None
    looks, figure = style.looks(len(places)), style.canvas(0.9 + 0.45 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color=style.QUIET, linewidth=0.8)
    for row, (variant, made) in enumerate(rows):
        look = looks[places.index(variant.name)]
        seeds = [value - theirs[seed] for seed, value in variant.values.items() if seed in theirs]
        if made.low is not None and made.high is not None:
            axes.plot([made.low, made.high], [row, row], color=look.color, linewidth=1.4)
        axes.plot(seeds, [row + BELOW] * len(seeds), "o", color=look.color, markersize=4, alpha=0.6, markeredgewidth=0)
        axes.plot(float(np.mean(seeds)), row, "D", color=look.color, markersize=5.5)
    axes.set_yticks(range(len(rows)), [style.drawable(variant.name) for variant, _ in rows])
    metric = found.study.settings.metric
    axes.set(xlabel=f"{NAMES[metric]} minus that of {base} ({UNITS[metric]})", ylim=(len(rows) - 0.5, -0.5))
    style.ruled(axes)
    signs = [("mean", "D"), ("a seed", "o")]
    key: style.Key = [
        (name, Line2D([], [], color=style.QUIET, marker=sign, linestyle="", markersize=4.5)) for name, sign in signs
    ]
    sure = f"{1 - found.study.settings.alpha:.0%} interval"
    style.legend(figure, [*key, (sure, Line2D([], [], color=style.QUIET))])
    return figure


FIGURES: dict[str, Callable[[Findings], Figure | None]] = {
    "loss-tokens": partial(loss, over="tokens"),
    "loss-flops": partial(loss, over="flops"),
    "loss-seconds": partial(loss, over="seconds"),
    "difference": difference,
}
"""By the name of their files."""
