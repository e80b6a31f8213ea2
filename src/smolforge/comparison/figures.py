"""Runs to figures, each an SVG and a PNG: the loss, the learning rate, the speed, the gradient, where the time goes.

One run alone shows every step faintly and its running mean; several show what was measured on held-out text, and what
they learned from beside it.

Long rows of numbers made fit to draw: fewer points, less noise, readable units. NaN is a gap, and stays one.

Axes: n points, k points left.

What happened to a run, on its figures: a dotted line and a word for one run, a small mark on each of several curves.

Where a step lies, x says: one value for each of the run's records.
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
from smolforge.comparison.history import History, read
from smolforge.comparison.style import Look, step_time
from smolforge.errors import InvalidFile
from smolforge.models.stats import flops_per_token

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


POINTS, FEWEST = 5000, 120
"""Drawn in a figure in all, and of each curve at least: a file stays small, and print shows no more."""
MARKERS = 25
"""On a curve at most."""
ALONE, AMONG, FEW = 0.3, 0.16, 4
"""How faint single steps are, of one run and of a few; of more, only means are shown."""
STEPS = FuncFormatter(lambda value, _: f"{value:,.6g}")
TRAINING, HELD_OUT = (Look(color, style.SOLID, "o") for color in (style.BLUE, style.VERMILLION))
"""Of one run, which has colours to spare."""


def draw_all(runs: Sequence[History], out: Path) -> dict[str, list[Path]]:
    """Draw all that the runs have numbers for into a folder; returns each figure's files, the SVG first."""
    drawn = {name: style.save(partial(draw, runs), out / name) for name, draw in FIGURES.items()}
    return {name: files for name, files in drawn.items() if files}


def loss_curve(run: Path, out: Path, title: str) -> None:
    """The loss of one run over tokens, as one file, a PNG or an SVG."""
    with style.styled(out.stem):
        figure = loss([read(run)])
        if figure is None:
            raise InvalidFile(f"{run} has no loss to draw: no step was trained")
        style.headed(figure, title)
        style.write(figure, out)


def loss(runs: Sequence[History], over: Over = "tokens") -> Figure | None:
    """Training and held-out loss over tokens, steps or seconds."""
    frame = extent([run.column(column) for run in runs for column in ("loss", "validation_loss")])
    if frame is None:
        return None
    figure = style.canvas()
    axes = figure.subplots()
    scale, name = unit(over, max((along(run, over)[-1] for run in runs if run.metrics), default=0.0))
    x = [along(run, over) / scale for run in runs]
    key = _loss_alone(axes, runs[0], x[0]) if len(runs) == 1 else _loss_among(axes, runs, x)
    axes.set(xlabel=name, ylabel="loss (nats per token)", ylim=frame)
    axes.xaxis.set_major_formatter(STEPS)
    style.ruled(axes)
    style.legend(figure, key)
    return figure


