"""A model as llama.cpp has it, in one .gguf <-> a model with its tokenizer.

    blk.0.attn_q.weight  <->  model.layers.0.self_attn.q_proj.weight

Names and settings as convert_hf_to_gguf.py of llama.cpp writes them (conversion/base.py, llama.py, qwen.py).
Its llama rotates neighboring channels (0, 1), (2, 3) ... where Hugging Face's rotates halves (0, d/2), (1, d/2 + 1)
..., so the rows of each query and key head have another order there. Other architectures rotate halves too.
Reading is strict, as of a folder: every setting is understood, every tensor used, every parameter filled.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from smolforge.checkpoint import gguf, huggingface
from smolforge.checkpoint.families import from_hugging_face
from smolforge.checkpoint.gguf import rotary
from smolforge.config import ModelConfig
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.models.decoder import LanguageModel, empty_model, meta_model
from smolforge.models.family import GGUFNames, all_families, family_of
from smolforge.models.lora import merged_parameters
from smolforge.tokenizer import Tokenizer, gguf_tokenizer

SUFFIX = ".gguf"
EMBEDDING = "token_embd.weight"
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
"""llama.cpp's names of Llama's settings to ours, behind the architecture's."""
SAME_AS_HEAD_DIM = ("attention.value_length", "rope.dimension_count")


def is_gguf_file(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX and path.is_file()


def load(path: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a .gguf, on the CPU, its values as they come out of their blocks.

    Raises InvalidFileError, naming file and key, for anything missing, unknown or of another shape.
    """
    file = gguf.GGUFReader(path)
    config = config_from_gguf(file)
    check_tensors(file, config)
    model = empty_model(config, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(unpermute_rope(name, file[gguf_tensor_name(name, config)], config))
    return model


def read_config(path: Path) -> ModelConfig:
    return config_from_gguf(gguf.GGUFReader(path))


def read_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer, for which the first part of a model is enough; None where it has none."""
    metadata, tensors = gguf.read_header(gguf.first_part(path))
    embedding = tensors.get(EMBEDDING)
    return gguf_tokenizer.from_values(metadata, str(path), embedding.shape[0] if embedding else None)


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype that holds the file's embedding as it is; fp32 for what is quantised."""
    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16}
    return dtypes.get(gguf.GGUFReader(path).tensors[EMBEDDING].type.name, torch.float32)


def config_from_gguf(file: gguf.GGUFReader) -> ModelConfig:
    """Return the ModelConfig of a file, read as a config.json with the same settings."""
    values, source = file.metadata, str(file.path)
    prefix = f"{values.get('general.architecture')}."
    settings = {
        key.removeprefix(prefix): shortest_decimal(value) for key, value in values.items() if key.startswith(prefix)
    }
    model_type, config_keys = choose_family(values.get("general.architecture"), settings, source)
    content: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0}  # llama.cpp's, where a file says nothing
    content |= {field: settings.pop(key) for key, field in config_keys.items() if key in settings}
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None:
        raise InvalidFileError(f"{source} lacks {EMBEDDING}")
    content.setdefault("vocab_size", embedding.shape[0])
    for key in ("num_key_value_heads", "head_dim"):  # what follows from others, where a file says nothing
        content.setdefault(key, None)
    content |= {"model_type": model_type, "tie_word_embeddings": "output.weight" not in file.tensors}
    scaling = rotary.pop_scaling(settings, source)
    config = from_hugging_face(content, source).model_copy(update={"rope_scaling": scaling})
    check_fixed_settings(settings, config, source)
    if rotary.FREQUENCIES not in file.tensors:
        return config
    scaling = rotary.scaling_of_divisors(file[rotary.FREQUENCIES], config, source)
    return config.model_copy(update={"rope_scaling": scaling})


def choose_family(architecture: Any, settings: dict[str, Any], source: str) -> tuple[str, dict[str, str]]:
    """Return the family of an architecture that has all of a file's settings, and the ModelConfig fields of its keys.

    Settings of another family of the architecture that are 0 are removed: a file without experts may say so.
    Raises InvalidFileError for an architecture that no family has.
    """
    known = {name: family.gguf for name, family in all_families() if family.gguf}
    candidates = {name: names.settings for name, names in known.items() if names.architecture == architecture}
    if not candidates:
        read = ", ".join(sorted({names.architecture for names in known.values()}))
        raise InvalidFileError(
            f"{source} holds a model of llama.cpp's kind {str(architecture)[:40]!r}; {read} are read"
        )
    for key in {key for keys in candidates.values() for key in keys if not settings.get(key)}:
        settings.pop(key, None)
    model_type = max(candidates, key=lambda name: (len(candidates[name].keys() & settings), -len(candidates[name])))
    return model_type, {**CONFIG_KEYS, **candidates[model_type]}


