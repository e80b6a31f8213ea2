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
from smolforge.comparison.figures import XAxis, axis_unit
from smolforge.comparison.study.results import RunMeasurements, StudyResults

LOSS, BITS, INT4_LOSS = "validation_loss", "validation_bits_per_byte", "loss_added_by_int4"
METRIC_UNITS = {LOSS: "nats a token", BITS: "bits a byte", INT4_LOSS: "nats a token"}
METRIC_NAMES = {LOSS: "held-out loss", BITS: "held-out bits per byte", INT4_LOSS: "held-out loss added by 4 bits"}
SIZE_NAMES = {"parameters": "parameters", "flops": "FLOPs of a run"}
SKIPPED_SHARE = 0.1
"""Of a budget; what lies above what comes after it is cut."""
BAND_ALPHA = 0.18
"""How opaque."""
SEED_OFFSET = 0.2
"""Of a row, that single seeds are drawn below its mean."""


Points = dict[float, tuple[float, float]]
"""By step: where it lies, and what was measured there."""


def run_points(run: RunMeasurements, metric: str, x_axis: XAxis, *, flops_per_token: int) -> Points:
    """What one run measured."""
    points: Points = {}
    for record, seconds in zip(run.measured, run.speed["seconds"], strict=True):
        step, tokens, value = record["step"], record["tokens"], record[metric]
        if step is not None and tokens is not None and value is not None:
            position = {"tokens": tokens, "flops": tokens * flops_per_token, "seconds": seconds}[x_axis]
            points[float(step)] = float(position), float(value)
    return points


def variant_curve(
    results: StudyResults, variant: str, metric: str, *, x_axis: XAxis
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]] | None:
    """Where a variant's runs were all measured, as a mean over them, and what each measured there."""
    flops = next(result.cost["flops_per_token"] for result in results.variants if result.name == variant)
    runs = [run_points(run, metric, x_axis, flops_per_token=flops) for run in results.runs_of(variant)]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    if not steps:
        return None
    values = np.array([[run[step] for step in steps] for run in runs])
    return values[:, :, 0].mean(axis=0), values[:, :, 1]


def mean_loss_figure(results: StudyResults, x_axis: XAxis) -> Figure | None:
    """Means as lines, from the lowest to the highest seed as a band; of what training measures."""
    metric = LOSS if results.settings.metric == INT4_LOSS else results.settings.metric
    curves = {variant.name: variant_curve(results, variant.name, metric, x_axis=x_axis) for variant in results.variants}
    drawable = [curve for curve in curves.values() if curve is not None]
    if not drawable:
        return None
    max_x = max(float(x[-1]) for x, _ in drawable)
    scale, unit_name = axis_unit(x_axis, max_x)
    figure = style.new_figure()
    axes = figure.subplots()
    entries: style.LegendEntries = []
    for (name, curve), line_style in zip(curves.items(), style.line_styles(len(curves)), strict=True):
        if curve is None:
            continue
        x, y = curve[0] / scale, curve[1]
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=line_style.color, alpha=BAND_ALPHA, linewidth=0)
        axes.plot(
            x,
            y.mean(axis=0),
            color=line_style.color,
            linestyle=line_style.dashes,
            marker=line_style.marker,
            markersize=3.6,
        )
        entries.append(
            (
                name,
                Line2D(
                    [], [], color=line_style.color, linestyle=line_style.dashes, marker=line_style.marker, markersize=4
                ),
            )
        )
    set_loss_limits(axes, drawable, max_x)
    axes.set(xlabel=unit_name, ylabel=f"{METRIC_NAMES[metric]} ({METRIC_UNITS[metric]})")
    style.style_axes(axes)
    style.add_legend(figure, [*entries, ("lowest to highest seed", Patch(color=style.QUIET, alpha=BAND_ALPHA))])
    return figure


def set_loss_limits(axes: Axes, curves: list[tuple[np.ndarray, np.ndarray]], max_x: float) -> None:
    """From the lowest loss to the highest after the beginning."""
    later = [y[:, x >= SKIPPED_SHARE * max_x] for x, y in curves]
    low, high = min(float(y.min()) for _, y in curves), max(float(y.max()) for y in later if y.size)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)


