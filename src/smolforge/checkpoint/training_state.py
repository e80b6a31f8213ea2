"""The training state beside the weights, in `training/`.

optimizer.safetensors   moments and step counts, named by parameter; where the model's weights are an average
                        (optim.ema_decay), also those that training goes on with: `training.<parameter>`
../adapter/             low-rank updates, where it is they that learn; the model's files have them added
random.safetensors      the random states of torch, NumPy and Python, as tensors: nothing is pickled
state.json              step, tokens, corpus, validation loss, incidents so far
"""

import functools
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from smolforge import atomic
from smolforge.checkpoint import huggingface, peft_adapter, safetensors_writer
from smolforge.config import ModelConfig
from smolforge.device import is_async, synchronize
from smolforge.errors import InvalidFileError, NewerFormatError
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel
from smolforge.tokenizer import Tokenizer

TRAINING, OPTIMIZER, RANDOM, STATE = "training", "optimizer.safetensors", "random.safetensors", "state.json"
FORMAT_VERSION = 2
MIN_VALID_KEPT = 2
"""The number of valid checkpoints that are never deleted."""


def checkpoint_dir(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, valid or not."""
    paths = (run / "checkpoints").glob("step-*")
    return sorted((path for path in paths if re.fullmatch(r"step-[0-9]{1,18}", path.name)), key=step_from_dir)


def step_from_dir(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run: all that a checkpoint will say of it."""

    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    """By their names on disk."""
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    adapter: dict[str, Tensor]
    """What learns, where low-rank updates do."""
    adapter_settings: dict[str, Any]
    """What peft is told of it."""
    metadata: dict[str, Any]
    """For state.json; `step` among them."""

    @property
    def nbytes(self) -> int:
        return sum(
            tensor.nbytes
            for group in (self.weights, self.optimizer, self.random, self.adapter)
            for tensor in group.values()
        )


class StagingBuffer:
    """Memory for copies of tensors, kept from one snapshot to the next: fresh memory costs five times the copying."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, on the CPU, whatever becomes of them."""
        for name, tensor in tensors.items():
            if name not in self.buffers:
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[name].copy_(tensor.detach(), non_blocking=is_async(tensor.device))
        for device in {tensor.device for tensor in tensors.values()}:
            synchronize(device)
        return {name: self.buffers[name] for name in tensors}


def take_snapshot(
    model: LanguageModel,
    optimizer: dict[str, Tensor],
    metadata: dict[str, Any],
    *,
    staging: StagingBuffer | None = None,
    adapter_settings: dict[str, Any] | None = None,
) -> Snapshot:
    """Copy the state of training into `staging`; without it the snapshot is right only until the next step."""
    copy = staging.copy if staging else _contiguous
    return Snapshot(
        config=model.config,
        tokenizer=model.tokenizer,
        weights=copy(huggingface.tensors_by_disk_name(model)),
        optimizer=copy(optimizer) if optimizer else {},
        random=rng_state_tensors(),
        adapter=copy(adapters) if (adapters := lora.lora_parameters(model)) else {},
        adapter_settings=adapter_settings or {},
        metadata=metadata,
    )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_checkpoint(
    folder: Path, snapshot: Snapshot, check_cancelled: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write one checkpoint atomically and return its manifest. `check_cancelled` is called often, and may raise."""

    def fill(temporary: Path) -> None:
        dtype = next(iter(snapshot.weights.values())).dtype
        huggingface.save_settings(temporary, snapshot.config, snapshot.tokenizer, dtype=dtype)
        safetensors_writer.write(
            temporary / huggingface.WEIGHTS, snapshot.weights, huggingface.METADATA, check_cancelled=check_cancelled
        )
        (temporary / TRAINING).mkdir()
        safetensors_writer.write(temporary / TRAINING / OPTIMIZER, snapshot.optimizer, check_cancelled=check_cancelled)
        safetensors_writer.write(temporary / TRAINING / RANDOM, snapshot.random, check_cancelled=check_cancelled)
        if snapshot.adapter:
            peft_adapter.write_adapter(temporary / peft_adapter.FOLDER, snapshot.adapter_settings, snapshot.adapter)
        content = json.dumps({"format_version": FORMAT_VERSION, **snapshot.metadata}, indent=2)
        (temporary / TRAINING / STATE).write_text(content + "\n", "utf-8", newline="\n")

    return atomic.write_dir_atomic(folder, fill, {"step": snapshot.metadata["step"]}, needed_bytes=snapshot.nbytes)


def load_checkpoint(folder: Path, model: LanguageModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fill the model's weights, set all random states and what ends an answer; returns optimizer tensors and metadata.

    The folder must have passed `check_checkpoint`.
    """
    metadata = read_metadata(folder)
    if lora.lora_parameters(model):  # the rest is in the model that it began from
        peft_adapter.fill_adapter(
            model, peft_adapter.read_adapter(folder / peft_adapter.FOLDER), folder / peft_adapter.FOLDER
        )
    else:
        with huggingface.SafetensorsReader(folder) as tensors:
            huggingface.check_tensors(tensors, model.config)
            huggingface.fill(model, tensors)
    if model.tokenizer is not None:
        model.tokenizer = model.tokenizer.with_eos_ids(huggingface.read_eos_ids(folder))
    restore_rng_state(load_file(folder / TRAINING / RANDOM))
    return load_file(folder / TRAINING / OPTIMIZER), metadata


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read state.json. Raises InvalidFileError where it is missing or corrupted, NewerFormatError if it is newer."""
    path = folder / TRAINING / STATE
    try:
        metadata = {**json.loads(path.read_text("utf-8"))}
        newer = metadata["format_version"] > FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidFileError(f"{path} cannot be read: {error}") from None
    if newer:
        raise NewerFormatError(f"{path} has format {metadata['format_version']}; this version reads {FORMAT_VERSION}")
    return metadata


def check_checkpoint(checkpoint: Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the manifest of a checkpoint after a check of its files, or `only` some. Raises InvalidFileError."""
    manifest = atomic.check_manifest(checkpoint, only)
    if manifest.get("step") != step_from_dir(checkpoint):
        raise InvalidFileError(f"{checkpoint} is damaged: it holds another step than its name says")
    return manifest


def latest_valid(
    run: Path,
    warn: Callable[[str], None],
    only: Iterable[str] | None = None,
    *,
    step_filter: Callable[[int], bool] = lambda step: True,
) -> Path | None:
    """Return the newest checkpoint whose step passes `step_filter` and whose files (or `only` some) match its manifest.

    `warn` is called with the reason for each one that is skipped. Raises NewerFormatError for a checkpoint in a newer
    format, which is never skipped.
    """
    for folder in reversed([folder for folder in list_checkpoints(run) if step_filter(step_from_dir(folder))]):
        try:
            check_checkpoint(folder, only)
        except NewerFormatError:
            raise
        except InvalidFileError as error:
            if folder.exists():  # and was not just deleted by the run itself
                warn(f"{folder.name} is skipped: {error}")
        else:
            return folder
    return None


def prune_checkpoints(run: Path, keep_last: int, keep_best: bool, *, in_use: Path | None = None) -> None:
    """Delete the checkpoints of `expendable_checkpoints`, except one that is `in_use`."""
    for folder in expendable_checkpoints(run, keep_last, keep_best, is_valid=is_valid):
        if folder != in_use:
            atomic.remove_dir_atomic(folder)


def expendable_checkpoints(
    run: Path, keep_last: int, keep_best: bool, *, is_valid: Callable[[Path], bool]
) -> list[Path]:
    """Return all but the newest checkpoints and, with `keep_best`, the valid one with the lowest validation loss.

    The last two valid ones always stay, and `is_valid` reads them first. Checkpoints in a newer format stay too.
    """
    folders = list_checkpoints(run)
    keep: set[Path] = set(folders[-keep_last:])
    if keep.issuperset(folders):
        return []
    cached_is_valid = functools.cache(is_valid)
    scored = sorted((loss, folder) for folder in folders if (loss := validation_loss(folder)) is not None)
    if keep_best:
        keep.update(itertools.islice((folder for _, folder in scored if cached_is_valid(folder)), 1))
    keep.update(itertools.islice(filter(cached_is_valid, reversed(folders)), MIN_VALID_KEPT))
    return [folder for folder in folders if folder not in keep and not is_newer_format(folder)]


def is_valid(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are as its manifest says."""
    try:
        check_checkpoint(checkpoint)
    except InvalidFileError:
        return False
    return True


def is_newer_format(checkpoint: Path) -> bool:
    """Whether a newer version wrote it."""
    try:
        atomic.read_manifest(checkpoint)
    except NewerFormatError:
        return True
    except InvalidFileError:
        pass
    return False


def validation_loss(folder: Path) -> float | None:
    """What a checkpoint's model lost on held-out text, where that was measured, is a number and can be read."""
    try:
        loss = read_metadata(folder).get("validation_loss")
    except InvalidFileError:
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def remove_partial(run: Path) -> None:
    """Delete the unfinished checkpoints of killed processes."""
    for partial in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(partial, ignore_errors=True)


def quarantine_later(run: Path, after: int) -> None:
    """Rename the checkpoints of steps after `after`, corrupted or rolled back: their steps come again.

    They are called .aside-step-N until the next ones are.
    """
    later = [folder for folder in list_checkpoints(run) if step_from_dir(folder) > after]
    if later:
        for quarantined in (run / "checkpoints").glob(".aside-*"):
            shutil.rmtree(quarantined, ignore_errors=True)
    for folder in reversed(later):
        folder.rename(folder.with_name(f".aside-{folder.name}"))
    if later:
        atomic.fsync_path(run / "checkpoints")


def rng_state_tensors() -> dict[str, Tensor]:
    """Return the random states of torch, NumPy and Python, as tensors (float64 holds their 32-bit words exactly)."""
    numpy_state: Any = np.random.get_state(legacy=False)
    twister = numpy_state["state"]
    _, python_words, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(
            [*twister["key"].tolist(), twister["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
            dtype=torch.float64,
        ),
        "python": torch.tensor(
            [*python_words, math.nan if python_gauss is None else python_gauss], dtype=torch.float64
        ),
    }
    return states | {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}


def seed_all(seed: int) -> None:
    """Seed the random generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def restore_rng_state(tensors: dict[str, Tensor]) -> None:
    """Restore what `rng_state_tensors` returned; devices that do not exist here are skipped."""
    torch.set_rng_state(tensors["torch"])
    *key, position, has_gauss, gauss = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), int(position), int(has_gauss), gauss))
    *key, gauss = tensors["python"].tolist()
    random.setstate((3, tuple(map(int, key)), None if math.isnan(gauss) else gauss))
    for index in range(torch.cuda.device_count()):
        state = tensors.get(f"cuda.{index}")
        if state is not None:
            torch.cuda.set_rng_state(state, index)
