"""The training loop: batches in, a trained model and its state out. Every stage of a model's life uses this one.

    train_step    1. set the learning rate of this step     3. clip, update (unless a number is not finite), clear
                  2. forward and backward, a micro-batch at a time: gradient accumulation
    finish_step   4. read the step's metrics, let the guard judge them, run the callbacks that are due

With several ranks, each takes these steps over its share of the sequences. Counts, losses and gradients are summed
over all ranks, so every rank reads the same metrics, updates the same weights and takes the same decisions.

A GPU runs asynchronously. There a step is finished after the next one is dispatched, and `train_step` waits for no
number. When a callback needs the model as it is after a step (validate, sample, save), that step is finished first.
Everything but the update itself is a hook, passed in by the caller.
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
from smolforge.device import is_async, peak_memory_bytes, synchronize, to_device, widest_float
from smolforge.training.distributed import SINGLE_PROCESS, RankGroup, no_sync
from smolforge.training.optim import lr_at_step, set_found_inf, set_lr_scale
from smolforge.training.step_timer import Phase, StepTimer


@dataclass(frozen=True)
class TrainState:
    """Where a run is: all there is to know besides weights, optimizer and random states."""

    step: int = 0
    """Optimizer steps completed."""
    tokens: int = 0
    """Labels learned from."""


CallbackFn = Callable[[TrainState, dict[str, Any]], dict[str, Any] | None]


class Callback(NamedTuple):
    """Called every `every` steps and at the end. What it returns joins the step's metrics."""

    every: int | None
    fn: CallbackFn
    metrics_only: bool = False
    """Needs the metrics alone, so the next step may be running already."""
    force: Callable[[], bool] = lambda: False
    """Asked at every step whether to call it out of turn. All ranks must answer the same."""


