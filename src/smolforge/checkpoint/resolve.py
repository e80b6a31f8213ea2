"""MODEL, the same everywhere: a folder of a model or an adapter, a run or one of its steps, a preset, a Hub id."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from smolforge import commit, presets
from smolforge.checkpoint import adapter, hub, nanotron, state, weights
from smolforge.config import ModelConfig
from smolforge.errors import InvalidFile, SettingError, did_you_mean
from smolforge.model import LanguageModel, build
from smolforge.own import admit
from smolforge.tokenizer import FILES, Tokenizer

log = logging.getLogger("smolforge")
READ = (weights.CONFIG, weights.WEIGHTS, *FILES)


def load(
    model: str | Path,
    dtype: str | torch.dtype = torch.float32,
    device: str = "cpu",
    random: bool = False,
    own: Sequence[str] = (),
) -> LanguageModel:
    """Any MODEL, with its tokenizer as `.tokenizer` (None where its folder has none).

    A preset has random weights, so it is refused unless `random` says that is meant; a model with classes of your own,
    unless `own` names them as module:Class, since a model's files never have code run. Raises SettingError
    for a name that is nothing, InvalidFile for a model that is broken, MissingResource where the Hub is out of reach.
    """
    admit(own)
    dtype = torch_dtype(dtype)
    if not Path(model).exists() and str(model) in presets.names():
        if not random:
            raise SettingError(f"{_about_preset(str(model))} (--random insists)")
        loaded = build(ModelConfig.model_validate(presets.shape(str(model))), dtype=dtype)
        return loaded.to(device).eval()
    folder = find(model)
    if adapter.is_adapter(folder):
        loaded = load(adapter.base_of(folder), dtype)
        adapter.apply(loaded, folder)
    elif nanotron.is_checkpoint(folder):
        loaded = nanotron.load(folder, dtype)
    else:
        loaded = weights.load(folder, dtype)
    if (folder / "tokenizer.json").is_file():
        loaded.tokenizer = Tokenizer.load(folder)
        if loaded.tokenizer.largest_id >= loaded.config.vocab_size:
            raise InvalidFile(
                f"the tokenizer of {folder} has ids up to {loaded.tokenizer.largest_id:,}, the model only "
                f"{loaded.config.vocab_size:,} of them; they do not belong together"
            )
    return loaded.to(device).eval()


def find(model: str | Path) -> Path:
    """The folder with config.json that a MODEL means; of a run, its newest sound checkpoint.

    What exists here comes before a preset, and that before the Hub, whose files are downloaded. Where there is
    a manifest, the files a reader of the model needs are held to it, and no others.
    """
    path = Path(model)
    if path.is_file() and path.name in (weights.WEIGHTS, weights.INDEX):
        path = path.parent
    if (path / "checkpoints").is_dir():
        newest = state.newest_sound(path, log.warning, READ)
        if newest is None:
            raise InvalidFile(f"the run {path} has no sound checkpoint yet")
        return newest
    if path.is_dir():
        if (path / commit.MANIFEST).is_file():
            commit.check(path, READ)
        hub.refuse_pickled(str(path), [file.name for file in path.iterdir()])
        return path
    if path.exists():
        raise InvalidFile(f"{path} is not a model folder")
    if _on_hub(model):
        return hub.fetch(str(model))
    if path.is_symlink():
        raise InvalidFile(f"{path} is a link to nothing")
    if str(model) in presets.names():
        raise SettingError(_about_preset(str(model)))
    raise SettingError(
        f"there is no model {str(model)!r}: it is no local folder, run or preset ({', '.join(presets.names())}), "
        f"and a model on the Hub is named org/name or org/name@revision.{did_you_mean(str(model), presets.names())}"
    )


def read_config(model: str | Path) -> ModelConfig:
    """The shape of any MODEL, without its weights."""
    if not Path(model).exists() and str(model) in presets.names():
        return ModelConfig.model_validate(presets.shape(str(model)))
    folder = hub.fetch(str(model), [weights.CONFIG]) if _on_hub(model) else find(model)
    if adapter.is_adapter(folder):
        return read_config(adapter.base_of(folder))
    if nanotron.is_checkpoint(folder):
        return nanotron.read_config(folder)
    return weights.read_config(folder / weights.CONFIG)


def pinned(model: str) -> str:
    """The name of a MODEL that means the same for ever: of one on the Hub, with the commit it has now."""
    if not _on_hub(model):
        return model
    return f"{hub.split_id(model)[0]}@{hub.fetch(model, [weights.CONFIG]).name}"


def tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a folder, a tokenizer.json, a run or a model on the Hub. Raises InvalidFile for none."""
    if _on_hub(name):
        return Tokenizer.load(hub.fetch(str(name), FILES))
    return Tokenizer.load(find(name) if (Path(name) / "checkpoints").is_dir() else name)


def _about_preset(name: str) -> str:
    published = presets.hub_id(name)
    instead = f"its published weights are {published}" if published else "train it first"
    return f"{name} is a shape with random weights and has nothing to say; {instead}"


def _on_hub(model: str | Path) -> bool:
    return not os.path.lexists(model) and str(model) not in presets.names() and hub.is_id(str(model))


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype by its name. Raises SettingError for what is none a model can have."""
    known = {
        str(each).removeprefix("torch."): each for each in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    if isinstance(dtype, str) and dtype not in known:
        raise SettingError(f"dtype is {dtype!r}; it should be one of {', '.join(known)}")
    return known[dtype] if isinstance(dtype, str) else dtype
