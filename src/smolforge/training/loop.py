"""The loop: batches in, a trained model and its state out. Every stage of a model's life uses this one.

    launch  1. the learning rate of this step       3. clip, update unless a number is none, clear
            2. forward and backward, in micro-batches; their sum is the gradient of the mean loss of the whole batch
    hear    4. the numbers of a step: judge them, and call the actions whose turn it is

Several ranks each take these steps over their share of the rows: counts, losses and gradients are summed over all, so
that every rank hears the same numbers, updates the same weights and decides the same.

An accelerator works while the processor is ahead, so there a step is heard only when the next was launched, and
nothing in a launch waits for a number. Where an action needs the model as it is after a step (measure, sample, save),
that step is heard before the next is launched. Whatever is not the update itself is an action handed in by whoever
composes a run.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smolforge.config import Recipe
from smolforge.data.batches import Batch
from smolforge.device import moved, peak_memory_bytes, runs_ahead, synchronize
from smolforge.training.distributed import ALONE, Ranks, accumulating
from smolforge.training.optim import learning_rate, leave_out, scale_learning_rates
from smolforge.training.step_timer import Meter, Part


@dataclass(frozen=True)
class State:
    """Where a run is: all there is to know besides weights, optimizer and random states."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Labels learned from."""


class Action(NamedTuple):
    """Something done every so many steps and at the end. What it returns joins the step's metrics."""

    every: int | None
    act: Callable[[State, dict[str, Any]], dict[str, Any] | None]
    late: bool = False
    """Looks at the metrics alone, so that the next step may be under way."""
    wanted: Callable[[], bool] = lambda: False
    """Asked at every step whether it should be done out of turn; all ranks must say the same."""


