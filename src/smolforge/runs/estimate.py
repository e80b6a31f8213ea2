"""What a run will be and cost, before it starts: parameters, tokens, time, memory, disk; and a run cut to a budget."""

import itertools
import math
import re
import statistics
import time
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from smolforge.checkpoint.training_state import SOUND_KEPT
from smolforge.config import ModelConfig, Recipe
from smolforge.config.base import replaced
from smolforge.data.batches import Batch
from smolforge.device import matrix_flops_per_second, memory_bytes, pick_device, pick_dtype
from smolforge.device.peak_flops import peak
from smolforge.errors import SettingError
from smolforge.models import lora
from smolforge.models.activation_checkpointing import Checkpointing
from smolforge.models.decoder import build
from smolforge.models.stats import flops_per_token, parameter_counts, table
from smolforge.training.loop import Action, State, train
from smolforge.training.loss import chunk_tokens
from smolforge.training.objective import Objective
from smolforge.training.optim import optimizers
from smolforge.training.step_timer import Meter, Work, clock

EFFICIENCY = 0.45
"""Share of the measured matrix speed that a training step reaches, all its other work included."""
PROCESS_BYTES = 450 << 20
"""A process with torch imported and nothing in it."""
COMPILER_BYTES = 200 << 20
COMPILED_SHARE = 0.75
HOLES = 1.25
FEWEST_STEPS = 200
PROBE_SECONDS, PROBE_FLOPS = 4, 1e12
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

