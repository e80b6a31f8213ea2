"""Show the progress of a run: a live view on a terminal, plain lines elsewhere."""

import logging
import math
import textwrap
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smolforge.cli.live_view import LiveView, pack_into_lines
from smolforge.config import Optim, Recipe, Train
from smolforge.runs.estimate import RunEstimate, trainable_parameter_count
from smolforge.training.loop import TrainState

PLAIN_INTERVAL_SECONDS = 10
MAX_PARTS_ABOVE_LIVE = 3
"""Parts of a line that stay above the live view: it has the others."""
NAME_WIDTH = 12
"""Columns of what a plan names."""


class Display:
    """Show the progress of runs on standard error: a live view on a terminal, plain lines elsewhere or with `plain`."""

    def __init__(self, quiet: bool = False, plain: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.warning_console = Console(stderr=True, highlight=False, soft_wrap=True) if quiet else self.console
        self.plain = plain or quiet or not self.console.is_terminal or self.console.is_dumb_terminal
        self.live: Live | None = None
        self.reference_progress: Progress | None = None
        bar = BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan")
        self.progress = Progress(
            TextColumn("step"), bar, MofNCompleteColumn(), TimeElapsedColumn(), console=self.console, expand=True
        )
        self.live_view = LiveView(self.progress)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.has_new_sample = False
        self.steps, self.last_print_time = 0, 0.0
        self.handler = RichHandler(logging.WARNING, self.warning_console, show_time=False, show_path=False)

    def __enter__(self) -> "Display":
        logging.getLogger("smolforge").addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        logging.getLogger("smolforge").removeHandler(self.handler)

    def stop(self) -> None:
        """Stop all live drawing."""
        if self.reference_progress is not None:
            self.reference_progress.stop()
            self.reference_progress = None
        if self.live is not None:
            self.live.stop()
            self.live = None

    def print_line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def on_plan(self, recipe: Recipe, estimate: RunEstimate, start: TrainState) -> None:
        self.stop()
        for line in plan_lines(recipe, estimate, start):
            self.print_line(
                line if self.plain else textwrap.fill(line, self.console.width, subsequent_indent=" " * NAME_WIDTH)
            )
        self.steps = recipe.train.steps
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.progress.add_task("step", total=recipe.train.steps, completed=start.step)
        self.live_view = LiveView(self.progress)

    def on_prepare(self, counts: dict[str, int], source: str = "") -> None:
        """Print how much of the text, or of one source of a mixture, is tokenized."""
        self.print_line(f"{source}: {corpus_line(counts)}" if source else corpus_line(counts))

    def on_reference(self, pairs: int, total: int) -> None:
        """Show the reference model's pass before the first step: a bar on a terminal, else a line at the end."""
        if self.reference_progress is None:
            self.reference_progress = Progress(
                TextColumn("reference"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self.console, transient=True, disable=self.plain,
            )  # fmt: skip
            self.reference_progress.add_task("pairs", total=total)
            self.reference_progress.start()
        self.reference_progress.update(self.reference_progress.task_ids[0], completed=pairs)
        if pairs == total:
            self.stop()
            self.print_line(f"read {total:,} pairs with the model to start from")

    def on_sample(self, text: str) -> None:
        self.live_view.sample, self.has_new_sample = text, True

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Show a step: always in the live view, else after an evaluation or after a while."""
        for listener in self.listeners:
            listener(metrics)
        if self.live is None and not self.plain:  # not before: until then trackers may ask for a login
            self.live = Live(self.live_view, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        self.progress.update(self.progress.task_ids[0], completed=metrics["step"])
        evaluated = any(name.startswith(("validation_loss", "task_")) for name in metrics)
        if self.live is not None:
            self.live_view.on_step(metrics, secondary_parts(metrics))
            if evaluated:
                parts = [f"step {metrics['step']:,}", *metrics_parts(metrics)[:MAX_PARTS_ABOVE_LIVE]]
                self.print_line("\n  ".join(pack_into_lines(parts, self.console.width - 2)))
        elif (
            evaluated
            or time.perf_counter() - self.last_print_time > PLAIN_INTERVAL_SECONDS
            or metrics["step"] == self.steps
        ):
            self.last_print_time = time.perf_counter()
            self.print_line(f"step {metrics['step']:,}/{self.steps:,}  {metrics_line(metrics)}")
            if self.has_new_sample and self.live_view.sample.strip():
                self.print_line(f"  sample: {' '.join(self.live_view.sample.split())[:200]}")
                self.has_new_sample = False


def metrics_line(metrics: dict[str, Any]) -> str:
    return "  ".join(metrics_parts(metrics))


def metrics_parts(metrics: dict[str, Any]) -> list[str]:
    """Return the parts of one step's line; the rate is the running median, or this step's where it is the first."""
    rate = metrics.get("tokens_per_second_median", metrics["tokens_per_second"])
    parts = [f"loss {metrics['loss']:.3f}", f"{rate:,.0f} tokens/s", *secondary_parts(metrics)]
    if "validation_loss" in metrics:
        parts.insert(1, validation_part(metrics))
    task_names = [name for name in metrics if name.startswith("task_") and name.endswith("_acc")]
    if task_names:
        parts.insert(1, ", ".join(f"{name[5:-4]} acc {metrics[name]:.1%}" for name in task_names))
    return parts


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
    if "seconds_left" in metrics:
        parts.append(f"{duration(metrics['seconds_left'])} left")
    return parts


def corpus_line(counts: dict[str, int]) -> str:
    documents = f"{counts['documents']:,} document{'s' * (counts['documents'] != 1)}"
    return f"tokenised {documents}, {counts['bytes'] / 1e6:.1f} MB, {counts['tokens']:,} tokens"


def plan_lines(recipe: Recipe, estimate: RunEstimate, start: TrainState) -> list[str]:
    """Return the lines a run starts with."""
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(estimate.parameters.items()))
    micro_batches = math.ceil(recipe.train.sequences_per_step / recipe.train.sequences_per_micro_batch)
    batch = f"{recipe.train.sequences_per_step} x {recipe.train.sequence_length} tokens"
    steps = f"{start.step:,} to {recipe.train.steps:,}" if start.step else f"{recipe.train.steps:,}"
    lora_part = (
        f"; low-rank updates of {trainable_parameter_count(recipe):,} learn" if recipe.lora.rank is not None else ""
    )
    values = {
        "parameters": f"{sum(estimate.parameters.values()):,} ({counts}){lora_part}",
        "steps": f"{steps} of {batch}" + (f", {micro_batches} micro-batches each" if micro_batches > 1 else ""),
        "schedule": schedule_line(recipe.optim),
        "arithmetic": precision_line(recipe.train),
        "tokens": f"{estimate.tokens:,}",
        "time": f"about {duration(estimate.seconds)} on this {estimate.device}, by its matrix speed",
        "memory": f"about {estimate.memory_bytes / 2**30:.1f} GiB of {estimate.available_bytes / 2**30:.1f}",
        "disk": f"up to {estimate.disk_bytes / 2**20:,.0f} MiB of checkpoints",
    }
    return [f"{name:<{NAME_WIDTH}}{value}" for name, value in values.items()]


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


def duration(seconds: float) -> str:
    """Format seconds for the user."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129600 else f"{seconds / 86400:,.0f} days"
