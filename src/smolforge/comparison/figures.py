"""Draw runs as figures, each an SVG and a PNG: loss, learning rate, speed, gradient norm, step time.

One run alone shows every step faintly and its running mean. Several runs show the validation loss, with the training
loss faint beside it. Long curves are downsampled; NaN is a gap and stays one. A resume, a rewind or a skipped update
is a dotted line with a label for one run, and a small sign on the curve for several.

Axes: n points (one for each record of metrics.jsonl), k points left.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter

from smolforge.comparison import style
from smolforge.comparison.history import RunHistory, read_history
from smolforge.comparison.style import LegendEntries, LineStyle
from smolforge.errors import InvalidFileError

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
SINGLE_ALPHA, SEVERAL_ALPHA, TRAINING_ALPHA, MAX_FAINT_RUNS = 0.3, 0.16, 0.4, 4
"""How faint single steps are, of one run and of a few, and means beside held-out losses; of more, only means."""
STEP_FORMAT = FuncFormatter(lambda value, _: f"{value:,.6g}")
PLAIN_FORMAT = FuncFormatter(lambda value, _: f"{value:g}")
PERCENT_FORMAT = FuncFormatter(lambda value, _: f"{100 * value:g}%")
PHASE_STYLES = {
    "data": ("waiting for data", "#8c8c8c", style.DARK),
    "forward": ("forward", style.SKY, style.DARK),
    "backward": ("backward", style.BLUE, style.LIGHT),
    "optimizer": ("optimizer", style.ORANGE, style.DARK),
    "other": ("other", style.GREEN, style.LIGHT),
    "between": ("between steps", style.PURPLE, style.DARK),
}
"""Of each part: its name, its colour, the colour of a word on it."""
MIN_LABEL_SHARE = 0.08
"""Of the whole width, for a number to stand inside."""
TRAINING_STYLE, VALIDATION_STYLE = (LineStyle(color, style.SOLID, "o") for color in (style.BLUE, style.VERMILLION))
"""Of one run, which has colours to spare."""


def x_values(run: RunHistory, x_axis: XAxis) -> Float[np.ndarray, " n"]:
    """Where each step lies, in tokens, steps or seconds."""
    return {"tokens": run.tokens, "steps": run.record_steps.astype(np.float64), "seconds": run.seconds}[x_axis]


def axis_unit(x_axis: XAxis, max_value: float) -> tuple[float, str]:
    """The largest unit that something so long is still more than one of, and its name."""
    return next((unit for unit in UNITS[x_axis] if max_value >= MIN_UNITS * unit[0]), UNITS[x_axis][-1])


def finite_mean(values: Float[np.ndarray, " n"]) -> float:
    """The mean without the gaps; NaN where there is nothing else."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def downsample(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], max_points: int) -> Curve:
    """At most so many points (3 or more): the first, the last, and means of equally many points between them."""
    if len(x) <= max_points:
        return x, y
    starts = np.linspace(1, len(x) - 1, max_points - 1).astype(int)
    x, y = (np.array(list(map(finite_mean, np.split(values, starts)))) for values in (x, y))
    return x, y


def running_mean(y: Float[np.ndarray, " n"], share: float = SMOOTHED_SHARE) -> Float[np.ndarray, " n"]:
    """A running mean, centred; at the steep beginning of fewer values, so that it begins as the curve does."""
    half = int(len(y) * share) // 2
    return np.array([finite_mean(y[i - min(half, i) : i + min(half, i) + 1]) for i in range(len(y))], dtype=np.float64)


def loss_limits(curves: list[Float[np.ndarray, " _"]]) -> tuple[float, float] | None:
    """From where to where a plot of losses goes: neither first steps nor a run that broke press the others flat.

    That is up to the highest value after the very beginning, if that is near what is usual. None has no numbers.
    """
    finite = [numbers for curve in curves if len(numbers := curve[np.isfinite(curve)])]
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


def draw_loss_curve(run: Path, out: Path, title: str) -> None:
    """The loss of one run over tokens, as one file, a PNG or an SVG."""
    with style.style_context(out.stem):
        figure = loss_figure([read_history(run)])
        if figure is None:
            raise InvalidFileError(f"{run} has no loss to draw: no step was trained")
        style.add_title(figure, title)
        style.write_figure(figure, out)


