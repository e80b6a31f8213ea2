"""The loop: batches in, a trained model and its state out. Every stage of a model's life uses this one.

    1. the learning rate of this step           4. clip, judge, update, clear
    2. forward and backward, in micro-batches   5. actions whose turn it is: measure, sample, report, save
    3. their sum is the gradient of the mean loss over the whole batch

Whatever is not the update itself is an action handed in by whoever composes a run.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from smolforge.config import Recipe
from smolforge.data.batches import Batch
from smolforge.device import peak_memory_bytes, pick_dtype, synchronize
from smolforge.loss import IGNORED, loss_sum
from smolforge.model import LanguageModel
from smolforge.optim import learning_rate, scale_learning_rates


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
    when_stopped: bool = False
    """Also done when a signal ends the run early."""


def train(
    model: LanguageModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[Batch],
    recipe: Recipe,
    state: State,
    actions: Sequence[Action],
    stopping: Callable[[], bool],
    judge: Callable[[int, float, float], str | None] = lambda step, loss, grad_norm: None,
) -> State:
    """Go on from `state` to `train.steps`, or to the end of the step in which `stopping` turns true.

    `judge` says of a step, its loss and the norm of its gradient why there must be no update, if so.
    """
    settings, device = recipe.train, model.head.device
    precision = autocast(settings.dtype, device)
    model.train()
    while state.step < settings.steps and not stopping():
        batch = Batch(*(side.to(device, non_blocking=True) for side in next(batches)))
        started = time.perf_counter()
        rate = learning_rate(state.step, recipe.optim.learning_rate, recipe.optim.schedule)
        scale_learning_rates(optimizers, rate / recipe.optim.learning_rate)
        rows = settings.micro_batch_size or settings.rows
        losses, counted = backward(model, batch, rows, precision, settings.z_loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm or float("inf"))
        said = {name: value.item() for name, value in losses.items()}
        left_out = judge(state.step + 1, said["loss"], norm.item())
        for optimizer in optimizers if left_out is None else ():
            optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize(device)
        state = State(state.step + 1, state.tokens + (counted if left_out is None else 0))
        metrics: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            **said,
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "tokens_per_second": batch.ids.numel() / (time.perf_counter() - started),
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        if left_out is not None:
            metrics["left_out"] = left_out
        finished, stopped = state.step == settings.steps, stopping()
        for action in actions:
            due = action.every is not None and state.step % action.every == 0
            if due or finished or (stopped and action.when_stopped):
                metrics |= action.act(state, metrics) or {}
    return state


def backward(
    model: LanguageModel, batch: Batch, rows: int, precision: AbstractContextManager, z_loss: float = 0.0
) -> tuple[dict[str, torch.Tensor], int]:
    """Add the gradient of the mean loss over all labels of the batch, `rows` rows at a time.

    Each micro-batch is weighted by its own number of labels, so for a dense model the split changes nothing but
    memory. The loss reported is the cross-entropy; beside it stand the z-loss, where it has a weight, and the
    balance loss of experts, which is of each micro-batch by itself.
    """
    counted = int((batch.labels != IGNORED).sum())
    totals: dict[str, torch.Tensor] = {}
    for part in batch.split(rows):
        with precision:
            hidden, balance = model.hidden_and_balance(part.ids)
            total, z = loss_sum(hidden, model.head, part.labels, z_loss)
            losses = {"loss": (total.detach() - z) / counted}
            if z_loss:
                losses["z_loss"] = z / counted
            if isinstance(balance, torch.Tensor):
                losses["balance_loss"] = balance * ((part.labels != IGNORED).sum() / counted)
        whole = total / counted + model.config.router_aux_loss_coef * losses.get("balance_loss", 0.0)
        whole.backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.detach()
    return totals, counted


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Arithmetic in the dtype of a recipe over weights that stay as they are."""
    picked = pick_dtype(dtype, device)
    return torch.autocast(device.type, picked) if picked == torch.bfloat16 else nullcontext()
