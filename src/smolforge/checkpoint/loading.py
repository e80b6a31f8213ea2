"""MODEL, the same everywhere: a folder of a model or an adapter, a .gguf, a run or one of its steps, preset, Hub id."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from smolforge import atomic
from smolforge.checkpoint import hub, huggingface, nanotron, peft_adapter, quantization, training_state
from smolforge.checkpoint.gguf import llama
from smolforge.config import ModelConfig, presets
from smolforge.config.custom_classes import admit
from smolforge.errors import InvalidFile, SettingError, did_you_mean
from smolforge.models.decoder import LanguageModel, build, outline
from smolforge.models.quantized import Scheme
from smolforge.tokenizer import FILES, Tokenizer

log = logging.getLogger("smolforge")
READ = (huggingface.CONFIG, huggingface.WEIGHTS, *FILES)


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
    if peft_adapter.is_adapter(folder):
        loaded = load(peft_adapter.base_of(folder), dtype)
        peft_adapter.apply(loaded, folder)
    else:
        loaded = weights_of(folder, dtype)
    if (its_own := tokenizer_of(folder)) is not None:
        loaded.tokenizer = its_own
        if loaded.tokenizer.largest_id >= loaded.config.vocab_size:
            raise InvalidFile(
                f"the tokenizer of {folder} has ids up to {loaded.tokenizer.largest_id:,}, the model only "
                f"{loaded.config.vocab_size:,} of them; they do not belong together"
            )
    return loaded.to(device).eval()


def weights_of(folder: Path, dtype: torch.dtype) -> LanguageModel:
    """The model in what `find` found, which is no adapter; without its tokenizer."""
    if llama.is_file(folder):
        return llama.load(folder, dtype)
    return nanotron.load(folder, dtype) if nanotron.is_checkpoint(folder) else huggingface.load(folder, dtype)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer in what `find` found; None where there is none."""
    if llama.is_file(folder):
        return llama.read_tokenizer(folder)
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def find(model: str | Path) -> Path:
    """The folder with config.json that a MODEL means, or its .gguf; of a run, its newest sound checkpoint.

    What exists here comes before a preset, and that before the Hub, whose files are downloaded. Where there is
    a manifest, the files a reader of the model needs are held to it, and no others.
    """
    path = Path(model)
    if path.is_file() and path.name in (huggingface.WEIGHTS, huggingface.INDEX):
        path = path.parent
    if llama.is_file(path):
        return path
    if (path / "checkpoints").is_dir():
        newest = training_state.newest_sound(path, log.warning, READ)
        if newest is None:
            raise InvalidFile(f"the run {path} has no sound checkpoint yet")
        return newest
    if path.is_dir():
        if (path / atomic.MANIFEST).is_file():
            atomic.check(path, READ)
        hub.refuse_pickled(str(path), [file.name for file in path.iterdir()])
        return path
    if path.exists():
        raise InvalidFile(f"{path} is neither a model folder nor a .gguf")
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
    folder = hub.fetch(str(model), [huggingface.CONFIG]) if _on_hub(model) else find(model)
    if peft_adapter.is_adapter(folder):
        return read_config(peft_adapter.base_of(folder))
    if llama.is_file(folder):
        return llama.read_config(folder)
    if nanotron.is_checkpoint(folder):
        return nanotron.read_config(folder)
    return huggingface.read_config(folder / huggingface.CONFIG)


def is_derived(folder: Path) -> bool:
    """Whether a MODEL's folder has to be worked on before it is one of Hugging Face's: an adapter, or nanotron's."""
    return peft_adapter.is_adapter(folder) or nanotron.is_checkpoint(folder)


def plain(folder: Path) -> Path:
    """The folder of the model that an adapter changes; any other folder itself."""
    return plain(find(peft_adapter.base_of(folder))) if peft_adapter.is_adapter(folder) else folder


def fingerprint(model: str | Path) -> str:
    """What identifies the weights of a MODEL."""
    digest = hashlib.sha256()
    for path in weight_files(find(model)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that decide a model's weights; of an adapter also those of its base."""
    if peft_adapter.is_adapter(folder):
        return [
            *weight_files(find(peft_adapter.base_of(folder))),
            folder / peft_adapter.CONFIG,
            folder / peft_adapter.WEIGHTS,
        ]
    if llama.is_file(folder):
        return [folder]
    return nanotron.files(folder) if nanotron.is_checkpoint(folder) else huggingface.files(folder)


def read_scheme(model: str | Path) -> Scheme | None:
    """How the matrices of a MODEL that is here are kept as integers; None where they are not."""
    folder = find(model) if Path(model).exists() else None
    if folder is None or is_derived(folder) or llama.is_file(folder):
        return None
    return huggingface.read_scheme(folder)


def weight_bytes(config: ModelConfig, scheme: Scheme | None, dtype: torch.dtype = torch.float32) -> int:
    """What the weights of a shape take, everything that is no integer nor its scale in this dtype."""
    model = huggingface.laid(outline(config), scheme)
    kept = quantization.dtypes(model)
    return sum(each.numel() * kept.get(name, dtype).itemsize for name, each in model.named_parameters())


def pinned(model: str) -> str:
    """The name of a MODEL that means the same for ever: of one on the Hub, with the commit it has now."""
    if not _on_hub(model):
        return model
    return f"{hub.split_id(model)[0]}@{hub.fetch(model, [huggingface.CONFIG]).name}"


def tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a folder, tokenizer.json, .gguf, run or a model on the Hub. Raises InvalidFile for none."""
    if _on_hub(name):
        return Tokenizer.load(hub.fetch(str(name), FILES))
    path = Path(name)
    if not path.is_dir() and not llama.is_file(path):
        return Tokenizer.load(name)
    found = with_tokenizer(find(name))
    inside = tokenizer_of(found)
    if inside is None:
        raise InvalidFile(f"{found} has no tokenizer" + (" in it" if found.is_file() else ".json"))
    return inside


def with_tokenizer(found: Path) -> Path:
    """Where a model's tokenizer is, in what `find` found: of an adapter that has none, in its base."""
    if peft_adapter.is_adapter(found) and not (found / "tokenizer.json").is_file():
        return with_tokenizer(find(peft_adapter.base_of(found)))
    return found


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