def loss_figure(runs: Sequence[RunHistory], x_axis: XAxis = "tokens") -> Figure | None:
    """Training and held-out loss over tokens, steps or seconds; one run alone has colors to spare for the two."""
    limits = loss_limits([run.column(column) for run in runs for column in ("loss", "validation_loss")])
    if limits is None:
        return None
    figure, single = style.new_figure(), len(runs) == 1
    axes, line_styles, any_validation = figure.subplots(), style.line_styles(len(runs)), False
    scale, name = axis_unit(x_axis, max((x_values(run, x_axis)[-1] for run in runs if run.metrics), default=0.0))
    max_points = max(MIN_POINTS, MAX_POINTS // 2 // max(2, len(runs)))
    for run, line_style in zip(runs, line_styles, strict=True):
        x, held_out = x_values(run, x_axis) / scale, run.column("validation_loss")
        training, measured = downsample(x, run.column("loss"), max_points), np.isfinite(held_out)
        mean, validation = _smooth_curve(training), downsample(x[measured], held_out[measured], max_points)
        any_validation |= bool(measured.any())
        if single:
            _plot_line(axes, training, TRAINING_STYLE, alpha=SINGLE_ALPHA)
            _plot_line(axes, mean, TRAINING_STYLE)
            _plot_line(axes, validation, VALIDATION_STYLE, with_markers=True)
            mark_axes(axes, run, x)
        else:
            _plot_line(axes, mean, line_style, alpha=TRAINING_ALPHA if measured.any() else None)
            _plot_line(axes, validation, line_style, with_markers=True)
            mark_curve(axes, run, x, curve=validation if measured.any() else mean, color=line_style.color)
    entries = _loss_entries(runs, line_styles, any_validation)
    axes.xaxis.set_major_formatter(STEP_FORMAT)
    style.finish_axes(axes, entries, xlabel=name, ylabel="loss (nats per token)", ylim=limits)
    return figure


def _loss_entries(runs: Sequence[RunHistory], line_styles: list[LineStyle], any_validation: bool) -> LegendEntries:
    """Which line is which run, or which loss."""
    if len(runs) == 1:
        training = [
            ("training", TRAINING_STYLE.sample(SINGLE_ALPHA, False)),
            ("its running mean", TRAINING_STYLE.sample(None, False)),
        ]
        return training + [("held out", VALIDATION_STYLE.sample())] * any_validation
    grey = LineStyle(style.QUIET, style.SOLID, "o")
    kinds = [("held out", grey.sample()), ("training", grey.sample(TRAINING_ALPHA, False))]
    return [*_run_entries(runs, line_styles, with_markers=any_validation), *kinds * any_validation]


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


def _smooth_curve(curve: Curve) -> Curve:
    return curve[0], running_mean(curve[1])


def _run_entries(runs: Sequence[RunHistory], line_styles: list[LineStyle], with_markers: bool = False) -> LegendEntries:
    """Which line is which run, and what the small signs on them mean."""
    labels = {label for run in runs for _, label in interruptions(run)}
    lines = [(run.name, each.sample(with_marker=with_markers)) for run, each in zip(runs, line_styles, strict=True)]
    return lines + [(label, style.dots(SIGNS[label])) for label in SIGNS if label in labels]


def _from_zero(axes: Axes, values: Sequence[np.ndarray]) -> None:
    axes.set_ylim(bottom=0)


def _to_typical(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """From nothing, and not up to a single lucky step."""
    axes.set_ylim(0, 1.15 * max(float(np.percentile(numbers, 99)) for numbers in values) or 1.0)


def _logarithmic(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """Labels at 2 and 5 as well, where few decades are shown."""

    def between_decades(value: float, _: int) -> str:
        low, high = axes.get_ylim()
        return f"{value:g}" if high < 100 * low and f"{value:e}"[0] in "25" else ""

    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(FuncFormatter(between_decades))


class Panel(NamedTuple):
    """A plot of one key of metrics.jsonl over steps."""

    key: str
    label: str
    set_limits: Callable[[Axes, Sequence[np.ndarray]], None]
    formatter: Formatter = PLAIN_FORMAT


PANELS = {
    "learning-rate": [Panel("learning_rate", "learning rate", _from_zero)],
    "speed": [
        Panel("tokens_per_second", "tokens per second", _to_typical, EngFormatter(sep="")),
        Panel("mfu", "model FLOPs utilisation", _to_typical, PERCENT_FORMAT),
    ],
    "gradient-norm": [Panel("grad_norm", "gradient norm", _logarithmic)],
}
"""Figures over steps: plots one below the other, by the name of their files."""


def steps_figure(runs: Sequence[RunHistory], name: str) -> Figure | None:
    """The panels that any run has numbers for. A learning rate is shown as it was; the rest is smoothed."""
    panels = [panel for panel in PANELS[name] if any(len(run.finite(panel.key)) for run in runs)]
    if not panels:
        return None
    figure = style.new_figure(1.0 + 1.9 * len(panels))
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    line_styles, single, smooth = style.line_styles(len(runs)), len(runs) == 1, name != "learning-rate"
    max_points = max(MIN_POINTS, MAX_POINTS // (2 * len(runs) * len(rows)))
    for panel, axes in zip(panels, rows, strict=True):
        for run, line_style in zip(runs, line_styles, strict=True):
            steps = x_values(run, "steps")
            curve = downsample(steps, run.column(panel.key), max_points)
            if smooth and len(runs) <= MAX_FAINT_RUNS:
                _plot_line(axes, curve, line_style, alpha=SINGLE_ALPHA if single else SEVERAL_ALPHA)
            curve = _smooth_curve(curve) if smooth else curve
            _plot_line(axes, curve, line_style)
            if single:
                mark_axes(axes, run, steps, labeled=axes is rows[0])
            else:
                mark_curve(axes, run, steps, curve=curve, color=line_style.color)
        style.finish_axes(axes, ylabel=panel.label)
        panel.set_limits(axes, [numbers for run in runs if len(numbers := run.finite(panel.key))])
        axes.yaxis.set_major_formatter(panel.formatter)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(STEP_FORMAT)
    style.add_legend(figure, [] if single else _run_entries(runs, line_styles))
    return figure


def mean_phase_seconds(run: RunHistory) -> dict[str, float]:
    """Seconds a step, for each part the run knows; the first step of each start, which compiles, is left out."""
    after_first = ~np.isin(run.record_steps - 1, [0, *run.resumes])
    included = after_first if after_first.any() else np.ones_like(after_first)
    means = {phase: finite_mean(values[included]) for phase, values in run.phase_seconds.items()}
    return {phase: mean for phase, mean in means.items() if np.isfinite(mean)}


def step_time_figure(runs: Sequence[RunHistory]) -> Figure | None:
    """One bar for each run that knows its parts, the first on top: parts one after the other, the whole at the end."""
    bars = [(style.printable_name(run.name), mean_phase_seconds(run)) for run in runs if run.phase_seconds]
    if not bars:
        return None
    max_seconds = max(sum(phases.values()) for _, phases in bars)
    scale, unit, unit_name = (1.0, "s", "seconds") if max_seconds >= 1 else (1e3, "ms", "milliseconds")
    max_value, figure = max_seconds * scale, style.new_figure(0.7 + 0.42 * len(bars))
    axes = figure.subplots()
    for row, (_, phases) in enumerate(bars):
        left = 0.0
        for phase, (_, color, text_color) in PHASE_STYLES.items():
            width = phases.get(phase, 0.0) * scale
            axes.barh(row, width, left=left, height=0.62, color=color, edgecolor=style.PAPER, linewidth=0.8)
            if width > MIN_LABEL_SHARE * max_value:
                text = {"ha": "center", "va": "center", "fontsize": 8.5, "color": text_color}
                axes.text(left + width / 2, row, _format_time(width), **text)
            left += width
        axes.text(left + 0.008 * max_value, row, f"{_format_time(left)} {unit}", ha="left", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set(xlabel=f"{unit_name} per step", xlim=(0, 1.1 * max_value), ylim=(len(bars) - 0.45, -0.55))
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    used = {phase for _, phases in bars for phase in phases}
    parts = [part for phase, part in PHASE_STYLES.items() if phase in used]
    style.add_legend(figure, [(name, Patch(color=color)) for name, color, _ in parts])
    return figure


def _format_time(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


FIGURES: dict[str, Callable[[Sequence[RunHistory]], Figure | None]] = {
    "loss-tokens": loss_figure,
    "loss-steps": partial(loss_figure, x_axis="steps"),
    "loss-seconds": partial(loss_figure, x_axis="seconds"),
    **{name: partial(steps_figure, name=name) for name in PANELS},
    "step-time": step_time_figure,
}
"""By the name of their files."""
