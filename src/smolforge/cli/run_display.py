"""Show the progress of a run: a live view on a terminal, plain lines elsewhere.

step ━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━ 180/300 0:01:47
loss         4.912  █▆▅▄▄▃▃▂▂▂▁▁▁▁  4.88 to 8.78
tokens/s     5,591  ▇▇█▇▇▇▇█▇▇▇▇▇▇  0 to 5,702
MFU 40%  lr 1.50e-02  grad 1.16  0.71 GiB  33 s left

Bars and sparklines are drawn with Unicode's block characters.
"""

import logging
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from smolforge.cli.table import UNLIMITED_WIDTH, counting_progress, table_lines
from smolforge.config import Optim, Recipe, Train
from smolforge.formatting import format_duration
from smolforge.runs.context import ProgressListener
from smolforge.runs.estimate import RunEstimate, trainable_parameter_count
from smolforge.training.loop import TrainState

PLAIN_INTERVAL_SECONDS = 10
MAX_PARTS_ABOVE_LIVE = 3
"""Parts of a line that stay above the live view: it has the others."""
BLOCK_LEVELS = "▁▂▃▄▅▆▇"
"""Without the full block, so that curves below each other do not touch."""
NON_FINITE = "!"
"""Marks a value that is NaN or infinite: seldom, and it must be visible."""
MAX_CELLS = 512
"""More than a terminal is wide, and few enough to draw four times a second."""
MAX_SAMPLE_CHARS = 600
NAME_WIDTH = 20
"""Columns of a curve's name and value."""
MIN_WIDTH_FOR_SCALE = 60
"""Columns from which on a curve's range is shown."""


