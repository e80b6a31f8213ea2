"""What a run will cost before it starts: parameters, tokens, time, memory, disk; and recipes fitted to a budget."""

import itertools
import math
import re
import statistics
import time
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from smolforge.checkpoint.training_state import MIN_VALID_KEPT
from smolforge.config import ModelConfig, Recipe
from smolforge.config.base import replace_settings
from smolforge.data.batches import Batch
from smolforge.device import matmul_flops_per_second, memory_bytes, pick_device, pick_dtype
from smolforge.device.peak_flops import device_peak
from smolforge.errors import ConfigError
from smolforge.formatting import format_bytes, format_duration
from smolforge.models import lora
from smolforge.models.activation_checkpointing import Checkpointing
from smolforge.models.decoder import build
from smolforge.models.stats import flops_per_token, parameter_counts, parameter_table
from smolforge.training.loop import Callback, Hooks, TrainState, train
from smolforge.training.loss import chunk_tokens
from smolforge.training.objective import Objective
from smolforge.training.optim import build_optimizers
from smolforge.training.step_timer import StepCost, StepTimer, clock

EFFICIENCY = 0.45
"""Share of the measured matrix speed that a training step reaches, all its other work included."""
PROCESS_BYTES = 450 << 20
"""A process with torch imported and nothing in it."""
COMPILER_BYTES = 200 << 20
COMPILED_SHARE = 0.75
FRAGMENTATION = 1.25
MIN_STEPS = 200
PROBE_SECONDS, PROBE_FLOPS = 4, 1e12
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

BUDGET_SETTINGS = (
    "train.steps",
    "train.batch_tokens",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.sample_every",
    "optim.schedule.warmup_steps",
    "optim.schedule.decay_steps",
    "optim.schedule.steps",
    "data.stages",
)
"""What a budget derives, and what the recipe's own values of no longer count for."""


@dataclass(frozen=True)
class RunEstimate:
    """The expected cost of a run."""

    parameters: dict[str, int]
    tokens: int
    flops_per_token: int
    seconds: float
    memory_bytes: int
    available_bytes: int
    disk_bytes: int
    device: str

    def warnings(self) -> list[str]:
        """Return what the user should know before waiting for the run."""
        warnings = []
        if self.memory_bytes > self.available_bytes:
            warnings.append(
                f"this needs about {format_bytes(self.memory_bytes)} of memory and {self.device} has "
                f"{format_bytes(self.available_bytes)}; a smaller --train.micro-batch-size needs less"
            )
        if self.seconds > 86400:
            warnings.append(
                f"this will take about {format_duration(self.seconds)} here; "
                "--train.steps stops earlier, --budget 10m makes a run of ten minutes"
            )
        return warnings


def estimate_run(recipe: Recipe, done_steps: int = 0) -> RunEstimate:
    """Estimate a recipe's cost on this machine; time from a quick matrix product, so within a factor of two."""
    device = pick_device(recipe.train.device)
    dtype = pick_dtype(recipe.train.dtype, device)
    flops = flops_per_token(recipe.model, recipe.train.sequence_length)
    tokens = (recipe.train.steps - done_steps) * recipe.train.batch_tokens
    copied = checkpoint_bytes(recipe) if recipe.train.checkpoint_in_background else 0
    return RunEstimate(
        parameters=parameter_counts(recipe.model),
        tokens=tokens,
        flops_per_token=flops,
        seconds=tokens * flops / (matmul_flops_per_second(device, dtype) * EFFICIENCY),
        memory_bytes=training_bytes(recipe) + (copied if device.type != "cuda" else 0),
        available_bytes=memory_bytes(device),
        disk_bytes=disk_bytes(recipe),
        device=device.type,
    )


