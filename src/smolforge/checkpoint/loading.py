"""MODEL, the same everywhere: a folder of a model or an adapter, a .gguf, a run or one of its steps, preset, Hub id."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from smolforge import atomic
from smolforge.checkpoint import gguf, hub, huggingface, nanotron, peft_adapter, quantization, training_state
from smolforge.checkpoint.gguf import llama
from smolforge.config import ModelConfig, presets
from smolforge.config.custom_classes import import_classes
from smolforge.device import check_dtype
from smolforge.errors import ConfigError, InvalidFileError, did_you_mean
from smolforge.models.decoder import LanguageModel, build, meta_model
from smolforge.models.quantized import QuantizationScheme
from smolforge.tokenizer import FILES, Tokenizer

log = logging.getLogger("smolforge")
MODEL_FILES = (huggingface.CONFIG, huggingface.GENERATION, huggingface.WEIGHTS, *FILES)


def load(
    model: str | Path,
    dtype: str | torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    random: bool = False,
    own: Sequence[str] = (),
) -> LanguageModel:
    """Any MODEL, with its tokenizer as `.tokenizer` (None where its folder has none).

    A preset has random weights, so it is refused unless `random` says that is meant; a model with classes of your own,
    unless `own` names them as module:Class, since a model's files never have code run. Raises ConfigError
    for an unknown name, InvalidFileError for a corrupted model, MissingResourceError where the Hub cannot be reached.
    """
    import_classes(own)
    dtype = torch_dtype(dtype)
    check_dtype(dtype, torch.device(device))
    if not Path(model).exists() and str(model) in presets.names():
        if not random:
            raise ConfigError(f"{_preset_message(str(model))} (--random insists)")
        loaded = build(ModelConfig.model_validate(presets.shape(str(model))), dtype=dtype)
        return loaded.to(device).eval()
    folder = resolve_model_path(model)
    if peft_adapter.is_adapter(folder):
        loaded = load(peft_adapter.base_model_of(folder), dtype)
        peft_adapter.merge_adapter(loaded, folder)
    else:
        loaded = load_weights(folder, dtype)
    if (own_tokenizer := tokenizer_of(folder)) is not None:
        base_tokenizer = loaded.tokenizer
        loaded.tokenizer = own_tokenizer.with_eos_ids(base_tokenizer.eos_ids if base_tokenizer else ())
        if loaded.tokenizer.largest_id >= loaded.config.vocab_size:
            raise InvalidFileError(
                f"the tokenizer of {folder} has ids up to {loaded.tokenizer.largest_id:,}, the model only "
                f"{loaded.config.vocab_size:,} of them; they do not belong together"
            )
    return loaded.to(device).eval()


def load_weights(folder: Path, dtype: torch.dtype) -> LanguageModel:
    """Load the model at a path of `resolve_model_path` that is no adapter; without its tokenizer."""
    if llama.is_gguf_file(folder):
        return llama.load(folder, dtype)
    return nanotron.load(folder, dtype) if nanotron.is_checkpoint(folder) else huggingface.load(folder, dtype)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """Load the tokenizer at a path of `resolve_model_path`, with all ids that end an answer; None where it has none."""
    if llama.is_gguf_file(folder):
        return llama.read_tokenizer(folder)
    if not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(folder).with_eos_ids(huggingface.read_eos_ids(folder))


def resolve_model_path(model: str | Path) -> Path:
    """Return the folder with config.json that a MODEL means, or its .gguf; of a run, its latest valid checkpoint.

    What exists here comes before a preset, and that before the Hub, whose files are downloaded. Where there is
    a manifest, the files a reader of the model needs are held to it, and no others.
    """
    path = Path(model)
    if path.is_file() and path.name in (huggingface.WEIGHTS, huggingface.INDEX):
        path = path.parent
    if llama.is_gguf_file(path):
        return path
    if (path / "checkpoints").is_dir():
        newest = training_state.latest_valid(path, log.warning, MODEL_FILES)
        if newest is None:
            raise InvalidFileError(f"the run {path} has no sound checkpoint yet")
        return newest
    if path.is_dir():
        if (path / atomic.MANIFEST).is_file():
            atomic.check_manifest(path, MODEL_FILES)
        hub.refuse_pickled(str(path), [file.name for file in path.iterdir()])
        return path
    if path.exists():
        raise InvalidFileError(f"{path} is neither a model folder nor a .gguf")
    if _is_on_hub(model):
        return hub.fetch(str(model))
    if path.is_symlink():
        raise InvalidFileError(f"{path} is a link to nothing")
    if str(model) in presets.names():
        raise ConfigError(_preset_message(str(model)))
    raise ConfigError(
        f"there is no model {str(model)!r}: it is no local folder, run or preset ({', '.join(presets.names())}), "
        f"and a model on the Hub is named org/name or org/name@revision.{did_you_mean(str(model), presets.names())}"
    )


def read_config(model: str | Path) -> ModelConfig:
    """The shape of any MODEL, without its weights."""
    if not Path(model).exists() and str(model) in presets.names():
        return ModelConfig.model_validate(presets.shape(str(model)))
    folder = hub.fetch(str(model), [huggingface.CONFIG]) if _is_on_hub(model) else resolve_model_path(model)
    if peft_adapter.is_adapter(folder):
        return read_config(peft_adapter.base_model_of(folder))
    if llama.is_gguf_file(folder):
        return llama.read_config(folder)
    if nanotron.is_checkpoint(folder):
        return nanotron.read_config(folder)
    return huggingface.read_config(folder / huggingface.CONFIG)


def needs_conversion(folder: Path) -> bool:
    """Whether a MODEL's folder must be converted to be a Hugging Face folder: an adapter, or nanotron's."""
    return peft_adapter.is_adapter(folder) or nanotron.is_checkpoint(folder)


def base_folder(folder: Path) -> Path:
    """Return the folder of an adapter's base model; any other folder itself."""
    return (
        base_folder(resolve_model_path(peft_adapter.base_model_of(folder)))
        if peft_adapter.is_adapter(folder)
        else folder
    )


