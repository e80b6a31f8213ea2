"""Read AdamW's optimizer state from a checkpoint of ours or of nanotron, for a run that starts from its model."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from smolforge import atomic
from smolforge.checkpoint import nanotron, training_state
from smolforge.checkpoint.huggingface import safetensors_errors
from smolforge.checkpoint.nanotron.optimizer import MOMENTS, STEP
from smolforge.errors import InvalidFileError

OPTIMIZER_FILE = f"{training_state.TRAINING}/{training_state.OPTIMIZER}"


def check_moments_exist(folder: Path) -> None:
    """Raise InvalidFileError where a model's folder has no Adam moments; they are not read."""
    if nanotron.is_checkpoint(folder):
        nanotron.optimizer.optimizer_files(folder)
    elif not (folder / OPTIMIZER_FILE).is_file():
        raise InvalidFileError(f"{folder} has no moments to go on with ({OPTIMIZER_FILE}); leave init_moments out")
    else:
        check_optimizer_file(folder)


def read_moments(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return Adam moments in this dtype and step counts, named as by `optim.state_tensors`.

    Raises InvalidFileError where there are none, or others: those of an EMA model belong to weights that it does not
    have.
    """
    check_moments_exist(folder)
    tensors = (
        nanotron.optimizer.read_moments(folder) if nanotron.is_checkpoint(folder) else read_checkpoint_moments(folder)
    )
    return {name: value if name.startswith(f"{STEP}.") else value.to(dtype) for name, value in tensors.items()}


def read_checkpoint_moments(folder: Path) -> dict[str, Tensor]:
    """Read the optimizer state of a checkpoint of ours, checked against its manifest."""
    atomic.check_manifest(folder, [OPTIMIZER_FILE])
    return load_file(folder / OPTIMIZER_FILE)


def check_optimizer_file(folder: Path) -> None:
    """Raise InvalidFileError where a checkpoint's file is corrupted, empty, or has more than AdamW's state."""
    with safetensors_errors(folder / OPTIMIZER_FILE), safe_open(folder / OPTIMIZER_FILE, "pt") as file:
        kinds = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
    if not kinds:
        raise InvalidFileError(f"{folder} was saved before its first step and has no moments; leave init_moments out")
    if unexpected := kinds - {*MOMENTS, STEP}:
        raise InvalidFileError(
            f"{folder / OPTIMIZER_FILE} has {min(unexpected)} beside AdamW's moments; what another optimizer "
            "or an average made can be begun from, but not gone on with: leave init_moments out"
        )
