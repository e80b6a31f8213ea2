"""The settings `auto` on this machine: dtype, micro-batch, compilation. Resolved at a run's first start, and kept.

dtype          the one this device multiplies fastest in, measured
micro-batch    as many sequences as keep the device busy and fit into its memory, on a GPU found by trying
compile        where the run is long enough to win back what the compiler takes
checkpointing  selective where a CPU's program is compiled: it is smaller, and no slower
"""

import torch

from smolforge.config import Recipe
from smolforge.config.base import replace_settings
from smolforge.device import available_bytes, fastest_dtype, pick_device
from smolforge.errors import ConfigError
from smolforge.formatting import format_bytes
from smolforge.runs.estimate import estimate_of_ranks, tokens_per_second, training_bytes

AUTO_SETTINGS = ("train.dtype", "train.micro_batch_size", "train.compile", "train.activation_checkpointing")
BUSY_TOKENS = {"cuda": 65_536}
"""Tokens of a micro-batch beyond which a device gets no faster."""
BUSY_TOKENS_ELSEWHERE = 4096
SAFE_SHARE = 0.8
"""Of the memory that is free, so that the prediction's error and other programs have room."""
WORTH_COMPILING_SECONDS = {"cuda": 300, "cpu": 3600}
"""A compiler takes a minute or two. What it wins was measured on a processor; for GPUs this is an estimate."""


def resolve_dtype(recipe: Recipe) -> Recipe:
    """Return the recipe with the fastest dtype. This comes first: all other measurements must use it."""
    if recipe.train.dtype != "auto":
        return recipe
    return replace_settings(recipe, {"train.dtype": fastest_dtype(pick_device(recipe.train.device))})


def resolve_auto(recipe: Recipe, ranks: int = 1) -> Recipe:
    """Return the recipe without any other `auto`, for `ranks` devices like this one.

    Raises ConfigError where not even one sequence fits.
    """
    device, train = pick_device(recipe.train.device), recipe.train
    if train.micro_batch_size == "auto":
        recipe = replace_settings(recipe, {"train.micro_batch_size": find_micro_batch_size(recipe, device, ranks)})
    if train.compile == "auto":
        recipe = replace_settings(recipe, {"train.compile": is_worth_compiling(recipe, device, ranks)})
    if train.activation_checkpointing == "auto":
        checkpointing = "selective" if recipe.train.compile is True and device.type == "cpu" else None
        recipe = replace_settings(recipe, {"train.activation_checkpointing": checkpointing})
    return recipe


def find_micro_batch_size(recipe: Recipe, device: torch.device, ranks: int) -> int:
    """Return the largest divisor of a rank's sequences that keeps the device busy and fits into its memory."""
    train, usable_bytes = recipe.train, SAFE_SHARE * available_bytes(device)
    share = max(1, train.sequences_per_step // ranks)
    busy_rows = BUSY_TOKENS.get(device.type, BUSY_TOKENS_ELSEWHERE) // train.sequence_length
    for rows in range(min(max(1, busy_rows), share), 0, -1):
        if share % rows == 0:
            candidate = replace_settings(recipe, {"train.micro_batch_size": rows})
            if training_bytes(candidate) <= usable_bytes and (device.type != "cuda" or runs_without_oom(candidate)):
                return rows
    raise ConfigError(
        f"not even one row of {train.sequence_length} tokens fits into the {format_bytes(usable_bytes)} that may be "
        "used; --train.activation-checkpointing full needs less, or a smaller --train.sequence-length"
    )


def runs_without_oom(recipe: Recipe) -> bool:
    """Whether a few steps run within the GPU's memory."""
    try:
        tokens_per_second(recipe)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def is_worth_compiling(recipe: Recipe, device: torch.device, ranks: int) -> bool:
    """Whether the run is long enough to win back the compiler's time."""
    return estimate_of_ranks(recipe, 0, ranks).seconds > WORTH_COMPILING_SECONDS.get(device.type, float("inf"))