def check_fixed_settings(settings: Mapping[str, Any], config: ModelConfig, source: str) -> None:
    """Check that settings without a field of ours have the one value that is implemented."""
    for key, value in settings.items():
        if key not in SAME_AS_HEAD_DIM:
            raise InvalidFileError(f"{source} has a setting {key!r} that is not known here, so the model might differ")
        if value != config.head_dim:
            raise InvalidFileError(
                f"{source}: {key} is {str(value)[:40]}, which is not implemented; only {config.head_dim} is"
            )


def shortest_decimal(value: Any) -> Any:
    """Return a float32 as its shortest decimal: 1e-05, and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def check_tensors(file: gguf.GGUFReader, config: ModelConfig) -> None:
    """Hold the tensors of a file to those of the model, before anything is allocated."""
    tensors, path = file.tensors, file.path
    if config.num_hidden_layers > len(tensors):  # before so many names are made
        raise InvalidFileError(f"{path} has {len(tensors):,} tensors, too few for {config.num_hidden_layers:,} layers")
    weights = meta_model(config).named_parameters()
    expected = {gguf_tensor_name(name, config): tuple(weight.shape) for name, weight in weights}
    if config.rope_scaling.rope_type == "llama3":
        expected[rotary.FREQUENCIES] = (config.resolved_head_dim // 2,)
    huggingface.check_shapes(path, {name: stored.shape for name, stored in tensors.items()}, expected)


def gguf_metadata(config: ModelConfig) -> dict[str, gguf.MetadataValue]:
    """Return the metadata of a .gguf for a ModelConfig.

    Raises ConfigError for a family that llama.cpp does not have.
    """
    names = family_of(config).gguf
    if config.custom_classes or names is None:
        unsupported = ", ".join(config.custom_classes.values()) or f"this kind of {config.model_type} model"
        supported = ", ".join(name for name, family in all_families() if family.gguf)
        raise ConfigError(f"llama.cpp does not have {unsupported}; --to gguf takes {supported}")
    if config.rope_scaling.rope_type == "llama3" and names.architecture != "llama":
        raise ConfigError(
            f"llama.cpp has no llama3 rotary scaling in its {names.architecture} models; --to transformers has it"
        )
    fields, keys = config.family_fields(), {**CONFIG_KEYS, **names.settings}
    settings: dict[str, Any] = {key: config.__dict__[field] for key, field in keys.items() if field in fields}
    settings |= dict.fromkeys(SAME_AS_HEAD_DIM, config.resolved_head_dim) | rotary.scaling_settings(config.rope_scaling)
    return {f"{names.architecture}.{key}": value for key, value in settings.items()}


def gguf_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Return every tensor of a model by llama.cpp's name, LoRA merged; a tied head is skipped there too."""
    config = model.config
    has_divisors = config.rope_scaling.rope_type == "llama3"
    return {
        gguf_tensor_name(name, config): permute_rope(name, weight.detach(), config)
        for name, weight in merged_parameters(model)
    } | ({rotary.FREQUENCIES: rotary.frequency_divisors(config)} if has_divisors else {})


def gguf_tensor_name(name: str, config: ModelConfig) -> str:
    """Return llama.cpp's name of a parameter."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    module, kind = (layer[2] if layer else name).removesuffix(".weight"), "weight"
    if module.endswith(".bias"):
        module, kind = module.removesuffix(".bias"), "bias"
    return f"{f'blk.{layer[1]}.' if layer else ''}{names_of(config).modules[module]}.{kind}"


def names_of(config: ModelConfig) -> GGUFNames:
    """Return llama.cpp's names of a family that it has."""
    names = family_of(config).gguf
    assert names is not None, "gguf_metadata and choose_family accept no other family"
    return names


def permute_rope(name: str, weight: Shaped[Tensor, "..."], config: ModelConfig) -> Shaped[Tensor, "..."]:
    """Return a parameter as a .gguf has it: in each query and key head, channel d/2 + i comes after channel i."""
    return (
        weight if keeps_row_order(name, config) else swap_rows_in_heads(weight, (-1, 2, config.resolved_head_dim // 2))
    )


def unpermute_rope(name: str, weight: Float[Tensor, "..."], config: ModelConfig) -> Float[Tensor, "..."]:
    """Undo `permute_rope`."""
    return (
        weight if keeps_row_order(name, config) else swap_rows_in_heads(weight, (-1, config.resolved_head_dim // 2, 2))
    )


def keeps_row_order(name: str, config: ModelConfig) -> bool:
    return not names_of(config).interleaved or not name.endswith(("q_proj.weight", "k_proj.weight"))


def swap_rows_in_heads(weight: Shaped[Tensor, "r c"], sizes: tuple[int, int, int]) -> Shaped[Tensor, "r c"]:
    return weight.unflatten(0, sizes).transpose(1, 2).reshape(weight.shape)
