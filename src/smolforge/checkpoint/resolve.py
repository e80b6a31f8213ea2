"""MODEL, the same everywhere: a model folder, a run or one of its steps, or the name of a preset."""

import logging
from pathlib import Path

import torch

from smolforge import presets
from smolforge.checkpoint import commit, state, weights
from smolforge.config import ModelConfig
from smolforge.errors import InvalidFile, SettingError, did_you_mean
from smolforge.model import LanguageModel, build
from smolforge.tokenizer import FILES, Tokenizer

log = logging.getLogger("smolforge")
READ = (weights.CONFIG, weights.WEIGHTS, *FILES)


def load(
    model: str | Path, dtype: str | torch.dtype = torch.float32, device: str = "cpu", random: bool = False
) -> LanguageModel:
    """Any MODEL, with its tokenizer as `.tokenizer` (None where its folder has none).

    A preset has random weights, so it is refused unless `random` says that is meant. Raises SettingError
    for a name that is nothing, InvalidFile for a model that is broken.
    """
    dtype = torch_dtype(dtype)
    if not Path(model).exists() and str(model) in presets.names():
        if not random:
            published = presets.hub_id(str(model))
            instead = f"its published weights are {published}" if published else "train it first"
            raise SettingError(
                f"{model} is a shape with random weights and has nothing to say; {instead} (--random insists)"
            )
        loaded = build(ModelConfig.model_validate(presets.shape(str(model))), dtype=dtype)
        return loaded.to(device).eval()
    folder = find(model)
    loaded = weights.load(folder, dtype)
    if (folder / "tokenizer.json").is_file():
        loaded.tokenizer = Tokenizer.load(folder)
    return loaded.to(device).eval()


def find(model: str | Path) -> Path:
    """The folder with config.json that a MODEL means; of a run, its newest sound checkpoint.

    Where there is a manifest, the files a reader of the model needs are held to it, and no others.
    """
    path = Path(model)
    if (path / "checkpoints").is_dir():
        newest = state.newest_sound(path, log.warning, READ)
        if newest is None:
            raise InvalidFile(f"the run {path} has no sound checkpoint yet")
        return newest
    if path.is_dir():
        if (path / commit.MANIFEST).is_file():
            commit.check(path, READ)
        return path
    if path.exists():
        raise InvalidFile(f"{path} is not a model folder")
    raise SettingError(
        f"there is no model {str(model)!r}: it is no local folder, run or preset ({', '.join(presets.names())})."
        + did_you_mean(str(model), presets.names())
    )


def read_config(model: str | Path) -> ModelConfig:
    """The shape of any MODEL, without its weights."""
    if not Path(model).exists() and str(model) in presets.names():
        return ModelConfig.model_validate(presets.shape(str(model)))
    return weights.read_config(find(model) / weights.CONFIG)


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype by its name. Raises SettingError for what is none a model can have."""
    known = {
        str(each).removeprefix("torch."): each for each in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    if isinstance(dtype, str) and dtype not in known:
        raise SettingError(f"dtype is {dtype!r}; it should be one of {', '.join(known)}")
    return known[dtype] if isinstance(dtype, str) else dtype
