"""A study's figures: held-out loss with a band over seeds, over what was spent; differences seed by seed."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from smolforge.comparison import style
from smolforge.comparison.figures import Over, unit
from smolforge.comparison.study.results import Findings, Run

LOSS, BITS, ADDED = "validation_loss", "validation_bits_per_byte", "loss_added_by_int4"
UNITS = {LOSS: "nats a token", BITS: "bits a byte", ADDED: "nats a token"}
NAMES = {LOSS: "held-out loss", BITS: "held-out bits per byte", ADDED: "held-out loss added by 4 bits"}
SIZES = {"parameters": "parameters", "flops": "FLOPs of a run"}
BEGINNING = 0.1
"""Of a budget; what lies above what comes after it is cut."""
BAND = 0.18
"""How opaque."""
BELOW = 0.2
"""Of a row, that single seeds are drawn below its mean."""


Points = dict[float, tuple[float, float]]
"""By step: where it lies, and what was measured there."""


def points(run: Run, metric: str, over: Over, flops_per_token: int) -> Points:
    """What one run measured."""
    found: Points = {}
    for record, seconds in zip(run.measured, run.speed["seconds"], strict=True):
        step, tokens, value = record["step"], record["tokens"], record[metric]
        if step is not None and tokens is not None and value is not None:
            along = {"tokens": tokens, "flops": tokens * flops_per_token, "seconds": seconds}[over]
            found[float(step)] = float(along), float(value)
    return found


def curve(
    found: Findings, variant: str, metric: str, over: Over
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]] | None:
    """Where a variant's runs were all measured, as a mean over them, and what each measured there."""
    flops = next(each.cost["flops_per_token"] for each in found.variants if each.name == variant)
    runs = [points(run, metric, over, flops) for run in found.of(variant)]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    if not steps:
        return None
    both = np.array([[run[step] for step in steps] for run in runs])
    return both[:, :, 0].mean(axis=0), both[:, :, 1]


def loss(found: Findings, over: Over) -> Figure | None:
    """Means as lines, from the lowest to the highest seed as a band; of what training measures."""
    metric = LOSS if found.settings.metric == ADDED else found.settings.metric
    curves = {each.name: curve(found, each.name, metric, over) for each in found.variants}
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
    base = found.settings.baseline
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
    metric = found.settings.metric
    axes.set(xlabel=f"{NAMES[metric]} minus that of {base} ({UNITS[metric]})", ylim=(len(rows) - 0.5, -0.5))
    style.ruled(axes)
    signs = [("mean", "D"), ("a seed", "o")]
    key: style.Key = [
        (name, Line2D([], [], color=style.QUIET, marker=sign, linestyle="", markersize=4.5)) for name, sign in signs
    ]
    sure = f"{1 - found.settings.alpha:.0%} interval"
    style.legend(figure, [*key, (sure, Line2D([], [], color=style.QUIET))])
    return figure


def law(found: Findings) -> Figure | None:
    """Both axes logarithmic: every seed, the means, the line through those fitted, what it says of the others."""
    if (made := found.law) is None:
        return None
    figure = style.canvas()
    axes = figure.subplots()
    metric, sizes = found.settings.metric, made.sizes
    axes.set(xscale="log", yscale="log", xlabel=SIZES[made.over], ylabel=f"{NAMES[metric]} ({UNITS[metric]})")
    for each, look in zip(found.variants, style.looks(len(found.variants)), strict=True):
        values = [each.values[seed] for seed in made.seeds]
        face = look.color if each.name in made.fitted else style.PAPER
        axes.plot([sizes[each.name]] * len(values), values, ".", color=look.color, alpha=0.5, markeredgewidth=0)
        axes.plot(sizes[each.name], float(np.mean(values)), "D", color=look.color, markersize=6, markerfacecolor=face)
    border = max(sizes[name] for name in made.fitted)
    for low, high, dashes in ((min(sizes.values()), border, "-"), (border, max(sizes.values()), "--")):
        x = np.geomspace(low, high, 50)
        axes.plot(x, made.power.at(x), color=style.INK, linestyle=dashes, linewidth=1)
    for each in made.predictions:
        axes.plot([each.size] * 2, [each.low, each.high], color=style.INK, linewidth=6, alpha=BAND, zorder=1)
    logarithmic(axes, sorted(set(sizes.values())))
    sample = partial(Line2D, [], [], color=style.QUIET)
    empty = sample(marker="D", linestyle="", markerfacecolor=style.PAPER)
    key: style.Key = [("a seed", sample(marker=".", linestyle="")), ("mean, fitted", sample(marker="D", linestyle=""))]
    key += [("mean, predicted", empty), ("the law", sample()), ("its interval", Patch(color=style.QUIET, alpha=BAND))]
    style.legend(figure, key)
    return figure


def logarithmic(axes: Axes, sizes: list[float]) -> None:
    """Ticks at the sizes themselves, and at round losses."""
    axes.set_xticks(sizes, [f"{size:,.3g}" if size < 1e3 or size >= 1e12 else f"{size / 1e6:,.3g}M" for size in sizes])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(length=3, width=0.6)


FIGURES: dict[str, Callable[[Findings], Figure | None]] = {
    "loss-tokens": partial(loss, over="tokens"),
    "loss-flops": partial(loss, over="flops"),
    "loss-seconds": partial(loss, over="seconds"),
    "difference": difference,
    "law": law,
}
"""By the name of their files."""