class Display(ProgressListener):
    """Show the progress of runs on standard error: a live view on a terminal, plain lines elsewhere or with `plain`."""

    def __init__(self, quiet: bool = False, plain: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        warning_console = Console(stderr=True, highlight=False, soft_wrap=True) if quiet else self.console
        self.plain = plain or quiet or not self.console.is_terminal or self.console.is_dumb_terminal
        self.live: Live | Progress | None = None
        bar = BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan")
        self.progress = Progress(
            TextColumn("step"), bar, MofNCompleteColumn(), TimeElapsedColumn(), console=self.console, expand=True
        )
        self.step_task = self.progress.add_task("step", total=None)
        self.live_view = LiveView(self.progress)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.steps, self.last_print_time = 0, 0.0
        self.handler = RichHandler(logging.WARNING, warning_console, show_time=False, show_path=False)

    def __enter__(self) -> "Display":
        logging.getLogger("smolforge").addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        logging.getLogger("smolforge").removeHandler(self.handler)

    def stop(self) -> None:
        """Stop all live drawing."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def print_line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def on_plan(self, recipe: Recipe, estimate: RunEstimate, start: TrainState) -> None:
        self.stop()
        width = UNLIMITED_WIDTH if self.plain else self.console.width
        self.print_line("\n".join(plan_lines(recipe, estimate, start, width=width)))
        self.steps = recipe.train.steps
        self.progress.reset(self.step_task, total=recipe.train.steps, completed=start.step)
        self.live_view = LiveView(self.progress)

    def on_prepare(self, counts: dict[str, int], source: str = "") -> None:
        """Print how much of the text, or of one source of a mixture, is tokenized."""
        self.print_line(f"{source}: {corpus_line(counts)}" if source else corpus_line(counts))

    def on_reference(self, pairs: int, total: int) -> None:
        """Show the reference model's pass before the first step: a bar on a terminal, else a line at the end."""
        if not isinstance(self.live, Progress):
            self.live = counting_progress(self.console, disable=self.plain)
            self.live.add_task("reference", total=total)
            self.live.start()
        self.live.update(self.live.task_ids[0], completed=pairs)
        if pairs == total:
            self.stop()
            self.print_line(f"read {total:,} pairs with the model to start from")

    def on_restored(self, step: int, mirror: Path) -> None:
        self.print_line(f"restored step {step:,} from {mirror}")

    def on_mirror(self, step: int, bytes_moved: int) -> None:
        """Print now and then how far the copy to the mirror is, once training has ended."""
        self.stop()
        if time.perf_counter() - self.last_print_time > PLAIN_INTERVAL_SECONDS:
            self.last_print_time = time.perf_counter()
            self.print_line(f"copying step {step:,} to the mirror: {bytes_moved / 1e6:,.0f} MB so far")

    def on_sample(self, text: str) -> None:
        self.live_view.sample = " ".join(text.split())

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Show a step: always in the live view, else after an evaluation or after a while."""
        for listener in self.listeners:
            listener(metrics)
        if self.live is None and not self.plain:  # not before: until then trackers may ask for a login
            self.live = Live(self.live_view, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        self.progress.update(self.step_task, completed=metrics["step"])
        evaluated = any(name.startswith(("validation_loss", "task_")) for name in metrics)
        if self.live is not None:
            self.live_view.on_step(metrics)
            if evaluated:
                parts = [f"step {metrics['step']:,}", *metrics_parts(metrics)[:MAX_PARTS_ABOVE_LIVE]]
                self.print_line("\n  ".join(pack_into_lines(parts, self.console.width - 2)))
            return
        due = time.perf_counter() - self.last_print_time > PLAIN_INTERVAL_SECONDS
        if evaluated or due or metrics["step"] == self.steps:
            self.last_print_time = time.perf_counter()
            self.print_line(f"step {metrics['step']:,}/{self.steps:,}  {'  '.join(metrics_parts(metrics))}")
            if self.live_view.sample:
                self.print_line(f"  sample: {self.live_view.sample[:200]}")
                self.live_view.sample = ""


class LiveView:
    """Draw the progress of a run, as wide as the terminal is at that moment."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss, self.speed = Curve(), Curve()
        self.metrics: dict[str, Any] = {}
        self.sample = ""

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Add a step; the speed of the first one is left out, because it compiles and allocates."""
        self.metrics = metrics
        self.loss.add(metrics["step"], metrics["loss"])
        if "tokens_per_second_median" in metrics:
            self.speed.add(metrics["step"], metrics["tokens_per_second"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        yield self.progress
        if not self.metrics:
            return
        yield from self._curve_lines(width)
        for line in pack_into_lines(secondary_parts(self.metrics), width):
            yield Text(line, no_wrap=True, overflow="ellipsis")
        if self.sample:
            sample = Text(self.sample[-MAX_SAMPLE_CHARS:], no_wrap=False, overflow="fold")
            yield Panel(sample, title="last sample", width=width)

    def _curve_lines(self, width: int) -> Iterator[Text]:
        """Yield a line per curve, all equally long, with their ranges where the terminal is wide enough."""
        losses, speeds = self.loss.values(), self.speed.values()
        loss_ends, (_, fastest) = finite_range(losses), finite_range(speeds)
        curves = (
            ("loss", f"{self.metrics['loss']:.3f}", losses, loss_ends, "{:.2f} to {:.2f}", "cyan"),
            ("tokens/s", f"{token_rate(self.metrics):,.0f}", speeds, (0.0, fastest), "{:,.0f} to {:,.0f}", "green"),
        )
        ranges = [f"  {spec.format(*ends)}" if math.isfinite(ends[1]) else "" for _, _, _, ends, spec, _ in curves]
        scale_width = max(map(len, ranges)) if width >= MIN_WIDTH_FOR_SCALE else 0
        curve_width = max(0, min(width - NAME_WIDTH - scale_width, max(len(losses), len(speeds))))
        for (name, value, values, ends, _, style), range_text in zip(curves, ranges, strict=True):
            line = Text(f"{name:<9}{value:>{NAME_WIDTH - 11}}  ", no_wrap=True, overflow="crop")
            line.append(f"{sparkline(values, curve_width, ends):<{curve_width}}", style=style)
            yield line.append(range_text, style="dim") if scale_width else line


class Cell(NamedTuple):
    """Neighboring steps: the last one, their count, and the sum of their values."""

    last_step: int
    count: int
    total: float


class Curve:
    """Values over all steps as means of neighbors, so that a million steps take no more memory."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.steps_per_cell = 1
        """Steps of a full cell."""

    def add(self, step: int, value: float | None) -> None:
        """Add a value; a step that goes back drops the values after it."""
        while self.cells and self.cells[-1].last_step >= step:
            self.cells.pop()
        has_room = self.cells and self.cells[-1].count < self.steps_per_cell
        last = [self.cells.pop()] if has_room else []
        self.cells.append(_merge([*last, Cell(step, 1, math.nan if value is None else value)]))
        if len(self.cells) > MAX_CELLS:
            self.cells = [_merge(self.cells[index : index + 2]) for index in range(0, len(self.cells), 2)]
            self.steps_per_cell *= 2

    def values(self) -> list[float]:
        """Return the means, oldest first; not finite where one of the values was not."""
        return [cell.total / cell.count for cell in self.cells]


def _merge(cells: Sequence[Cell]) -> Cell:
    _, counts, totals = zip(*cells, strict=True)
    return Cell(cells[-1].last_step, sum(counts), sum(totals))


def sparkline(values: Sequence[float | None], width: int, ends: tuple[float, float] | None = None) -> str:
    """Draw all values, oldest first, in at most `width` characters, each the mean of equally many neighbors.

    The lowest block is the minimum of all values, and the highest the maximum, unless other `ends` are given.
    """
    low, high = ends or finite_range(values)
    span = high / 2 - low / 2  # of halves, which do not overflow

    def block(value: float) -> str:
        if math.isnan(value):
            return NON_FINITE
        level = int((value / 2 - low / 2) / span * len(BLOCK_LEVELS)) if span > 0 else len(BLOCK_LEVELS) // 2
        return BLOCK_LEVELS[max(0, min(len(BLOCK_LEVELS) - 1, level))]

    return "".join(map(block, resample_curve(values, width)))


def finite_range(values: Sequence[float | None]) -> tuple[float, float]:
    """Return the minimum and maximum of the finite values, or NaN if there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return min(finite, default=math.nan), max(finite, default=math.nan)


def resample_curve(values: Sequence[float | None], width: int) -> list[float]:
    """Return at most `width` means of neighbors; NaN where one of them is not finite."""
    finite = [value if value is not None and math.isfinite(value) else math.nan for value in values]
    num_cells = max(0, min(len(values), width))
    edges = [len(values) * index // num_cells for index in range(num_cells + 1)] if num_cells else []
    return [math.fsum(value / (stop - start) for value in finite[start:stop]) for start, stop in pairwise(edges)]


def pack_into_lines(parts: Sequence[str], width: int) -> list[str]:
    """Put as many parts in each line as fit; no part is broken."""
    text = "  ".join(part.replace(" ", "\xa0") for part in parts)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def token_rate(metrics: dict[str, Any]) -> float:
    """Return the running median of tokens/s, or this step's where it is the first."""
    return metrics.get("tokens_per_second_median", metrics["tokens_per_second"])


def metrics_parts(metrics: dict[str, Any]) -> list[str]:
    """Return the parts of one step's line."""
    tasks = (name for name in metrics if name.startswith("task_") and name.endswith("_acc"))
    accuracies = ", ".join(f"{name[5:-4]} acc {metrics[name]:.1%}" for name in tasks)
    validation = validation_part(metrics) if "validation_loss" in metrics else ""
    rate = f"{token_rate(metrics):,.0f} tokens/s"
    parts = [f"loss {metrics['loss']:.3f}", accuracies, validation, rate, *secondary_parts(metrics)]
    return [part for part in parts if part]


def validation_part(metrics: dict[str, Any]) -> str:
    """Return the validation metrics, of text or of preference pairs."""
    loss = f"held out {metrics['validation_loss']:.3f}"
    if "validation_bits_per_byte" in metrics:
        return f"{loss} = {metrics['validation_bits_per_byte']:.3f} bits/byte"
    margin, accuracy = metrics["validation_reward_margin"], metrics["validation_reward_accuracy"]
    return f"{loss}, margin {margin:.3f}, {accuracy:.0%} right"


def secondary_parts(metrics: dict[str, Any]) -> list[str]:
    """Return the metrics of a step besides loss and rate."""
    parts = [f"margin {metrics['reward_margin']:.3f}"] if "reward_margin" in metrics else []
    parts += [f"MFU {metrics['mfu']:.0%}", f"lr {metrics['learning_rate']:.2e}", f"grad {metrics['grad_norm']:.2f}"]
    parts.append(f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB")
    return [*parts, f"{format_duration(metrics['seconds_left'])} left"] if "seconds_left" in metrics else parts


def corpus_line(counts: dict[str, int]) -> str:
    documents = f"{counts['documents']:,} document{'s' * (counts['documents'] != 1)}"
    return f"tokenised {documents}, {counts['bytes'] / 1e6:.1f} MB, {counts['tokens']:,} tokens"


def plan_lines(recipe: Recipe, estimate: RunEstimate, start: TrainState, *, width: int) -> list[str]:
    """Return the lines a run starts with, wrapped inside a width."""
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(estimate.parameters.items()))
    micro_batches = math.ceil(recipe.train.sequences_per_step / recipe.train.sequences_per_micro_batch)
    batch = f"{recipe.train.sequences_per_step} x {recipe.train.sequence_length} tokens"
    steps = f"{start.step:,} to {recipe.train.steps:,}" if start.step else f"{recipe.train.steps:,}"
    lora = recipe.lora.rank is not None
    values = {
        "parameters": f"{sum(estimate.parameters.values()):,} ({counts})"
        + (f"; low-rank updates of {trainable_parameter_count(recipe):,} learn" if lora else ""),
        "steps": f"{steps} of {batch}" + (f", {micro_batches} micro-batches each" if micro_batches > 1 else ""),
        "schedule": schedule_line(recipe.optim),
        "arithmetic": precision_line(recipe.train),
        "tokens": f"{estimate.tokens:,}",
        "time": f"about {format_duration(estimate.seconds)} on this {estimate.device}, by its matrix speed",
        "memory": f"about {estimate.memory_bytes / 2**30:.1f} GiB of {estimate.available_bytes / 2**30:.1f}",
        "disk": f"up to {estimate.disk_bytes / 2**20:,.0f} MiB of checkpoints",
    }
    return table_lines(values.items(), align="<", width=width)


def precision_line(train: Train) -> str:
    """Return the dtype of a step, and whether it is compiled or checkpoints activations."""
    parts: list[str] = [train.dtype]
    if train.compile is True:
        parts.append("compiled, for which the first step takes a minute or two")
    if train.recompute_mode:
        parts.append(f"{train.recompute_mode} activation checkpointing")
    return ", ".join(parts)


def schedule_line(optim: Optim) -> str:
    """Return the learning rate over a run, in words."""
    schedule = optim.schedule
    parts = [f"{optim.name}, learning rate {optim.learning_rate:g}"]
    if schedule.warmup_steps:
        parts.append(f"warm-up over {schedule.warmup_steps:,} steps")
    if schedule.decay:
        assert schedule.steps is not None and isinstance(schedule.warmup_steps, int), "settled"
        steps = schedule.decay_steps or schedule.steps - schedule.warmup_steps
        span = f"the last {steps:,} of {schedule.steps:,} steps"
        parts.append(f"{schedule.decay} decay over {span} to {schedule.final_learning_rate:g}")
    return ", ".join(parts)