def estimate_of_ranks(recipe: Recipe, done_steps: int, ranks: int) -> RunEstimate:
    """Estimate the cost where `ranks` devices like this one share each batch; memory is of one device."""
    if ranks == 1:
        return estimate_run(recipe, done_steps)
    share = math.ceil(recipe.train.sequences_per_step / ranks)
    of_one_rank = replace_settings(
        recipe, {"train.micro_batch_size": min(recipe.train.sequences_per_micro_batch, share)}
    )
    estimate = estimate_run(of_one_rank, done_steps)
    return replace(estimate, seconds=estimate.seconds / ranks, device=f"{ranks} x {estimate.device}")


def training_bytes(recipe: Recipe) -> int:
    """Return the peak memory of a training step: weights, gradients, two moments, the EMA, saved activations.

    With activation checkpointing, one layer at a time has all of its activations. On a CPU malloc fragments the memory,
    gradients too where whole layers are recomputed; a compiler packs saved activations better and needs memory itself.
    The three constants are measured: docs/performance.md.
    """
    model, train, device = recipe.model, recipe.train, pick_device(recipe.train.device)
    width = 8 if train.dtype == "float64" else 4
    low_width = 2 if pick_dtype(train.dtype, device) == torch.bfloat16 else width
    tokens = train.sequences_per_micro_batch * train.sequence_length
    compiled, recomputed = train.compile is True, train.recompute_mode
    saved = model.num_hidden_layers * activation_bytes(model, recomputed, width, low_width=low_width)
    saved = int(saved * COMPILED_SHARE) if compiled and recomputed is None else saved
    saved += activation_bytes(model, None, width, low_width=low_width) if recomputed else 0
    weights = sum(parameter_counts(model).values()) * width
    copies = 3 + (recipe.optim.ema_decay is not None)
    fixed = (
        weights
        + copies * width * trainable_parameter_count(recipe)
        + head_bytes(recipe, tokens, width, accumulates=train.sequences_per_micro_batch < train.sequences_per_step)
    )
    fixed += weights * low_width // width if low_width < width else 0  # what autocast casts
    if device.type == "cuda":
        return fixed + tokens * saved
    holes = weights if recomputed == "full" else 0
    return (
        fixed
        + holes
        + int(tokens * saved * (1 if compiled else FRAGMENTATION))
        + PROCESS_BYTES
        + compiled * COMPILER_BYTES
    )


def activation_bytes(model: ModelConfig, recomputed: Checkpointing, width: int, *, low_width: int) -> int:
    """Return the bytes a layer saves per token for its backward: `width` per number in norms, `low_width` in products.

    All: inputs and outputs of two norms, queries before and after attention and merged, keys and values, four arrays of
    the feed-forward's width; experts have theirs, with input and output, once for each expert a token goes to. Of these
    `selective` saves the results of products and attention, and the layer's input; `full` the input alone.
    """
    hidden, wide = model.hidden_size, model.intermediate_size
    queries, keys = (
        heads * model.resolved_head_dim for heads in (model.num_attention_heads, model.num_key_value_heads)
    )
    experts = model.num_experts_per_tok if model.has_experts else 0
    match recomputed:
        case "full":
            return hidden * width
        case "selective":
            numbers = hidden + 2 * queries + 2 * keys + (experts or 1) * 2 * wide + experts * hidden
            return hidden * width + numbers * low_width
        case _:
            numbers = 2 * hidden + 3 * queries + 2 * keys + (experts or 1) * 4 * wide + 3 * experts * hidden
            return 2 * hidden * width + numbers * low_width


def head_bytes(recipe: Recipe, tokens: int, width: int, *, accumulates: bool) -> int:
    """Return the peak memory of the loss of `tokens` labels, without weights and their gradients.

    The forward holds a chunk's logits and the head's gradient, the backward that gradient twice. One of them becomes
    the weight's own, unless it `accumulates` over micro-batches. The states' gradient exists twice. In bfloat16 a
    chunk's logits exist in both precisions, and so does the head.
    """
    device, vocabulary = pick_device(recipe.train.device), recipe.model.vocab_size
    matrix = vocabulary * recipe.model.hidden_size * width
    logits = min(tokens, chunk_tokens(device)) * vocabulary * width
    if pick_dtype(recipe.train.dtype, device) == torch.bfloat16:
        logits += (logits + matrix) // 2
    return max(logits, matrix) + accumulates * matrix + 2 * tokens * recipe.model.hidden_size * width


