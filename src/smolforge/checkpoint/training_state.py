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
from smolforge.device import synchronize
from smolforge.errors import InvalidFile, LaterFormat
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel
from smolforge.tokenizer import Tokenizer

TRAINING, OPTIMIZER, RANDOM, STATE = "training", "optimizer.safetensors", "random.safetensors", "state.json"
FORMAT_VERSION = 2
SOUND_KEPT = 2
"""Sound checkpoints that are never deleted."""


def folder_of(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def all_of(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, sound or not."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-[0-9]{1,18}", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
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
    facts: dict[str, Any]
    """For state.json; `step` among them."""

    @property
    def nbytes(self) -> int:
        return sum(
            tensor.nbytes
            for group in (self.weights, self.optimizer, self.random, self.adapter)
            for tensor in group.values()
        )


class Staging:
    """Memory for copies of tensors, kept from one snapshot to the next: fresh memory costs five times the copying."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, on the CPU, whatever becomes of them."""
        for name, tensor in tensors.items():
            if name not in self.kept:
                self.kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.kept[name].copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors.values()}:
            synchronize(device)
        return {name: self.kept[name] for name in tensors}


def snapshot(
    model: LanguageModel,
    optimizer: dict[str, Tensor],
    facts: dict[str, Any],
    staging: Staging | None = None,
    adapter_settings: dict[str, Any] | None = None,
) -> Snapshot:
    """This moment, copied into `staging`; without one it holds only until the next step."""
    copy = staging.copy if staging else _contiguous
    return Snapshot(
        config=model.config,
        tokenizer=model.tokenizer,
        weights=copy(huggingface.named_tensors(model)),
        optimizer=copy(optimizer) if optimizer else {},
        random=random_tensors(),
        adapter=copy(adapters) if (adapters := lora.adapters(model)) else {},
        adapter_settings=adapter_settings or {},
        facts=facts,
    )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save(folder: Path, moment: Snapshot, going_on: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write one checkpoint, whole or not at all; returns its manifest. `going_on` is called often, and may raise."""

    def fill(temporary: Path) -> None:
        dtype = next(iter(moment.weights.values())).dtype
        huggingface.save_settings(temporary, moment.config, moment.tokenizer, dtype)
        safetensors_writer.write(temporary / huggingface.WEIGHTS, moment.weights, huggingface.METADATA, going_on)
        (temporary / TRAINING).mkdir()
        safetensors_writer.write(temporary / TRAINING / OPTIMIZER, moment.optimizer, going_on=going_on)
        safetensors_writer.write(temporary / TRAINING / RANDOM, moment.random, going_on=going_on)
        if moment.adapter:
            peft_adapter.write(temporary / peft_adapter.FOLDER, moment.adapter_settings, moment.adapter)
        content = json.dumps({"format_version": FORMAT_VERSION, **moment.facts}, indent=2)
        (temporary / TRAINING / STATE).write_text(content + "\n", "utf-8")

    return atomic.write_whole(folder, fill, {"step": moment.facts["step"]}, moment.nbytes)


def load(folder: Path, model: LanguageModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fill the model's weights and set all random states; returns optimizer tensors and facts.

    The folder must have passed `commit.check`.
    """
    facts = read_facts(folder)
    if lora.adapters(model):  # the rest is in the model that it began from
        peft_adapter.fill(model, peft_adapter.read(folder / peft_adapter.FOLDER), folder / peft_adapter.FOLDER)
    else:
        with huggingface.Tensors(folder) as found:
            huggingface.check_names(found, model.config)
            huggingface.fill(model, found)
    set_random_tensors(load_file(folder / TRAINING / RANDOM))
    return load_file(folder / TRAINING / OPTIMIZER), facts


def read_facts(folder: Path) -> dict[str, Any]:
    """What state.json says. Raises InvalidFile where it is missing, broken or from a later version."""
    path = folder / TRAINING / STATE
    try:
        facts = {**json.loads(path.read_text("utf-8"))}
        later = facts["format_version"] > FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from None
    if later:
        raise LaterFormat(f"{path} has format {facts['format_version']}; this version reads {FORMAT_VERSION}")
    return facts


def check(checkpoint: Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint whose files, or `only` some, are as it says. Raises InvalidFile."""
    manifest = atomic.check(checkpoint, only)
    if manifest.get("step") != step_of(checkpoint):
        raise InvalidFile(f"{checkpoint} is damaged: it holds another step than its name says")
    return manifest


def newest_sound(
    run: Path,
    warn: Callable[[str], None],
    only: Iterable[str] | None = None,
    wanted: Callable[[int], bool] = lambda step: True,
) -> Path | None:
    """The newest checkpoint of a `wanted` step whose files (or `only` some) are as its manifest says.

    `warn` hears why others are not. Raises LaterFormat rather than pass over what a later version wrote.
    """
    for folder in reversed([folder for folder in all_of(run) if wanted(step_of(folder))]):
        try:
            check(folder, only)
        except LaterFormat:
            raise
        except InvalidFile as error:
            if folder.exists():  # and was not just deleted by the run itself
                warn(f"{folder.name} is skipped: {error}")
        else:
            return folder
    return None


def retain(run: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the newest checkpoints and, if wanted, the sound one with the lowest validation loss.

    The last two sound ones stay whatever their place: what is about to protect a run is read back first. What a
    later version wrote stays too.
    """
    folders = all_of(run)
    kept: set[Path] = set(folders[-keep_last:])
    if kept.issuperset(folders):
        return
    sound = functools.cache(is_sound)
    scored = sorted((loss, folder) for folder in folders if (loss := validation_loss(folder)) is not None)
    if keep_best:
        kept.update(itertools.islice((folder for _, folder in scored if sound(folder)), 1))
    kept.update(itertools.islice(filter(sound, reversed(folders)), SOUND_KEPT))
    for folder in folders:
        if folder not in kept and not is_later(folder):
            atomic.remove(folder)


def is_sound(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are as its manifest says."""
    try:
        check(checkpoint)
    except InvalidFile:
        return False
    return True


def is_later(checkpoint: Path) -> bool:
    """Whether a later version wrote it."""
    try:
        atomic.read_manifest(checkpoint)
    except LaterFormat:
        return True
    except InvalidFile:
        pass
    return False


def validation_loss(folder: Path) -> float | None:
    """What a checkpoint's model lost on held-out text, where that was measured, is a number and can be read."""
    try:
        loss = read_facts(folder).get("validation_loss")
    except InvalidFile:
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def clear(run: Path) -> None:
    """Delete what killed processes left half-written."""
    for left in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def set_aside(run: Path, after: int) -> None:
    """Take checkpoints of later steps, damaged or taken back, out of the way: their steps come again.

    They are called .aside-step-N until others are.
    """
    later = [folder for folder in all_of(run) if step_of(folder) > after]
    if later:
        for old in (run / "checkpoints").glob(".aside-*"):
            shutil.rmtree(old, ignore_errors=True)
    for folder in reversed(later):
        folder.rename(folder.with_name(f".aside-{folder.name}"))
    if later:
        atomic.sync(run / "checkpoints")


def random_tensors() -> dict[str, Tensor]:
    """The random states of torch, NumPy and Python, as tensors (float64 holds their 32-bit words exactly)."""
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
    """Where a run's random states begin."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def set_random_tensors(tensors: dict[str, Tensor]) -> None:
    """Undo `random_tensors`; devices that are not here are passed over."""
    torch.set_rng_state(tensors["torch"])
    *words, place, has_gauss, gauss = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), int(place), int(has_gauss), gauss))
    *words, gauss = tensors["python"].tolist()
    random.setstate((3, tuple(map(int, words)), None if math.isnan(gauss) else gauss))
    for index in range(torch.cuda.device_count()):
        state = tensors.get(f"cuda.{index}")
        if state is not None:
            torch.cuda.set_rng_state(state, index)
