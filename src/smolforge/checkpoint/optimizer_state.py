"""What the AdamW that made a model remembered, for a run that goes on with it: of our checkpoints, and nanotron's."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from smolforge import atomic
from smolforge.checkpoint import nanotron, training_state
from smolforge.checkpoint.nanotron.optimizer import MOMENTS, STEP
from smolforge.errors import InvalidFile

FILE = f"{training_state.TRAINING}/{training_state.OPTIMIZER}"


def check_there(folder: Path) -> None:
    """Raises InvalidFile where a model's folder has no moments of AdamW; they are not read."""
    if nanotron.is_checkpoint(folder):
        nanotron.optimizer.files(folder)
    elif not (folder / FILE).is_file():
        raise InvalidFile(f"{folder} has no moments to go on with ({FILE}); leave init_moments out")
    else:
        check_names(folder)


def read(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Moments in this dtype and step counts, as `optim.state_tensors` names them.

    Raises InvalidFile where there are none, or others: those of an averaged model belong to other weights than its own.
    """
    check_there(folder)
    found = nanotron.optimizer.moments(folder) if nanotron.is_checkpoint(folder) else of_checkpoint(folder)
    return {name: value if name.startswith(f"{STEP}.") else value.to(dtype) for name, value in found.items()}


def of_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Those of a checkpoint of ours, held to its manifest."""
    atomic.check(folder, [FILE])
    return load_file(folder / FILE)


def check_names(folder: Path) -> None:
    """Raises InvalidFile where a checkpoint's file is broken, empty, or has more than what AdamW remembers."""
    try:
        with safe_open(folder / FILE, "pt") as file:
            kinds = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{folder / FILE} cannot be read: {error}") from None
    if not kinds:
        raise InvalidFile(f"{folder} was saved before its first step and has no moments; leave init_moments out")
    if other := kinds - {*MOMENTS, STEP}:
        raise InvalidFile(
            f"{folder / FILE} has {min(other)} beside AdamW's moments; what another optimizer or an average made "
            "can be begun from, but not gone on with: leave init_moments out"
        )
