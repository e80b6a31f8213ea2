"""What `auto` comes to on this machine: dtype, micro-batch, compilation. Decided at a run's first start, and kept.

dtype          the one this device multiplies fastest in, measured
micro-batch    as many rows as keep the device busy and fit into its memory, on a GPU found by trying
compile        where the run is long enough to win back what the compiler takes
checkpointing  selective where a processor's program is compiled: it is smaller, and no slower
"""

import torch

from smolforge.config import Recipe
from smolforge.config.base import replaced
from smolforge.device import available_bytes, fastest_dtype, pick_device
from smolforge.errors import SettingError
from smolforge.runs.estimate import plan_of_ranks, tokens_per_second, training_bytes

DECIDED = ("train.dtype", "train.micro_batch_size", "train.compile", "train.activation_checkpointing")
BUSY_TOKENS = {"cuda": 65_536}
"""Tokens of a micro-batch beyond which a device gets no faster."""
BUSY_TOKENS_ELSEWHERE = 4096
SAFE_SHARE = 0.8
"""Of the memory that is free, so that the prediction's error and other programs have room."""
WORTH_COMPILING_SECONDS = {"cuda": 300, "cpu": 3600}
"""A compiler takes a minute or two. What it wins was measured on a processor; for GPUs this is an estimate."""


def in_the_fastest_dtype(recipe: Recipe) -> Recipe:
    """What is measured on this machine must be measured so: this comes first."""
    if recipe.train.dtype != "auto":
        return recipe
    return replaced(recipe, {"train.dtype": fastest_dtype(pick_device(recipe.train.device))})


def on_this_machine(recipe: Recipe, ranks: int = 1) -> Recipe:
    """The recipe without any other `auto`, where so many devices like this one train it.

    Raises SettingError where not even one row fits.
    """
    device, train = pick_device(recipe.train.device), recipe.train
    if train.micro_batch_size == "auto":
        recipe = replaced(recipe, {"train.micro_batch_size": fitting_rows(recipe, device, ranks)})
    if train.compile == "auto":
        recipe = replaced(recipe, {"train.compile": is_worth_compiling(recipe, device, ranks)})
    if train.activation_checkpointing == "auto":
        again = "selective" if recipe.train.compile is True and device.type == "cpu" else None
        recipe = replaced(recipe, {"train.activation_checkpointing": again})
    return recipe


def fitting_rows(recipe: Recipe, device: torch.device, ranks: int) -> int:
    """The largest part of a rank's rows that is no more than keeps the device busy, and that fits."""
    train, room = recipe.train, SAFE_SHARE * available_bytes(device)
    share = max(1, train.rows // ranks)
    busy = BUSY_TOKENS.get(device.type, BUSY_TOKENS_ELSEWHERE) // train.sequence_length
    for rows in range(min(max(1, busy), share), 0, -1):
        if share % rows == 0:
            tried = replaced(recipe, {"train.micro_batch_size": rows})
            if training_bytes(tried) <= room and (device.type != "cuda" or fits(tried)):
                return rows
    raise SettingError(
        f"not even one row of {train.sequence_length} tokens fits into the {room / 2**30:.1f} GiB that may be used; "
        "--train.activation-checkpointing full needs less, or a smaller --train.sequence-length"
    )


def fits(recipe: Recipe) -> bool:
    """Whether a few steps of it run."""
    try:
        tokens_per_second(recipe)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def is_worth_compiling(recipe: Recipe, device: torch.device, ranks: int) -> bool:
    return plan_of_ranks(recipe, 0, ranks).seconds > WORTH_COMPILING_SECONDS.get(device.type, float("inf"))