def _loss_alone(axes: Axes, run: History, x: Float[np.ndarray, " n"]) -> style.Key:
    training, held = thinned(x, run.column("loss"), POINTS // 4), _held_out(run, x, POINTS // 4)
    _line(axes, training, TRAINING, faint=ALONE)
    _line(axes, _mean(training), TRAINING)
    _line(axes, held, HELD_OUT, marked=True)
    mark_axes(axes, run, x)
    key: style.Key = [("training", _sample(TRAINING, ALONE)), ("its running mean", _sample(TRAINING))]
    return key + ([("held out", _sample(HELD_OUT, marked=True))] if len(held[0]) else [])


def _loss_among(axes: Axes, runs: Sequence[History], x: list[Float[np.ndarray, " _"]]) -> style.Key:
    looks, each = style.looks(len(runs)), max(FEWEST, POINTS // 2 // len(runs))
    any_held = False
    for run, look, at in zip(runs, looks, x, strict=True):
        mean = _mean(thinned(at, run.column("loss"), each))
        held = _held_out(run, at, each)
        _line(axes, mean, look, faint=0.4 if len(held[0]) else None)
        _line(axes, held, look, marked=True)
        mark_curve(axes, run, at, held if len(held[0]) else mean, look.color)
        any_held |= len(held[0]) > 0
    key = _names(runs, looks, marked=any_held)
    grey = Look(style.QUIET, style.SOLID, "o")
    return key + ([("held out", _sample(grey, marked=True)), ("training", _sample(grey, 0.4))] if any_held else [])


def learning_rate(runs: Sequence[History]) -> Figure | None:
    """The schedule as it was gone through."""
    figure, there = _over_steps(runs, {"learning_rate": "learning rate"}, smooth=False)
    for axes in there.values():
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def speed(runs: Sequence[History]) -> Figure | None:
    """Tokens a second, and how much of what the device could do."""
    forms = {"tokens_per_second": EngFormatter(sep=""), "mfu": FuncFormatter(lambda value, _: f"{100 * value:g}%")}
    figure, there = _over_steps(runs, {"tokens_per_second": "tokens per second", "mfu": "model FLOPs utilisation"})
    for key, axes in there.items():
        values = [column[np.isfinite(column)] for run in runs for column in (run.column(key),)]
        usual = max(float(np.percentile(column, 99)) for column in values if len(column))
        axes.set_ylim(0, 1.15 * usual or 1.0)  # from nothing, and not up to a single lucky step
        axes.yaxis.set_major_formatter(forms[key])
    return figure


def gradient_norm(runs: Sequence[History]) -> Figure | None:
    """The norm of the whole gradient, before it is clipped."""
    figure, there = _over_steps(runs, {"grad_norm": "gradient norm"})
    for axes in there.values():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(partial(_between_decades, axes)))
    return figure


def _between_decades(axes: Axes, value: float, _: int) -> str:
    """Labels at 2 and 5 as well, where few decades are shown."""
    low, high = axes.get_ylim()
    return f"{value:g}" if high < 100 * low and f"{value:e}"[0] in "25" else ""


def _over_steps(
    runs: Sequence[History], columns: dict[str, str], smooth: bool = True
) -> tuple[Figure | None, dict[str, Axes]]:
    """One plot below the other for each column that any run has, by its key."""
    there = {key: name for key, name in columns.items() if any(np.isfinite(run.column(key)).any() for run in runs)}
    if not there:
        return None, {}
    figure = style.canvas(1.0 + 1.9 * len(there))
    rows = dict(zip(there, figure.subplots(len(there), sharex=True, squeeze=False)[:, 0], strict=True))
    looks, alone = style.looks(len(runs)), len(runs) == 1
    most = max(FEWEST, POINTS // (2 * len(runs) * len(rows)))
    for key, axes in rows.items():
        for run, look in zip(runs, looks, strict=True):
            steps = run.at.astype(np.float64)
            curve = thinned(steps, run.column(key), most)
            if smooth and len(runs) <= FEW:
                _line(axes, curve, look, faint=ALONE if alone else AMONG)
            curve = _mean(curve) if smooth else curve
            _line(axes, curve, look)
            if alone:
                mark_axes(axes, run, steps, words=key == next(iter(rows)))
            else:
                mark_curve(axes, run, steps, curve, look.color)
        axes.set_ylabel(there[key])
        style.ruled(axes)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(STEPS)
    style.legend(figure, [] if alone else _names(runs, looks))
    return figure, rows


def _held_out(run: History, x: Float[np.ndarray, " n"], most: int) -> Curve:
    return thinned(*known(x, run.column("validation_loss")), most)


def _mean(curve: Curve) -> Curve:
    return curve[0], smoothed(curve[1])


def _line(axes: Axes, curve: Curve, look: Look, faint: float | None = None, marked: bool = False) -> None:
    axes.plot(
        *curve,
        color=look.color,
        linestyle=look.dashes if faint is None else style.SOLID,
        marker=look.marker if marked else None,
        markersize=3.6,
        markevery=max(1, len(curve[0]) // MARKERS),
        alpha=faint,
        linewidth=1.3 if faint is None else 0.7,
    )


def _sample(look: Look, faint: float | None = None, marked: bool = False) -> Line2D:
    """A line as a legend shows it."""
    marker = look.marker if marked else ""
    return Line2D([], [], color=look.color, linestyle=look.dashes, marker=marker, markersize=4, alpha=faint)


def _names(runs: Sequence[History], looks: list[Look], marked: bool = False) -> style.Key:
    """Which line is which run, and what the small signs on them mean."""
    key: style.Key = [(run.name, _sample(look, marked=marked)) for run, look in zip(runs, looks, strict=True)]
    used = {word for run in runs for _, word in happened(run)}
    signs = {word: sign for word, sign in SIGNS.items() if word in used}
    return key + [(word, Line2D([], [], color=style.QUIET, linestyle="", marker=sign)) for word, sign in signs.items()]


FIGURES: dict[str, Callable[[Sequence[History]], Figure | None]] = {
    "loss-tokens": loss,
    "loss-steps": partial(loss, over="steps"),
    "loss-seconds": partial(loss, over="seconds"),
    "learning-rate": learning_rate,
    "speed": speed,
    "gradient-norm": gradient_norm,
    "step-time": step_time,
}
"""By the name of their files."""
