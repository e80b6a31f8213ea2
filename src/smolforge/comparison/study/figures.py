"""A study's figures: held-out loss with a band over seeds, over what was spent; differences seed by seed."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from smolforge.comparison import style
from smolforge.comparison.figures import PLAIN_FORMAT, XAxis, axis_unit
from smolforge.comparison.study.results import RunMeasurements, StudyResults, VariantResult

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


def run_points(run: RunMeasurements, metric: str, x_axis: XAxis, *, flops: int) -> dict[float, tuple[float, float]]:
    """One measurement of a run: its step, its position on the axis, FLOPs per token, and the value."""
    points = {}
    for record, seconds in zip(run.measured, run.speed["seconds"], strict=True):
        step, tokens, value = record["step"], record["tokens"], record[metric]
        if step is not None and tokens is not None and value is not None:
            position = {"tokens": tokens, "flops": tokens * flops, "seconds": seconds}[x_axis]
            points[float(step)] = float(position), float(value)
    return points


def variant_curve(
    results: StudyResults, variant: VariantResult, metric: str, *, x_axis: XAxis
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]] | None:
    """Where a variant's runs were all measured, as a mean over them, and what each measured there."""
    flops = variant.cost["flops_per_token"]
    runs = [run_points(run, metric, x_axis, flops=flops) for run in results.runs_of(variant.name)]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    if not steps:
        return None
    values = np.array([[run[step] for step in steps] for run in runs])
    return values[:, :, 0].mean(axis=0), values[:, :, 1]


def variant_styles(results: StudyResults) -> dict[str, style.LineStyle]:
    """How each variant is drawn."""
    names = [variant.name for variant in results.variants]
    return dict(zip(names, style.line_styles(len(names)), strict=True))


def mean_loss_figure(results: StudyResults, x_axis: XAxis) -> Figure | None:
    """Means as lines, from the lowest to the highest seed as a band; of what training measures."""
    metric = LOSS if results.settings.metric == INT4_LOSS else results.settings.metric
    all_curves = {variant.name: variant_curve(results, variant, metric, x_axis=x_axis) for variant in results.variants}
    curves = {name: curve for name, curve in all_curves.items() if curve is not None}
    if not curves:
        return None
    max_x = max(float(x[-1]) for x, _ in curves.values())
    scale, unit_name = axis_unit(x_axis, max_x)
    figure, styles = style.new_figure(), variant_styles(results)
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        color, dashes, marker = styles[name]
        axes.fill_between(x / scale, y.min(0), y.max(0), color=color, alpha=BAND_ALPHA, linewidth=0)
        axes.plot(x / scale, y.mean(0), color=color, linestyle=dashes, marker=marker, markersize=3.6)
    # from the lowest loss to the highest after the beginning
    later = [y[:, x >= SKIPPED_SHARE * max_x] for x, y in curves.values()]
    low, high = min(float(y.min()) for _, y in curves.values()), max(float(y.max()) for y in later if y.size)
    margin = 0.05 * (high - low) or 0.5
    band = ("lowest to highest seed", Patch(color=style.QUIET, alpha=BAND_ALPHA))
    style.finish_axes(
        axes,
        [*((name, styles[name].sample()) for name in curves), band],
        ylim=(low - margin, high + margin),
        xlabel=unit_name,
        ylabel=metric_label(metric),
    )
    return figure


def metric_label(metric: str, relation: str = "") -> str:
    return f"{METRIC_NAMES[metric]}{relation} ({METRIC_UNITS[metric]})"


def difference_figure(results: StudyResults) -> Figure | None:
    """Each variant minus the baseline: every seed, their mean, its interval."""
    settings, styles = results.settings, variant_styles(results)
    baseline = next(variant.values for variant in results.variants if variant.name == settings.baseline)
    rows = [(v, v.difference) for v in results.variants if v.difference and v.difference.mean is not None]
    if not rows:
        return None
    figure = style.new_figure(0.9 + 0.45 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color=style.QUIET, linewidth=0.8)
    seed_style = {"marker": "o", "linestyle": "", "markersize": 4, "alpha": 0.6, "markeredgewidth": 0}
    for row, (variant, difference) in enumerate(rows):
        color = styles[variant.name].color
        seeds = [value - baseline[seed] for seed, value in variant.values.items() if seed in baseline]
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [row, row], color=color, linewidth=1.4)
        axes.plot(seeds, [row + SEED_OFFSET] * len(seeds), color=color, **seed_style)
        axes.plot(float(np.mean(seeds)), row, "D", color=color, markersize=5.5)
    axes.set_yticks(range(len(rows)), [style.printable_name(variant.name) for variant, _ in rows])
    entries = [("mean", style.dots("D", markersize=4.5)), ("a seed", style.dots("o", markersize=4.5))]
    entries.append((f"{1 - settings.alpha:.0%} interval", Line2D([], [], color=style.QUIET)))
    label = metric_label(settings.metric, f" minus that of {settings.baseline}")
    style.finish_axes(axes, entries, xlabel=label, ylim=(len(rows) - 0.5, -0.5))
    return figure


def law_figure(results: StudyResults) -> Figure | None:
    """Both axes logarithmic: every seed, the means, the line through those fitted, what it says of the others."""
    if (law := results.law) is None:
        return None
    figure, sizes = style.new_figure(), law.sizes
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=SIZE_NAMES[law.over], ylabel=metric_label(results.settings.metric))
    for variant in results.variants:
        size, values = sizes[variant.name], [variant.values[seed] for seed in law.seeds]
        color = variant_styles(results)[variant.name].color
        face = color if variant.name in law.fitted else style.PAPER
        axes.plot([size] * len(values), values, ".", color=color, alpha=0.5, markeredgewidth=0)
        axes.plot(size, float(np.mean(values)), "D", color=color, markersize=6, markerfacecolor=face)
    largest_fitted = max(sizes[name] for name in law.fitted)
    for low, high, dashes in ((min(sizes.values()), largest_fitted, "-"), (largest_fitted, max(sizes.values()), "--")):
        x = np.geomspace(low, high, 50)
        axes.plot(x, law.power.predict(x), color=style.INK, linestyle=dashes, linewidth=1)
    for prediction in law.predictions:
        ends = [prediction.low, prediction.high]
        axes.plot([prediction.size] * 2, ends, color=style.INK, linewidth=6, alpha=BAND_ALPHA, zorder=1)
    set_log_ticks(axes, sorted(set(sizes.values())))
    entries = [("a seed", style.dots(".")), ("mean, fitted", style.dots("D"))]
    entries += [("mean, predicted", style.dots("D", markerfacecolor=style.PAPER))]
    entries += [("the law", Line2D([], [], color=style.QUIET))]
    style.add_legend(figure, [*entries, ("its interval", Patch(color=style.QUIET, alpha=BAND_ALPHA))])
    return figure


def set_log_ticks(axes: Axes, sizes: list[float]) -> None:
    """Ticks at the sizes themselves, and at round losses."""
    axes.set_xticks(sizes, [f"{size:,.3g}" if size < 1e3 or size >= 1e12 else f"{size / 1e6:,.3g}M" for size in sizes])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(PLAIN_FORMAT)
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