@runtime_checkable
class StepGuard(Protocol):
    """Decides which updates are skipped."""

    @property
    def enabled(self) -> bool:
        """Whether to skip an update whose loss or gradient is not finite."""
        ...

    def was_skipped(self, step: int) -> bool:
        """Whether the update of this step was skipped before, in a run that now repeats it."""
        ...

    def __call__(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return why the update of a step was skipped, or None. May raise to end the training."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What the caller adds to the loop. The defaults add nothing."""

    callbacks: Sequence[Callback] = ()
    should_stop: Callable[[], bool] = lambda: False
    """Asked before each step. All ranks must answer the same."""
    on_gradients: Callable[[int], None] = lambda step: None
    """Called with the number of a step when its gradients are complete and not yet clipped."""
    step_guard: StepGuard | None = None


NO_HOOKS = Hooks()


class PendingStep(NamedTuple):
    """A step whose update is queued on the device. Its metrics may not be there yet."""

    step: int
    labels: int
    """In its batch, over all ranks."""
    learning_rate: float
    metrics: Mapping[str, Tensor]


def train(
    objective: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterator[Batch],
    *,
    recipe: Recipe,
    state: TrainState,
    timer: StepTimer,
    hooks: Hooks = NO_HOOKS,
    ranks: RankGroup = SINGLE_PROCESS,
) -> TrainState:
    """Train from `state` to `train.steps`, or to the end of the step after which `hooks.should_stop` is true.

    With several ranks, `objective` must be wrapped for them (`RankGroup.wrap_ddp`).
    """
    last, first_step, completed = recipe.train.steps, state.step, state.step
    asynchronous = is_async(device_of(objective))
    pending: tuple[PendingStep, list[Callback]] | None = None
    objective.train()
    with gc_disabled():
        while completed < last and not hooks.should_stop():
            dispatched = train_step(
                objective,
                optimizers,
                batches,
                recipe=recipe,
                completed=completed,
                timer=timer,
                hooks=hooks,
                ranks=ranks,
            )
            completed += 1
            if pending is not None:
                state = finish_step(*pending, state, timer=timer, step_guard=hooks.step_guard)
            due = [callback for callback in hooks.callbacks if is_due(callback, completed, completed == last)]
            pending = (dispatched, due)
            needs_model = not all(callback.metrics_only for callback in due)
            if needs_model or not asynchronous:
                state, pending = finish_step(*pending, state, timer=timer, step_guard=hooks.step_guard), None
            if needs_model or completed == first_step + 1:  # a compiler leaves much garbage
                gc.collect()
    return state if pending is None else finish_step(*pending, state, timer=timer, step_guard=hooks.step_guard)


def is_due(callback: Callback, step: int, finished: bool) -> bool:
    """Whether to call a callback after this step."""
    in_turn = callback.every is not None and step % callback.every == 0
    return in_turn or finished or callback.force()


def device_of(objective: nn.Module) -> torch.device:
    """Return the device of a module's first parameter."""
    return next(objective.parameters()).device


def train_step(
    objective: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterator[Batch],
    *,
    recipe: Recipe,
    completed: int,
    timer: StepTimer,
    hooks: Hooks,
    ranks: RankGroup,
) -> PendingStep:
    """Dispatch the step that follows `completed` ones, without waiting for the device."""
    rows, device = recipe.train.sequences_per_micro_batch, device_of(objective)
    learning_rate = lr_at_step(completed, recipe.optim.learning_rate, recipe.optim.schedule)
    set_lr_scale(optimizers, learning_rate / recipe.optim.learning_rate)
    with timer.step():
        with timer.phase("data"):
            batch = next(batches)
            counts = ranks.all_gather(batch.num_labels, batch.num_targets)  # while the batch is on the CPU
            labels, targets = (sum(of_ranks) for of_ranks in zip(*counts, strict=True))
            batch = batch.map(lambda side: to_device(side, device))
        losses = ranks.all_reduce(forward_backward(objective, batch, targets, rows=rows, time_phase=timer.phase))
        hooks.on_gradients(completed + 1)
        with timer.phase("optimizer"):
            norm = nn.utils.clip_grad_norm_(objective.parameters(), recipe.optim.max_grad_norm or float("inf"))
            set_found_inf(optimizers, skip_update_flag(hooks.step_guard, completed + 1, losses["loss"], norm=norm))
            for optimizer in optimizers:
                optimizer.step()
            objective.zero_grad(set_to_none=True)
            if not is_async(device):
                synchronize(device)
    return PendingStep(completed + 1, labels, learning_rate, {**losses, "grad_norm": norm})


def skip_update_flag(step_guard: StepGuard | None, step: int, loss: Tensor, *, norm: Tensor) -> Tensor | None:
    """Return 1.0 to skip the update and 0.0 to take it, computed on the device; None where no guard decides."""
    if step_guard is not None and step_guard.was_skipped(step):
        return torch.ones_like(loss, dtype=torch.float32)
    if step_guard is None or not step_guard.enabled:
        return None
    return (~(loss.isfinite() & norm.isfinite())).float()


def finish_step(
    pending: PendingStep,
    callbacks: Sequence[Callback],
    state: TrainState,
    *,
    timer: StepTimer,
    step_guard: StepGuard | None,
) -> TrainState:
    """Wait for a step's metrics, let the guard judge them, and run the callbacks that are due after it."""
    widest = widest_float(pending.metrics["loss"].device)
    values = torch.stack([value.to(widest) for value in pending.metrics.values()]).tolist()
    values_by_name = dict(zip(pending.metrics, values, strict=True))
    skip_reason = None
    if step_guard is not None:
        skip_reason = step_guard(pending.step, values_by_name["loss"], values_by_name["grad_norm"])
    state = TrainState(pending.step, state.tokens + (pending.labels if skip_reason is None else 0))
    metrics: dict[str, Any] = {
        "step": state.step,
        "tokens": state.tokens,
        **values_by_name,
        "learning_rate": pending.learning_rate,
        **timer.read(),
        "peak_memory_bytes": peak_memory_bytes(pending.metrics["loss"].device),
    }
    if skip_reason is not None:
        metrics["left_out"] = skip_reason
    for callback in callbacks:
        metrics |= callback.fn(state, metrics) or {}
    return state


def forward_backward(
    objective: nn.Module,
    batch: Batch,
    num_targets: int,
    *,
    rows: int,
    time_phase: Callable[[Phase], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """Accumulate the gradient of a batch's mean loss, `rows` sequences at a time; return mean losses by name.

    The mean is over `num_targets`, the labels or pairs of the whole batch on all ranks. Each micro-batch is weighted
    by its own number of them, so for a dense model the split changes nothing but memory. The balance loss of experts,
    reported beside the loss, is of each micro-batch by itself. On one of several ranks the means are this rank's part
    of the sum; gradients are summed by DistributedDataParallel.
    """
    means: dict[str, Tensor] = {}
    micro_batches = list(batch.split(rows))
    for number, micro_batch in enumerate(micro_batches, start=1):
        with nullcontext() if number == len(micro_batches) else no_sync(objective):
            with time_phase("forward"):
                losses = {name: value / num_targets for name, value in objective(*micro_batch).items()}
            with time_phase("backward"):
                losses.pop("objective").backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.detach()
    return means


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Collect cyclic garbage where a run pauses anyway, not in the middle of a step.

    What a caller froze before stays frozen: `gc.unfreeze` would release that too.
    """
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 10_000  # Python 3.12 starts with hundreds
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