BUDGETED = (
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
class Plan:
    """The expectations a run opens with."""

    parameters: dict[str, int]
    tokens: int
    flops_per_token: int
    seconds: float
    memory_bytes: int
    available_bytes: int
    disk_bytes: int
    device: str

    def warnings(self) -> list[str]:
        """What a person should know before waiting for it."""
        said = []
        if self.memory_bytes > self.available_bytes:
            said.append(
                f"this needs about {self.memory_bytes / 2**30:.1f} GiB of memory and {self.device} has "
                f"{self.available_bytes / 2**30:.1f}; a smaller --train.micro-batch-size needs less"
            )
        if self.seconds > 86400:
            said.append(
                f"this will take about {self.seconds / 86400:,.0f} days here; "
                "--train.steps stops earlier, --budget 10m makes a run of ten minutes"
            )
        return said


def plan(recipe: Recipe, done_steps: int = 0) -> Plan:
    """Expectations of a recipe on this machine; time from a quick matrix product, so within a factor of two."""
    device = pick_device(recipe.train.device)
    dtype = pick_dtype(recipe.train.dtype, device)
    flops = flops_per_token(recipe.model, recipe.train.sequence_length)
    tokens = (recipe.train.steps - done_steps) * recipe.train.batch_tokens
    copied = checkpoint_bytes(recipe) if recipe.train.checkpoint_in_background else 0
    return Plan(
        parameters=parameter_counts(recipe.model),
        tokens=tokens,
        flops_per_token=flops,
        seconds=tokens * flops / (matrix_flops_per_second(device, dtype) * EFFICIENCY),
        memory_bytes=training_bytes(recipe) + (copied if device.type != "cuda" else 0),
        available_bytes=memory_bytes(device),
        disk_bytes=disk_bytes(recipe),
        device=device.type,
    )


def plan_of_ranks(recipe: Recipe, done_steps: int, ranks: int) -> Plan:
    """Expectations where so many devices like this one share each batch; memory is that of one."""
    if ranks == 1:
        return plan(recipe, done_steps)
    share = math.ceil(recipe.train.rows / ranks)
    of_one = replaced(recipe, {"train.micro_batch_size": min(recipe.train.micro_rows, share)})
    alone = plan(of_one, done_steps)
    return replace(alone, seconds=alone.seconds / ranks, device=f"{ranks} x {alone.device}")


def training_bytes(recipe: Recipe) -> int:
    """Peak memory of a training step: weights, gradients, two moments, an average, and what backward needs.

    Where layers are computed again in backward, one of them has everything at a time. A processor's malloc leaves
    holes, among gradients too where whole layers are computed again; a compiler lays out most of what is kept better
    and takes memory itself: the three constants are measured, docs/performance.md.
    """
    model, train, device = recipe.model, recipe.train, pick_device(recipe.train.device)
    width = 8 if train.dtype == "float64" else 4
    low = 2 if pick_dtype(train.dtype, device) == torch.bfloat16 else width
    tokens, compiled, again = train.micro_rows * train.sequence_length, train.compile is True, train.recomputed
    kept = model.num_hidden_layers * bytes_kept(model, again, width, low)
    kept = int(kept * COMPILED_SHARE) if compiled and again is None else kept
    kept += bytes_kept(model, None, width, low) if again else 0
    weights = sum(parameter_counts(model).values()) * width
    copies = 3 + (recipe.optim.ema_decay is not None)
    rest = (
        weights
        + copies * width * learning(recipe)
        + head_bytes(recipe, tokens, width, accumulates=train.micro_rows < train.rows)
    )
    rest += weights * low // width if low < width else 0  # what autocast casts
    if device.type == "cuda":
        return rest + tokens * kept
    holes = weights if again == "full" else 0
    return rest + holes + int(tokens * kept * (1 if compiled else HOLES)) + PROCESS_BYTES + compiled * COMPILER_BYTES


def bytes_kept(model: ModelConfig, again: Checkpointing, width: int, low: int) -> int:
    """How much a layer keeps of each token for its backward: `width` bytes a number in norms, `low` in products.

    All: inputs and outputs of two norms, queries before and after attention and merged, keys and values, four arrays
    of the feed-forward's width; experts have theirs, with input and output, once for each a token goes to. Of these
    `selective` keeps what products and attention give, and the layer's input; `full` the input alone.
    """
    hidden, wide = model.hidden_size, model.intermediate_size
    queries, keys = (heads * model.head_size for heads in (model.num_attention_heads, model.num_key_value_heads))
    experts = model.num_experts_per_tok if model.model_type == "mixtral" else 0
    match again:
        case "full":
            return hidden * width
        case "selective":
            given = hidden + 2 * queries + 2 * keys + (experts or 1) * 2 * wide + experts * hidden
            return hidden * width + given * low
        case _:
            given = 2 * hidden + 3 * queries + 2 * keys + (experts or 1) * 4 * wide + 3 * experts * hidden
            return 2 * hidden * width + given * low


def head_bytes(recipe: Recipe, tokens: int, width: int, accumulates: bool) -> int:
    """What the loss of so many tokens needs at its peak, weights and their gradients apart.

    On the way forward a chunk's logits and the head's gradient, on the way back that gradient twice. One of them
    becomes the weight's own, unless that holds what earlier micro-batches gave. The states' gradient is there twice.
    In bfloat16 a chunk's logits exist in both precisions, and so does the head.
    """
    device, vocabulary = pick_device(recipe.train.device), recipe.model.vocab_size
    matrix = vocabulary * recipe.model.hidden_size * width
    logits = min(tokens, chunk_tokens(device)) * vocabulary * width
    if pick_dtype(recipe.train.dtype, device) == torch.bfloat16:
        logits += (logits + matrix) // 2
    return max(logits, matrix) + accumulates * matrix + 2 * tokens * recipe.model.hidden_size * width


def disk_bytes(recipe: Recipe) -> int:
    """What the checkpoints kept at the same time take, the one being written included."""
    train = recipe.train
    written = -(-train.steps // (train.checkpoint_every or train.steps)) + 1
    kept = max(train.keep_last, SOUND_KEPT) + train.keep_best + 1
    return min(kept, written) * checkpoint_bytes(recipe)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Weights, two moments and an average, and a little for the rest."""
    width = 8 if recipe.train.dtype == "float64" else 4
    copies = 2 + (recipe.optim.ema_decay is not None) + (recipe.lora.rank is not None)
    return width * (sum(parameter_counts(recipe.model).values()) + copies * learning(recipe)) + (4 << 20)


def learning(recipe: Recipe) -> int:
    """Numbers that training changes."""
    if recipe.lora.rank is None:
        return sum(parameter_counts(recipe.model).values())
    return sum(row.times * lora.size(row.name, row.shape, recipe.lora) for row in table(recipe.model))


def parse_budget(budget: str) -> tuple[float | None, int | None]:
    """(seconds, None) of `5m` or `1h`, (None, tokens) of `10M-tokens`. Raises SettingError for anything else."""
    if found := re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([smhd])", budget):
        return float(found[1]) * _UNITS[found[2]], None
    if budget.endswith("-tokens"):
        return None, parse_count(budget.removesuffix("-tokens"))
    raise SettingError(f"budget is {budget!r}; it should be a time like 5m or 1h, or a count like 10M-tokens")


def parse_count(count: str, name: str = "budget") -> int:
    """50000, 10M or 2B as a number. Raises SettingError for anything else, with the name of what it was given to."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMB]?)", count)
    if not found:
        raise SettingError(f"{name} is {count!r}; it should be a count like 50000, 10M or 2B")
    number = int(float(found[1]) * _COUNTS[found[2]])
    if number < 1:
        raise SettingError(f"{name} is {count!r}; it should be a count above 0, like 50000, 10M or 2B")
    return number


def within_budget(
    recipe: Recipe, explicit: Set[str] = frozenset(), ranks: int = 1, most_rows: int | None = None
) -> Recipe:
    """The recipe with steps, batch, warm-up and decay cut to its budget on this machine, or so many like it, and to
    `most_rows` in all where its epochs end before that.

    The batch, unless it is among the `explicit` settings, halves until there are FEWEST_STEPS steps or a
    single row; warm-up and decay keep their share of the schedule, the warm-up at least a hundredth and
    at most a tenth of it.
    """
    assert recipe.budget is not None
    seconds, tokens = parse_budget(recipe.budget)
    if tokens is None:
        assert seconds is not None
        tokens = int(0.9 * seconds * ranks * tokens_per_second(recipe))  # the rest measures, samples and saves
    train, schedule = recipe.train, recipe.optim.schedule.over(recipe.train.steps)
    rows = train.rows
    fixed, row_tokens = "train.batch_tokens" in explicit, train.sequence_length
    tokens = tokens if most_rows is None else min(tokens, most_rows * row_tokens)
    while not fixed and rows // 2 >= ranks and tokens // (rows * row_tokens) < FEWEST_STEPS:
        rows //= 2
    steps = max(1, tokens // (rows * train.sequence_length))
    horizon = schedule.steps or train.steps
    warmup = min(max(schedule.warmup_steps / horizon, 0.01), 0.1) if schedule.warmup_steps else 0
    decay = min(schedule.decay_steps / horizon, 1 - warmup) if schedule.decay_steps else None
    often = {name: train.__dict__[name] for name in ("checkpoint_every", "evaluate_every", "sample_every")}
    changes: dict[str, Any] = {
        "train.steps": steps,
        "train.batch_tokens": rows * train.sequence_length,
        "optim.schedule.steps": steps,
        "optim.schedule.warmup_steps": warmup,
        "optim.schedule.decay_steps": decay if decay != 1 else None,
    }
    changes |= stages_within(recipe, horizon, steps)
    changes |= {f"train.{name}": min(every, max(1, steps // 4)) for name, every in often.items() if every}
    return replaced(recipe, changes)


def stages_within(recipe: Recipe, horizon: int, steps: int) -> dict[str, Any]:
    """The stages of a text where they would be if so many steps were all of the schedule's."""
    if recipe.data.stages is None:
        return {}
    ends = recipe.data.ends(recipe.train.batch_tokens, recipe.optim.schedule.over(horizon))
    stages, last = [stage.model_dump() for stage in recipe.data.stages], 0
    for stage, end in zip(stages, ends, strict=False):
        last = max(last + 1, end * steps // horizon)
        if stage["until"] is None:
            stage |= {"until_step": last, "until_tokens": None}
    return {"data.stages": stages}


def work(recipe: Recipe, device: torch.device, devices: int = 1) -> Work:
    """What a step of the recipe asks of so many devices like this one, for rates."""
    length = recipe.train.sequence_length
    return Work(
        tokens=recipe.train.batch_tokens,
        flops_per_token=flops_per_token(recipe.model, length),
        flops_per_token_full_attention=flops_per_token(recipe.model, length, "full"),
        peak_flops_per_second=peak(device, pick_dtype(recipe.train.dtype, device)).flops_per_second,
        devices=devices,
    )


def tokens_per_second(recipe: Recipe) -> float:
    """Measured: a few whole steps of a throw-away model, with fewer rows where one step would take long."""
    device = pick_device(recipe.train.device)
    model = build(recipe.model)
    if recipe.lora.rank is not None:
        lora.adapt(model, recipe.lora, recipe.seed)
    model.to(device)
    row_flops = recipe.train.sequence_length * flops_per_token(recipe.model, recipe.train.sequence_length)
    most = max(1, int(PROBE_FLOPS / row_flops))
    rows = min(recipe.train.micro_rows, most)
    batch = imagined(recipe, rows)
    steps = 2**40  # ends when it was measured
    schedule = recipe.optim.schedule.over(steps).model_dump()
    size = {"train.batch_tokens": batch.ids.numel(), "train.steps": steps, "optim.schedule": schedule}
    plain = {"data.stages": None, "data.intra_document_masking": False}  # there is no text, nor a tokenizer
    probe = replaced(recipe, size | plain)
    chosen, taken, begun = optimizers(model, recipe.optim), [], time.perf_counter()
    heard = Action(1, lambda _, metrics: taken.append(1 / metrics["tokens_per_second"]), late=True)
    train(
        Objective.of(model, probe),
        chosen,
        itertools.repeat(batch),
        probe,
        State(),
        [heard],
        stopping=lambda: len(taken) > 1 and time.perf_counter() - begun > PROBE_SECONDS,
        meter=Meter(work(probe, device), 1, clock(device)),
    )
    return 1 / statistics.mean(taken[1:])  # the first one allocates


def imagined(recipe: Recipe, rows: int) -> Batch:
    """So many rows of what a recipe learns from; of pairs, one as long as the row."""
    length = recipe.train.sequence_length
    ids = torch.randint(recipe.model.vocab_size, (rows, length))
    if recipe.data.format != "pairs":
        return Batch(ids, ids)
    positions = (torch.arange(length) % -(-length // 2)).expand(rows, -1)
    return Batch(ids, ids, positions, torch.zeros(rows, length))
