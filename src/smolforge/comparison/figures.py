"""Draw runs as figures, each an SVG and a PNG: loss, learning rate, speed, gradient norm, step time.

One run alone shows every step faintly and its running mean. Several runs show the validation loss, with the training
loss faint beside it. Long curves are downsampled; NaN is a gap and stays one. A resume, a rewind or a skipped update
is a dotted line with a label for one run, and a small sign on the curve for several.

Axes: n points (one for each record of metrics.jsonl), k points left.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter

from smolforge.comparison import style
from smolforge.comparison.history import RunHistory, read_history
from smolforge.comparison.style import LineStyle, step_time_figure
from smolforge.errors import InvalidFileError
from smolforge.models.stats import flops_per_token

Curve = tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]
"""x and y."""
XAxis = Literal["tokens", "steps", "seconds", "flops"]
"""What a curve runs over."""
UNITS: dict[XAxis, list[tuple[float, str]]] = {
    "tokens": [(1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1.0, "tokens")],
    "steps": [(1.0, "step")],
    "seconds": [(3600.0, "hours of training"), (60.0, "minutes of training"), (1.0, "seconds of training")],
    "flops": [(1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")],
}
MIN_UNITS = 1.5
SMOOTHED_SHARE = 1 / 50
"""Of a curve, that each of its smoothed values is a mean of."""

STEEP_SHARE = 0.03
"""Of a run, at its beginning, that a plot need not show to its height."""
MAX_LOSS_FACTOR = 1.25
"""Times what a run begins with, or half of it stays below: a loss above that need not be shown to its height either."""
SIGNS = {"resumed": "|", "rewound": "<", "left out": "x"}
"""What marks on a curve mean."""
LETTER_WIDTH, MIN_LABEL_DISTANCE, LABEL_LANES = 0.0108, 0.03, 2
"""Of a plot's width: what a letter takes, and how near the same has to happen again to need no word; words' lines."""
MAX_POINTS, MIN_POINTS = 5000, 120
"""Drawn in a figure in all, and of each curve at least: a file stays small, and print shows no more."""
MARKERS = 25
"""On a curve at most."""
SINGLE_ALPHA, SEVERAL_ALPHA, MAX_FAINT_RUNS = 0.3, 0.16, 4
"""How faint single steps are, of one run and of a few; of more, only means are shown."""
STEP_FORMAT = FuncFormatter(lambda value, _: f"{value:,.6g}")
TRAINING_STYLE, VALIDATION_STYLE = (LineStyle(color, style.SOLID, "o") for color in (style.BLUE, style.VERMILLION))
"""Of one run, which has colours to spare."""


def x_values(run: RunHistory, x_axis: XAxis) -> Float[np.ndarray, " n"]:
    """Where each step lies, in tokens, steps, seconds or FLOPs."""
    match x_axis:
        case "tokens":
            return run.tokens
        case "steps":
            return run.record_steps.astype(np.float64)
        case "seconds":
            return run.seconds
        case "flops":
            recipe = run.recipe
            return run.tokens * flops_per_token(recipe.model, recipe.train.sequence_length)


def axis_unit(x_axis: XAxis, max_value: float) -> tuple[float, str]:
    """The largest unit that something so long is still more than one of, and its name."""
    return next((unit for unit in UNITS[x_axis] if max_value >= MIN_UNITS * unit[0]), UNITS[x_axis][-1])


def downsample(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], max_points: int) -> Curve:
    """At most so many points (3 or more): the first, the last, and means of equally many points between them."""
    if len(x) <= max_points:
        return x, y
    starts = np.linspace(1, len(x) - 1, max_points - 1).astype(int)[:-1]
    counts = np.diff([*starts, len(x) - 1])
    finite = np.isfinite(y)
    with np.errstate(invalid="ignore"):
        means = _sums(np.where(finite, y, 0.0), starts) / _sums(finite.astype(float), starts)
    return np.array([x[0], *(_sums(x, starts) / counts), x[-1]]), np.array([y[0], *means, y[-1]])


def _sums(values: Float[np.ndarray, " n"], starts: Int[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Of the stretches that begin at the edges; the very last value belongs to none."""
    return np.add.reduceat(values[:-1], starts)