@runtime_checkable
class Judge(Protocol):
    """Decides which updates are left out."""

    @property
    def guards(self) -> bool:
        """Whether an update is left out when its loss or gradient is not finite."""
        ...

    def knows(self, step: int) -> bool:
        """Whether the update of this step was left out before."""
        ...

    def __call__(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the update of a step was left out, if it was. May raise to end the training."""
        ...


class Launched(NamedTuple):
    """A step whose update is queued; its numbers may not be there yet."""

    step: int
    labels: int
    """In its batch."""
    learning_rate: float
    numbers: Mapping[str, Tensor]


def train(
    objective: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterator[Batch],
    recipe: Recipe,
    state: State,
    actions: Sequence[Action],
    stopping: Callable[[], bool],
    meter: Meter,
    judge: Judge | None = None,
    ranks: Ranks = ALONE,
    looking: Callable[[int], None] = lambda step: None,
) -> State:
    """Go on from `state` to `train.steps`, or to the end of the step in which `stopping` turns true.

    Where there are several ranks, `objective` is parallel over them, and `stopping` must say the same on all.
    `looking` is called when the gradients of a step are whole, and not yet clipped.
    """
    last, begun, done = recipe.train.steps, state.step, state.step
    ahead = runs_ahead(device_of(objective))
    unheard: tuple[Launched, list[Action]] | None = None
    objective.train()
    with garbage_kept():
        while done < last and not stopping():
            launched = launch(objective, optimizers, batches, recipe, done, meter, judge, ranks, looking)
            done += 1
            if unheard is not None:
                state = hear(*unheard, state, meter, judge)
            due = [action for action in actions if is_due(action, done, done == last)]
            unheard = (launched, due)
            on_model = not all(action.late for action in due)
            if on_model or not ahead:
                state, unheard = hear(*unheard, state, meter, judge), None
            if on_model or done == begun + 1:  # a compiler leaves much
                gc.collect()
    return state if unheard is None else hear(*unheard, state, meter, judge)


def is_due(action: Action, step: int, finished: bool) -> bool:
    in_turn = action.every is not None and step % action.every == 0
    return in_turn or finished or action.wanted()


def device_of(objective: nn.Module) -> torch.device:
    return next(objective.parameters()).device


def launch(
    objective: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterator[Batch],
    recipe: Recipe,
    done: int,
    meter: Meter,
    judge: Judge | None,
    ranks: Ranks,
    looking: Callable[[int], None],
) -> Launched:
    """Queue the step that follows `done` ones, and wait for no device."""
    rows, device = recipe.train.micro_rows, device_of(objective)
    rate = learning_rate(done, recipe.optim.learning_rate, recipe.optim.schedule)
    scale_learning_rates(optimizers, rate / recipe.optim.learning_rate)
    with meter.step():
        with meter.part("data"):
            batch = next(batches)
            counts = ranks.gather(batch.learned, batch.counted)  # asked while it is on the processor
            labels, count = (sum(of_each) for of_each in zip(*counts, strict=True))
            batch = batch.each(lambda side: moved(side, device))
        losses = ranks.sum(backward(objective, batch, count, rows, meter.part))
        looking(done + 1)
        with meter.part("optimizer"):
            norm = nn.utils.clip_grad_norm_(objective.parameters(), recipe.optim.max_grad_norm or float("inf"))
            leave_out(optimizers, unwanted(losses["loss"], norm, done + 1, judge))
            for optimizer in optimizers:
                optimizer.step()
            objective.zero_grad(set_to_none=True)
            if not runs_ahead(device):
                synchronize(device)
    return Launched(done + 1, labels, rate, {**losses, "grad_norm": norm})


def unwanted(loss: Tensor, norm: Tensor, step: int, judge: Judge | None) -> Tensor | None:
    """1.0 where an update must be left out, 0.0 where not, decided on the device; None where all are wanted."""
    if judge is not None and judge.knows(step):
        return torch.ones_like(loss, dtype=torch.float32)
    if judge is None or not judge.guards:
        return None
    return (~(loss.isfinite() & norm.isfinite())).float()


def hear(launched: Launched, due: Sequence[Action], state: State, meter: Meter, judge: Judge | None) -> State:
    """Wait for a step's numbers, judge them, and do what is due after it."""
    values = torch.stack([each.double() for each in launched.numbers.values()]).tolist()
    said = dict(zip(launched.numbers, values, strict=True))
    left_out = judge(launched.step, said["loss"], said["grad_norm"]) if judge else None
    state = State(launched.step, state.tokens + (launched.labels if left_out is None else 0))
    metrics: dict[str, Any] = {
        "step": state.step,
        "tokens": state.tokens,
        **said,
        "learning_rate": launched.learning_rate,
        **meter.read(),
        "peak_memory_bytes": peak_memory_bytes(launched.numbers["loss"].device),
    }
    if left_out is not None:
        metrics["left_out"] = left_out
    for action in due:
        metrics |= action.act(state, metrics) or {}
    return state


def backward(
    objective: nn.Module,
    batch: Batch,
    count: int,
    rows: int,
    timed: Callable[[Part], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """Add the gradient of the mean over all that the batch counts, `rows` rows at a time; returns means by name.

    Each micro-batch is weighted by its own number of labels or pairs, so for a dense model the split changes nothing
    but memory. Experts have a balance loss, reported beside the loss, which is of each micro-batch by itself. Of a
    rank's share of the batch the means are its part, to be summed; gradients are, where the objective is parallel.
    """
    means: dict[str, Tensor] = {}
    parts = list(batch.split(rows))
    for number, part in enumerate(parts, start=1):
        with nullcontext() if number == len(parts) else accumulating(objective):
            with timed("forward"):
                found = {name: value / count for name, value in objective(*part).items()}
            with timed("backward"):
                found.pop("objective").backward()
        for name, value in found.items():
            means[name] = means.get(name, 0.0) + value.detach()
    return means


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Cycles are collected where a run pauses anyway, not in the middle of a step.

    What a caller froze before stays frozen: that would save as much, and `gc.unfreeze` knows no parts.
    """
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 10_000  # Python 3.12 begins with hundreds
    gc.collect()
    if not was_frozen:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