def fingerprint(model: str | Path) -> str:
    """What identifies the weights of a MODEL."""
    digest = hashlib.sha256()
    for path in weight_files(resolve_model_path(model)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that decide a model's weights; of an adapter also those of its base."""
    if peft_adapter.is_adapter(folder):
        return [
            *weight_files(resolve_model_path(peft_adapter.base_model_of(folder))),
            folder / peft_adapter.CONFIG,
            folder / peft_adapter.WEIGHTS,
        ]
    if llama.is_gguf_file(folder):
        return gguf.GGUFReader(folder).paths
    return nanotron.weight_files(folder) if nanotron.is_checkpoint(folder) else huggingface.weight_files(folder)


def read_scheme(model: str | Path) -> QuantizationScheme | None:
    """Return the quantization scheme of a local MODEL; None where it is not quantized."""
    folder = resolve_model_path(model) if Path(model).exists() else None
    if folder is None or needs_conversion(folder) or llama.is_gguf_file(folder):
        return None
    return huggingface.read_scheme(folder)


def weight_bytes(config: ModelConfig, scheme: QuantizationScheme | None, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of a model's weights; what is neither integers nor their scales is counted in this dtype."""
    model = huggingface.with_quantized_layers(meta_model(config), scheme)
    quantized_dtypes = quantization.quantized_dtypes(model)
    return sum(weight.numel() * quantized_dtypes.get(name, dtype).itemsize for name, weight in model.named_parameters())


def pin_revision(model: str) -> str:
    """Return the name of a MODEL with its present commit, where it is on the Hub; any other name as it is."""
    if not _is_on_hub(model):
        return model
    return f"{hub.split_hub_id(model)[0]}@{hub.fetch(model, [huggingface.CONFIG]).name}"


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a folder, tokenizer.json, .gguf, run or a model on the Hub.

    Raises InvalidFileError for none.
    """
    if _is_on_hub(name):
        return Tokenizer.load(hub.fetch(str(name), FILES))
    path = Path(name)
    if not path.is_dir() and not llama.is_gguf_file(path):
        return Tokenizer.load(name)
    folder = tokenizer_folder(resolve_model_path(name))
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise InvalidFileError(f"{folder} has no tokenizer" + (" in it" if folder.is_file() else ".json"))
    return tokenizer


def tokenizer_folder(folder: Path) -> Path:
    """Return the path that has a model's tokenizer:
    the base model of an adapter that has none, else the path itself.
    """
    if peft_adapter.is_adapter(folder) and not (folder / "tokenizer.json").is_file():
        return tokenizer_folder(resolve_model_path(peft_adapter.base_model_of(folder)))
    return folder


def _preset_message(name: str) -> str:
    hub_id = presets.hub_id(name)
    hint = f"its published weights are {hub_id}" if hub_id else "train it first"
    return f"{name} is a shape with random weights and has nothing to say; {hint}"


def _is_on_hub(model: str | Path) -> bool:
    return not os.path.lexists(model) and str(model) not in presets.names() and hub.is_hub_id(str(model))


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a torch dtype by its name. Raises ConfigError for one that a model cannot have."""
    by_name = {
        str(torch_type).removeprefix("torch."): torch_type
        for torch_type in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    if isinstance(dtype, str) and dtype not in by_name:
        raise ConfigError(f"dtype is {dtype!r}; it should be one of {', '.join(by_name)}")
    return by_name[dtype] if isinstance(dtype, str) else dtype