def difference_figure(results: StudyResults) -> Figure | None:
    """Each variant minus the baseline: every seed, their mean, its interval."""
    base = results.settings.baseline
    baseline_values = next(variant.values for variant in results.variants if variant.name == base)
    names = [variant.name for variant in results.variants]
    rows = [
        (variant, variant.difference)
        for variant in results.variants
        if variant.difference and variant.difference.mean is not None
    ]
    if not rows:
        return None
    line_styles, figure = style.line_styles(len(names)), style.new_figure(0.9 + 0.45 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color=style.QUIET, linewidth=0.8)
    for row, (variant, difference) in enumerate(rows):
        line_style = line_styles[names.index(variant.name)]
        seeds = [value - baseline_values[seed] for seed, value in variant.values.items() if seed in baseline_values]
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [row, row], color=line_style.color, linewidth=1.4)
        axes.plot(
            seeds,
            [row + SEED_OFFSET] * len(seeds),
            "o",
            color=line_style.color,
            markersize=4,
            alpha=0.6,
            markeredgewidth=0,
        )
        axes.plot(float(np.mean(seeds)), row, "D", color=line_style.color, markersize=5.5)
    axes.set_yticks(range(len(rows)), [style.printable_name(variant.name) for variant, _ in rows])
    metric = results.settings.metric
    axes.set(
        xlabel=f"{METRIC_NAMES[metric]} minus that of {base} ({METRIC_UNITS[metric]})", ylim=(len(rows) - 0.5, -0.5)
    )
    style.style_axes(axes)
    signs = [("mean", "D"), ("a seed", "o")]
    entries: style.LegendEntries = [
        (name, Line2D([], [], color=style.QUIET, marker=sign, linestyle="", markersize=4.5)) for name, sign in signs
    ]
    interval_label = f"{1 - results.settings.alpha:.0%} interval"
    style.add_legend(figure, [*entries, (interval_label, Line2D([], [], color=style.QUIET))])
    return figure


def law_figure(results: StudyResults) -> Figure | None:
    """Both axes logarithmic: every seed, the means, the line through those fitted, what it says of the others."""
    if (law := results.law) is None:
        return None
    figure = style.new_figure()
    axes = figure.subplots()
    metric, sizes = results.settings.metric, law.sizes
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=SIZE_NAMES[law.over],
        ylabel=f"{METRIC_NAMES[metric]} ({METRIC_UNITS[metric]})",
    )
    for variant, line_style in zip(results.variants, style.line_styles(len(results.variants)), strict=True):
        values = [variant.values[seed] for seed in law.seeds]
        face = line_style.color if variant.name in law.fitted else style.PAPER
        axes.plot(
            [sizes[variant.name]] * len(values), values, ".", color=line_style.color, alpha=0.5, markeredgewidth=0
        )
        axes.plot(
            sizes[variant.name], float(np.mean(values)), "D", color=line_style.color, markersize=6, markerfacecolor=face
        )
    largest_fitted = max(sizes[name] for name in law.fitted)
    for low, high, dashes in ((min(sizes.values()), largest_fitted, "-"), (largest_fitted, max(sizes.values()), "--")):
        x = np.geomspace(low, high, 50)
        axes.plot(x, law.power.predict(x), color=style.INK, linestyle=dashes, linewidth=1)
    for prediction in law.predictions:
        ends = [prediction.low, prediction.high]
        axes.plot([prediction.size] * 2, ends, color=style.INK, linewidth=6, alpha=BAND_ALPHA, zorder=1)
    set_log_ticks(axes, sorted(set(sizes.values())))
    sample = partial(Line2D, [], [], color=style.QUIET)
    empty = sample(marker="D", linestyle="", markerfacecolor=style.PAPER)
    entries: style.LegendEntries = [
        ("a seed", sample(marker=".", linestyle="")),
        ("mean, fitted", sample(marker="D", linestyle="")),
    ]
    entries += [
        ("mean, predicted", empty),
        ("the law", sample()),
        ("its interval", Patch(color=style.QUIET, alpha=BAND_ALPHA)),
    ]
    style.add_legend(figure, entries)
    return figure


def set_log_ticks(axes: Axes, sizes: list[float]) -> None:
    """Ticks at the sizes themselves, and at round losses."""
    axes.set_xticks(sizes, [f"{size:,.3g}" if size < 1e3 or size >= 1e12 else f"{size / 1e6:,.3g}M" for size in sizes])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(length=3, width=0.6)


FIGURES: dict[str, Callable[[StudyResults], Figure | None]] = {
    "loss-tokens": partial(mean_loss_figure, x_axis="tokens"),
    "loss-flops": partial(mean_loss_figure, x_axis="flops"),
    "loss-seconds": partial(mean_loss_figure, x_axis="seconds"),
    "difference": difference_figure,
    "law": law_figure,
}
"""By the name of their files."""