def running_mean(y: Float[np.ndarray, " n"], share: float = SMOOTHED_SHARE) -> Float[np.ndarray, " n"]:
    """A running mean, centred; at the steep beginning of fewer values, so that it begins as the curve does."""
    half = int(len(y) * share) // 2
    stretches = (y[i - min(half, i) : i + min(half, i) + 1] for i in range(len(y)))
    finite = (stretch[np.isfinite(stretch)] for stretch in stretches)
    return np.array([stretch.mean() if len(stretch) else np.nan for stretch in finite], dtype=np.float64)


def drop_gaps(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Curve:
    """Without the gaps."""
    finite = np.isfinite(y)
    return x[finite], y[finite]


def loss_limits(curves: list[Float[np.ndarray, " _"]]) -> tuple[float, float] | None:
    """From where to where a plot of losses goes: neither first steps nor a run that broke press the others flat.

    That is up to the highest value after the very beginning, if that is near what is usual. None has no numbers.
    """
    finite = [curve[np.isfinite(curve)] for curve in curves]
    finite = [curve for curve in finite if len(curve)]
    if not finite:
        return None
    typical = max(max(float(curve[0]), float(np.median(curve))) for curve in finite)
    later = max(float(curve[int(len(curve) * STEEP_SHARE) :].max()) for curve in finite)
    low, high = min(float(curve.min()) for curve in finite), min(later, MAX_LOSS_FACTOR * typical)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def interruptions(run: RunHistory) -> list[tuple[int, str]]:
    """(step, word) of what interrupted a run's curve, in order."""
    events = {"resumed": run.resumes, "rewound": run.rewinds, "left out": run.skipped_steps}
    return sorted((step, label) for label, steps in events.items() for step in steps)


def mark_curve(axes: Axes, run: RunHistory, x: Float[np.ndarray, " n"], *, curve: Curve, color: str) -> None:
    """Signs on the curve of one run among several."""
    finite = np.isfinite(curve[1])
    if finite.any():
        for step, label in interruptions(run):
            x_mark = _x_at_step(run, x, step)
            height = np.interp(x_mark, curve[0][finite], curve[1][finite])
            axes.plot(x_mark, height, color=color, marker=SIGNS[label], markersize=11, markeredgewidth=1.4, zorder=4)


def mark_axes(axes: Axes, run: RunHistory, x: Float[np.ndarray, " n"], *, labeled: bool = True) -> None:
    """Dotted lines for the only run there is, with words above them where there is room."""
    ends, last = [-np.inf] * LABEL_LANES, ("", -np.inf)
    for step, label in interruptions(run):
        x_mark = _x_at_step(run, x, step)
        axes.axvline(x_mark, color=style.QUIET, linestyle=":", linewidth=1)
        share = (x_mark - float(x[0])) / (float(x[-1] - x[0]) or 1.0)
        if not labeled or (label == last[0] and share - last[1] < MIN_LABEL_DISTANCE):
            continue
        text = f"{label} at step {step:,}"
        side, start = _label_alignment(share, LETTER_WIDTH * len(text))
        lane = next((lane for lane, end in enumerate(ends) if start > end), None)
        if lane is not None:
            ends[lane], last = start + LETTER_WIDTH * len(text), (label, share)
            above = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "bottom"}
            axes.annotate(text, (x_mark, 1), (0, 3 + 11 * lane), **above, ha=side, fontsize=8.5, color=style.QUIET)


def _label_alignment(share: float, width: float) -> tuple[str, float]:
    """How a word is set at a share of the plot's width, so that it stays within, and where it then begins."""
    if share < width / 2:
        return "left", share
    return ("right", share - width) if share > 1 - width / 2 else ("center", share - width / 2)


def _x_at_step(run: RunHistory, x: Float[np.ndarray, " n"], step: int) -> float:
    """Where the last record up to a step lies."""
    return float(x[max(0, int(np.searchsorted(run.record_steps, step, "right")) - 1)])


def draw_all(runs: Sequence[RunHistory], out: Path) -> dict[str, list[Path]]:
    """Draw all that the runs have numbers for into a folder; returns each figure's files, the SVG first."""
    files_by_figure = {name: style.draw_and_save(partial(draw, runs), out / name) for name, draw in FIGURES.items()}
    return {name: files for name, files in files_by_figure.items() if files}


def draw_loss_curve(run: Path, out: Path, title: str) -> None:
    """The loss of one run over tokens, as one file, a PNG or an SVG."""
    with style.style_context(out.stem):
        figure = loss_figure([read_history(run)])
        if figure is None:
            raise InvalidFileError(f"{run} has no loss to draw: no step was trained")
        style.add_title(figure, title)
        style.write_figure(figure, out)