def disk_bytes(recipe: Recipe) -> int:
    """Return the bytes of the checkpoints that exist at the same time, the one being written included."""
    train = recipe.train
    written = -(-train.steps // (train.checkpoint_every or train.steps)) + 1
    in_use = train.mirror is not None  # by the copy, however long that takes
    num_kept = max(train.keep_last, MIN_VALID_KEPT) + train.keep_best + in_use + 1
    return min(num_kept, written) * checkpoint_bytes(recipe)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the bytes of one checkpoint: weights, two moments, the EMA, and a little for the rest."""
    width = 8 if recipe.train.dtype == "float64" else 4
    copies = 2 + (recipe.optim.ema_decay is not None) + (recipe.lora.rank is not None)
    return width * (sum(parameter_counts(recipe.model).values()) + copies * trainable_parameter_count(recipe)) + (
        4 << 20
    )


def trainable_parameter_count(recipe: Recipe) -> int:
    """Return the number of parameters that training changes."""
    if recipe.lora.rank is None:
        return sum(parameter_counts(recipe.model).values())
    return sum(
        row.times * lora.lora_parameter_count(row.name, row.shape, recipe.lora) for row in parameter_table(recipe.model)
    )


def parse_budget(budget: str) -> tuple[float | None, int | None]:
    """Parse `5m` or `1h` into (seconds, None), `10M-tokens` into (None, tokens). Raises ConfigError for others."""
    if match := re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([smhd])", budget):
        return float(match[1]) * _UNITS[match[2]], None
    if budget.endswith("-tokens"):
        return None, parse_count(budget.removesuffix("-tokens"))
    raise ConfigError(f"budget is {budget!r}; it should be a time like 5m or 1h, or a count like 10M-tokens")


def parse_count(count: str, name: str = "budget") -> int:
    """Parse 50000, 10M or 2B into a number. Raises ConfigError for anything else, with the setting's name."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMB]?)", count)
    if not match:
        raise ConfigError(f"{name} is {count!r}; it should be a count like 50000, 10M or 2B")
    number = int(float(match[1]) * _COUNTS[match[2]])
    if number < 1:
        raise ConfigError(f"{name} is {count!r}; it should be a count above 0, like 50000, 10M or 2B")
    return number


def within_budget(
    recipe: Recipe, explicit: Set[str] = frozenset(), ranks: int = 1, *, most_rows: int | None = None
) -> Recipe:
    """Return the recipe with steps, batch, warm-up and decay that fit its budget on `ranks` machines like this one.

    Epochs may end it earlier: after `most_rows` sequences. The batch, unless it is among the `explicit` settings,
    halves until there are MIN_STEPS steps or a single sequence. Warm-up and decay keep their share of the schedule, the
    warm-up at least a hundredth and at most a tenth of it.
    """
    assert recipe.budget is not None
    seconds, tokens = parse_budget(recipe.budget)
    if tokens is None:
        assert seconds is not None
        tokens = int(0.9 * seconds * ranks * tokens_per_second(recipe))  # the rest measures, samples and saves
    train, schedule = recipe.train, recipe.optim.schedule.resolved(recipe.train.steps)
    rows = train.sequences_per_step
    fixed, row_tokens = "train.batch_tokens" in explicit, train.sequence_length
    tokens = tokens if most_rows is None else min(tokens, most_rows * row_tokens)
    while not fixed and rows // 2 >= ranks and tokens // (rows * row_tokens) < MIN_STEPS:
        rows //= 2
    steps = max(1, tokens // (rows * train.sequence_length))
    horizon = schedule.steps or train.steps
    warmup = min(max(schedule.warmup_steps / horizon, 0.01), 0.1) if schedule.warmup_steps else 0
    decay = min(schedule.decay_steps / horizon, 1 - warmup) if schedule.decay_steps else None
    intervals = {name: train.__dict__[name] for name in ("checkpoint_every", "evaluate_every", "sample_every")}
    changes: dict[str, Any] = {
        "train.steps": steps,
        "train.batch_tokens": rows * train.sequence_length,
        "optim.schedule.steps": steps,
        "optim.schedule.warmup_steps": warmup,
        "optim.schedule.decay_steps": decay if decay != 1 else None,
    }
    changes |= stages_within(recipe, horizon, steps)
    changes |= {f"train.{name}": min(every, max(1, steps // 4)) for name, every in intervals.items() if every}
    return replace_settings(recipe, changes)


def stages_within(recipe: Recipe, horizon: int, steps: int) -> dict[str, Any]:
    """Return the stages of a mixture at their places in a schedule of `steps`."""
    if recipe.data.stages is None:
        return {}
    ends = recipe.data.stage_ends(recipe.train.batch_tokens, recipe.optim.schedule.resolved(horizon))
    stages, last = [stage.model_dump() for stage in recipe.data.stages], 0
    for stage, end in zip(stages, ends, strict=False):
        last = max(last + 1, end * steps // horizon)
        if stage["until"] is None:
            stage |= {"until_step": last, "until_tokens": None}
    return {"data.stages": stages}


def step_cost(recipe: Recipe, device: torch.device, devices: int = 1) -> StepCost:
    """Return the tokens and FLOPs of a step, and the peak of the devices that share it."""
    length = recipe.train.sequence_length
    return StepCost(
        tokens=recipe.train.batch_tokens,
        flops_per_token=flops_per_token(recipe.model, length),
        flops_per_token_full_attention=flops_per_token(recipe.model, length, "full"),
        peak_flops_per_second=device_peak(device, pick_dtype(recipe.train.dtype, device)).flops_per_second,
        devices=devices,
    )


def tokens_per_second(recipe: Recipe) -> float:
    """Measure a few whole steps of a throw-away model, with fewer sequences where one step would take long."""
    device = pick_device(recipe.train.device)
    model = build(recipe.model)
    if recipe.lora.rank is not None:
        lora.add_lora(model, recipe.lora, recipe.seed)
    model.to(device)
    row_flops = recipe.train.sequence_length * flops_per_token(recipe.model, recipe.train.sequence_length)
    max_rows = max(1, int(PROBE_FLOPS / row_flops))
    rows = min(recipe.train.sequences_per_micro_batch, max_rows)
    batch = synthetic_batch(recipe, rows)
    steps = 2**40  # ends when it was measured
    schedule = recipe.optim.schedule.resolved(steps).model_dump()
    size = {"train.batch_tokens": batch.input_ids.numel(), "train.steps": steps, "optim.schedule": schedule}
    plain = {"data.stages": None, "data.intra_document_masking": False}  # there is no text, nor a tokenizer
    probe = replace_settings(recipe, size | plain)
    optimizers, rates, started = build_optimizers(model, recipe.optim), [], time.perf_counter()
    callback = Callback(1, lambda _, metrics: rates.append(1 / metrics["tokens_per_second"]), metrics_only=True)
    train(
        Objective.from_recipe(model, probe),
        optimizers,
        itertools.repeat(batch),
        recipe=probe,
        state=TrainState(),
        timer=StepTimer(step_cost(probe, device), 1, clock(device)),
        hooks=Hooks([callback], should_stop=lambda: len(rates) > 1 and time.perf_counter() - started > PROBE_SECONDS),
    )
    return 1 / statistics.mean(rates[1:])  # the first one allocates


def synthetic_batch(recipe: Recipe, rows: int) -> Batch:
    """Return a batch of random ids of the recipe's format; of pairs, one as long as the row."""
    length = recipe.train.sequence_length
    ids = torch.randint(recipe.model.vocab_size, (rows, length))
    if recipe.data.format != "pairs":
        return Batch(ids, ids)
    positions = (torch.arange(length) % -(-length // 2)).expand(rows, -1)
    return Batch(ids, ids, positions, torch.zeros(rows, length))
