"""Runs to figures, each an SVG and a PNG: the loss, the learning rate, the speed, the gradient, where the time goes.

One run alone shows every step faintly and its running mean; several show what was measured on held-out text, and what
they learned from beside it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter

from smolforge.comparison import style
from smolforge.comparison.curves import Curve, Over, along, extent, known, smoothed, thinned, unit
from smolforge.comparison.history import History, read
from smolforge.comparison.marks import SIGNS, happened, mark_axes, mark_curve
from smolforge.comparison.parts import step_time
from smolforge.comparison.style import Look
from smolforge.errors import InvalidFile

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