def loss_figure(runs: Sequence[RunHistory], x_axis: XAxis = "tokens") -> Figure | None:
    """Training and held-out loss over tokens, steps or seconds."""
    frame = loss_limits([run.column(column) for run in runs for column in ("loss", "validation_loss")])
    if frame is None:
        return None
    figure = style.new_figure()
    axes = figure.subplots()
    scale, name = axis_unit(x_axis, max((x_values(run, x_axis)[-1] for run in runs if run.metrics), default=0.0))
    x = [x_values(run, x_axis) / scale for run in runs]
    entries = _draw_single_loss(axes, runs[0], x[0]) if len(runs) == 1 else _draw_losses(axes, runs, x)
    axes.set(xlabel=name, ylabel="loss (nats per token)", ylim=frame)
    axes.xaxis.set_major_formatter(STEP_FORMAT)
    style.style_axes(axes)
    style.add_legend(figure, entries)
    return figure


def _draw_single_loss(axes: Axes, run: RunHistory, x: Float[np.ndarray, " n"]) -> style.LegendEntries:
    training, validation = (
        downsample(x, run.column("loss"), MAX_POINTS // 4),
        _validation_curve(run, x, MAX_POINTS // 4),
    )
    _plot_line(axes, training, TRAINING_STYLE, alpha=SINGLE_ALPHA)
    _plot_line(axes, _smooth_curve(training), TRAINING_STYLE)
    _plot_line(axes, validation, VALIDATION_STYLE, with_markers=True)
    mark_axes(axes, run, x)
    entries: style.LegendEntries = [
        ("training", _legend_line(TRAINING_STYLE, SINGLE_ALPHA)),
        ("its running mean", _legend_line(TRAINING_STYLE)),
    ]
    return entries + ([("held out", _legend_line(VALIDATION_STYLE, with_marker=True))] if len(validation[0]) else [])


def _draw_losses(axes: Axes, runs: Sequence[RunHistory], x: list[Float[np.ndarray, " _"]]) -> style.LegendEntries:
    line_styles, max_points = style.line_styles(len(runs)), max(MIN_POINTS, MAX_POINTS // 2 // len(runs))
    any_validation = False
    for run, line_style, run_x in zip(runs, line_styles, x, strict=True):
        mean = _smooth_curve(downsample(run_x, run.column("loss"), max_points))
        validation = _validation_curve(run, run_x, max_points)
        _plot_line(axes, mean, line_style, alpha=0.4 if len(validation[0]) else None)
        _plot_line(axes, validation, line_style, with_markers=True)
        mark_curve(axes, run, run_x, curve=validation if len(validation[0]) else mean, color=line_style.color)
        any_validation |= len(validation[0]) > 0
    entries = _legend_entries(runs, line_styles, with_markers=any_validation)
    grey = LineStyle(style.QUIET, style.SOLID, "o")
    return entries + (
        [("held out", _legend_line(grey, with_marker=True)), ("training", _legend_line(grey, 0.4))]
        if any_validation
        else []
    )


def learning_rate_figure(runs: Sequence[RunHistory]) -> Figure | None:
    """The schedule as it was gone through."""
    figure, axes_by_column = _plot_over_steps(runs, {"learning_rate": "learning rate"}, smooth=False)
    for axes in axes_by_column.values():
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def speed_figure(runs: Sequence[RunHistory]) -> Figure | None:
    """Tokens a second, and how much of what the device could do."""
    formatters = {"tokens_per_second": EngFormatter(sep=""), "mfu": FuncFormatter(lambda value, _: f"{100 * value:g}%")}
    figure, axes_by_column = _plot_over_steps(
        runs, {"tokens_per_second": "tokens per second", "mfu": "model FLOPs utilisation"}
    )
    for key, axes in axes_by_column.items():
        values = [column[np.isfinite(column)] for run in runs for column in (run.column(key),)]
        typical = max(float(np.percentile(column, 99)) for column in values if len(column))
        axes.set_ylim(0, 1.15 * typical or 1.0)  # from nothing, and not up to a single lucky step
        axes.yaxis.set_major_formatter(formatters[key])
    return figure


def gradient_norm_figure(runs: Sequence[RunHistory]) -> Figure | None:
    """The norm of the whole gradient, before it is clipped."""
    figure, axes_by_column = _plot_over_steps(runs, {"grad_norm": "gradient norm"})
    for axes in axes_by_column.values():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(partial(_between_decades, axes)))
    return figure


def _between_decades(axes: Axes, value: float, _: int) -> str:
    """Labels at 2 and 5 as well, where few decades are shown."""
    low, high = axes.get_ylim()
    return f"{value:g}" if high < 100 * low and f"{value:e}"[0] in "25" else ""


def _plot_over_steps(
    runs: Sequence[RunHistory], columns: dict[str, str], smooth: bool = True
) -> tuple[Figure | None, dict[str, Axes]]:
    """One plot below the other for each column that any run has, by its key."""
    labels = {key: name for key, name in columns.items() if any(np.isfinite(run.column(key)).any() for run in runs)}
    if not labels:
        return None, {}
    figure = style.new_figure(1.0 + 1.9 * len(labels))
    rows = dict(zip(labels, figure.subplots(len(labels), sharex=True, squeeze=False)[:, 0], strict=True))
    line_styles, single = style.line_styles(len(runs)), len(runs) == 1
    max_points = max(MIN_POINTS, MAX_POINTS // (2 * len(runs) * len(rows)))
    for key, axes in rows.items():
        for run, line_style in zip(runs, line_styles, strict=True):
            steps = run.record_steps.astype(np.float64)
            curve = downsample(steps, run.column(key), max_points)
            if smooth and len(runs) <= MAX_FAINT_RUNS:
                _plot_line(axes, curve, line_style, alpha=SINGLE_ALPHA if single else SEVERAL_ALPHA)
            curve = _smooth_curve(curve) if smooth else curve
            _plot_line(axes, curve, line_style)
            if single:
                mark_axes(axes, run, steps, labeled=key == next(iter(rows)))
            else:
                mark_curve(axes, run, steps, curve=curve, color=line_style.color)
        axes.set_ylabel(labels[key])
        style.style_axes(axes)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(STEP_FORMAT)
    style.add_legend(figure, [] if single else _legend_entries(runs, line_styles))
    return figure, rows


def _validation_curve(run: RunHistory, x: Float[np.ndarray, " n"], max_points: int) -> Curve:
    return downsample(*drop_gaps(x, run.column("validation_loss")), max_points)


def _smooth_curve(curve: Curve) -> Curve:
    return curve[0], running_mean(curve[1])


def _plot_line(
    axes: Axes, curve: Curve, line_style: LineStyle, *, alpha: float | None = None, with_markers: bool = False
) -> None:
    axes.plot(
        *curve,
        color=line_style.color,
        linestyle=line_style.dashes if alpha is None else style.SOLID,
        marker=line_style.marker if with_markers else None,
        markersize=3.6,
        markevery=max(1, len(curve[0]) // MARKERS),
        alpha=alpha,
        linewidth=1.3 if alpha is None else 0.7,
    )


def _legend_line(line_style: LineStyle, alpha: float | None = None, with_marker: bool = False) -> Line2D:
    """A line as a legend shows it."""
    marker = line_style.marker if with_marker else ""
    return Line2D([], [], color=line_style.color, linestyle=line_style.dashes, marker=marker, markersize=4, alpha=alpha)


def _legend_entries(
    runs: Sequence[RunHistory], line_styles: list[LineStyle], with_markers: bool = False
) -> style.LegendEntries:
    """Which line is which run, and what the small signs on them mean."""
    entries: style.LegendEntries = [
        (run.name, _legend_line(line_style, with_marker=with_markers))
        for run, line_style in zip(runs, line_styles, strict=True)
    ]
    used_labels = {label for run in runs for _, label in interruptions(run)}
    signs = {label: sign for label, sign in SIGNS.items() if label in used_labels}
    return entries + [
        (label, Line2D([], [], color=style.QUIET, linestyle="", marker=sign)) for label, sign in signs.items()
    ]


FIGURES: dict[str, Callable[[Sequence[RunHistory]], Figure | None]] = {
    "loss-tokens": loss_figure,
    "loss-steps": partial(loss_figure, x_axis="steps"),
    "loss-seconds": partial(loss_figure, x_axis="seconds"),
    "learning-rate": learning_rate_figure,
    "speed": speed_figure,
    "gradient-norm": gradient_norm_figure,
    "step-time": step_time_figure,
}
"""By the name of their files."""
