"""What a person sees while something long goes on: a live view on a terminal, plain lines elsewhere."""

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

from smolforge.cli.live_view import Board, packed
from smolforge.config import Optim, Recipe, Train
from smolforge.runs.estimate import Plan, learning
from smolforge.training.loop import State

PLAIN_SECONDS = 10
MEASURED = 3
"""Parts of a line that stay above the live view: it has the others."""
NAMES = 12
"""Columns of what a plan names."""


class Display:
    """An observer of runs that shows them on standard error: live on a terminal, unless `plain` lines are wanted."""

    def __init__(self, quiet: bool = False, plain: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.loud = Console(stderr=True, highlight=False, soft_wrap=True) if quiet else self.console
        self.plain = plain or quiet or not self.console.is_terminal or self.console.is_dumb_terminal
        self.live: Live | None = None
        self.reading: Progress | None = None
        bar = BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan")
        self.progress = Progress(
            TextColumn("step"), bar, MofNCompleteColumn(), TimeElapsedColumn(), console=self.console, expand=True
        )
        self.board = Board(self.progress)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.news = False
        self.steps, self.told = 0, 0.0
        self.handler = RichHandler(logging.WARNING, self.loud, show_time=False, show_path=False)

    def __enter__(self) -> "Display":
        logging.getLogger("smolforge").addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        logging.getLogger("smolforge").removeHandler(self.handler)

    def stop(self) -> None:
        """End whatever is drawn anew."""
        if self.reading is not None:
            self.reading.stop()
            self.reading = None
        if self.live is not None:
            self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def planned(self, recipe: Recipe, plan: Plan, start: State) -> None:
        self.stop()
        for line in plan_lines(recipe, plan, start):
            self.say(line if self.plain else textwrap.fill(line, self.console.width, subsequent_indent=" " * NAMES))
        self.steps = recipe.train.steps
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.progress.add_task("step", total=recipe.train.steps, completed=start.step)
        self.board = Board(self.progress)

    def preparing(self, counts: dict[str, int], source: str = "") -> None:
        """What is done of the text, or of one source of a mixture."""
        self.say(f"{source}: {corpus_line(counts)}" if source else corpus_line(counts))

    def referring(self, pairs: int, of: int) -> None:
        """What is read before the first step: a bar on a terminal, else a line when it is done."""
        if self.reading is None:
            self.reading = Progress(
                TextColumn("reference"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self.console, transient=True, disable=self.plain,
            )  # fmt: skip
            self.reading.add_task("pairs", total=of)
            self.reading.start()
        self.reading.update(self.reading.task_ids[0], completed=pairs)
        if pairs == of:
            self.stop()
            self.say(f"read {of:,} pairs with the model to start from")

    def sampled(self, text: str) -> None:
        self.board.sample, self.news = text, True

    def stepped(self, metrics: dict[str, Any]) -> None:
        """Show a step: always in the live view, else when there is news or after a while."""
        for listener in self.listeners:
            listener(metrics)
        if self.live is None and not self.plain:  # not before: until then trackers may ask who a person is
            self.live = Live(self.board, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        self.progress.update(self.progress.task_ids[0], completed=metrics["step"])
        measured = any(name.startswith(("validation_loss", "task_")) for name in metrics)
        if self.live is not None:
            self.board.stepped(metrics, figures(metrics))
            if measured:
                parts = [f"step {metrics['step']:,}", *metrics_parts(metrics)[:MEASURED]]
                self.say("\n  ".join(packed(parts, self.console.width - 2)))
        elif measured or time.perf_counter() - self.told > PLAIN_SECONDS or metrics["step"] == self.steps:
            self.told = time.perf_counter()
            self.say(f"step {metrics['step']:,}/{self.steps:,}  {metrics_line(metrics)}")
            if self.news and self.board.sample.strip():
                self.say(f"  sample: {' '.join(self.board.sample.split())[:200]}")
                self.news = False


def metrics_line(metrics: dict[str, Any]) -> str:
    return "  ".join(metrics_parts(metrics))


def metrics_parts(metrics: dict[str, Any]) -> list[str]:
    """One step in one line: the rate is the running median, or this step's where it is the first."""
    rate = metrics.get("tokens_per_second_median", metrics["tokens_per_second"])
    parts = [f"loss {metrics['loss']:.3f}", f"{rate:,.0f} tokens/s", *figures(metrics)]
    if "validation_loss" in metrics:
        parts.insert(1, held_out(metrics))
    scored = [name for name in metrics if name.startswith("task_") and name.endswith("_acc")]
    if scored:
        parts.insert(1, ", ".join(f"{name[5:-4]} acc {metrics[name]:.1%}" for name in scored))
    return parts


def held_out(metrics: dict[str, Any]) -> str:
    """What was measured on what is held out, of text or of pairs."""
    loss = f"held out {metrics['validation_loss']:.3f}"
    if "validation_bits_per_byte" in metrics:
        return f"{loss} = {metrics['validation_bits_per_byte']:.3f} bits/byte"
    margin, right = metrics["validation_reward_margin"], metrics["validation_reward_accuracy"]
    return f"{loss}, margin {margin:.3f}, {right:.0%} right"


def figures(metrics: dict[str, Any]) -> list[str]:
    """What there is to say of a step besides loss and rate."""
    parts = [f"margin {metrics['reward_margin']:.3f}"] if "reward_margin" in metrics else []
    parts += [f"MFU {metrics['mfu']:.0%}", f"lr {metrics['learning_rate']:.2e}", f"grad {metrics['grad_norm']:.2f}"]
    parts.append(f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB")
    if "seconds_left" in metrics:
        parts.append(f"{duration(metrics['seconds_left'])} left")
    return parts


def corpus_line(counts: dict[str, int]) -> str:
    documents = f"{counts['documents']:,} document{'s' * (counts['documents'] != 1)}"
    return f"tokenised {documents}, {counts['bytes'] / 1e6:.1f} MB, {counts['tokens']:,} tokens"


def plan_lines(recipe: Recipe, plan: Plan, start: State) -> list[str]:
    """What a run opens with."""
    shape = ", ".join(f"{name} {count:,}" for name, count in sorted(plan.parameters.items()))
    micro = math.ceil(recipe.train.rows / recipe.train.micro_rows)
    batch = f"{recipe.train.rows} x {recipe.train.sequence_length} tokens"
    steps = f"{start.step:,} to {recipe.train.steps:,}" if start.step else f"{recipe.train.steps:,}"
    updates = f"; low-rank updates of {learning(recipe):,} learn" if recipe.lora.rank is not None else ""
    said = {
        "parameters": f"{sum(plan.parameters.values()):,} ({shape}){updates}",
        "steps": f"{steps} of {batch}" + (f", {micro} micro-batches each" if micro > 1 else ""),
        "schedule": schedule_line(recipe.optim),
        "arithmetic": arithmetic_line(recipe.train),
        "tokens": f"{plan.tokens:,}",
        "time": f"about {duration(plan.seconds)} on this {plan.device}, by its matrix speed",
        "memory": f"about {plan.memory_bytes / 2**30:.1f} GiB of {plan.available_bytes / 2**30:.1f}",
        "disk": f"up to {plan.disk_bytes / 2**20:,.0f} MiB of checkpoints",
    }
    return [f"{name:<{NAMES}}{value}" for name, value in said.items()]


def arithmetic_line(train: Train) -> str:
    """What a step computes in, and how."""
    parts: list[str] = [train.dtype]
    if train.compile is True:
        parts.append("compiled, for which the first step takes a minute or two")
    if train.recomputed:
        parts.append(f"{train.recomputed} activation checkpointing")
    return ", ".join(parts)


def schedule_line(optim: Optim) -> str:
    """The learning rate over a run, in words."""
    schedule = optim.schedule
    parts = [f"{optim.name}, learning rate {optim.learning_rate:g}"]
    if schedule.warmup_steps:
        parts.append(f"warm-up over {schedule.warmup_steps:,} steps")
    if schedule.decay:
        assert schedule.steps is not None and isinstance(schedule.warmup_steps, int), "settled"
        steps = schedule.decay_steps or schedule.steps - schedule.warmup_steps
        over = f"the last {steps:,} of {schedule.steps:,} steps"
        parts.append(f"{schedule.decay} decay over {over} to {schedule.final_learning_rate:g}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129600 else f"{seconds / 86400:,.0f} days"
