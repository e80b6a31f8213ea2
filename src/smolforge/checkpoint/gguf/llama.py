"""A model as llama.cpp has it, in one .gguf <-> a model with its tokenizer.

    blk.0.attn_q.weight  <->  model.layers.0.self_attn.q_proj.weight

Names and settings as convert_hf_to_gguf.py of llama.cpp writes them (conversion/base.py, llama.py, qwen.py).
Its llama rotates neighbouring channels (0, 1), (2, 3) ... where Hugging Face's rotates halves (0, d/2), (1, d/2 + 1)
..., so the rows of each query and key head stand in another order there; its qwen3 rotates halves too.
Reading is strict, as of a folder: every setting is understood, every tensor used, every parameter filled.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smolforge.checkpoint import gguf
from smolforge.checkpoint.families import from_hugging_face
from smolforge.config import ModelConfig
from smolforge.errors import InvalidFile, SettingError
from smolforge.models.decoder import LanguageModel, allocate, outline
from smolforge.models.lora import folded
from smolforge.tokenizer import Tokenizer, gguf_tokenizer

SUFFIX = ".gguf"
EMBEDDING = "token_embd.weight"
ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen3": "qwen3"}
"""Our families to llama.cpp's. Its starcoder2 has biases that ours has not."""
SETTINGS = {
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
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
"""llama.cpp's names to ours, behind the architecture's."""
SAME_AS_HEAD_DIM = ("attention.value_length", "rope.dimension_count")
MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def is_file(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX and path.is_file()


def load(path: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a .gguf, on the CPU, its values as they come out of their blocks.

    Raises InvalidFile, naming file and key, for anything missing, unknown or of another shape.
    """
    file = gguf.File(path)
    config = config_of(file)
    check_tensors(file, config)
    model = allocate(config, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(unrotated(name, file[name_of(name)], config))
    return model


def read_config(path: Path) -> ModelConfig:
    return config_of(gguf.File(path))


def read_tokenizer(path: Path) -> Tokenizer | None:
    """None where the file has none."""
    file = gguf.File(path)
    embedding = file.tensors.get(EMBEDDING)
    return gguf_tokenizer.from_values(file.values, str(path), embedding.shape[0] if embedding else None)


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype that holds the file's embedding as it is; fp32 for what is quantised."""
    found = {"f16": torch.float16, "bf16": torch.bfloat16}
    return found.get(gguf.File(path).tensors[EMBEDDING].type.name, torch.float32)


def config_of(file: gguf.File) -> ModelConfig:
    """The shape a file describes, read as a config.json that says the same."""
    values, where = file.values, str(file.path)
    architecture = values.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        read = " and ".join(sorted(set(ARCHITECTURES.values())))
        raise InvalidFile(f"{where} holds a model of llama.cpp's kind {str(architecture)[:40]!r}; {read} are read")
    prefix = f"{architecture}."
    said = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    content: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0}  # llama.cpp's, where a file says nothing
    known = {key: ours for key, ours in SETTINGS.items() if architecture == "llama" or "expert" not in key}
    content |= {ours: shortest(said.pop(theirs)) for theirs, ours in known.items() if theirs in said}
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None:
        raise InvalidFile(f"{where} lacks {EMBEDDING}")
    content.setdefault("vocab_size", embedding.shape[0])
    for key in ("num_key_value_heads", "head_dim"):  # what follows from others, where a file says nothing
        content.setdefault(key, None)
    content |= {"model_type": architecture, "tie_word_embeddings": "output.weight" not in file.tensors}
    if content.get("num_local_experts"):
        content["model_type"] = "mixtral"
    else:
        content = {key: value for key, value in content.items() if "experts" not in key}
    config = from_hugging_face(content, where)
    check_rest(said, config, where)
    return config


def check_rest(said: Mapping[str, Any], config: ModelConfig, where: str) -> None:
    """Hold the settings that are none of ours to the one value that is implemented."""
    fixed = dict.fromkeys(SAME_AS_HEAD_DIM, config.head_size) | {"rope.scaling.type": "none", "rope.scale_linear": 1.0}
    for key, value in said.items():
        if key not in fixed:
            raise InvalidFile(f"{where} has a setting {key!r} that is not known here, so the model might differ")
        if value != fixed[key]:
            raise InvalidFile(f"{where}: {key} is {str(value)[:40]}, which is not implemented; only {fixed[key]} is")


def shortest(value: Any) -> Any:
    """A float32 as the decimal that was meant: 1e-05, and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def check_tensors(file: gguf.File, config: ModelConfig) -> None:
    """Hold the tensors of a file to those of the model, before anything is allocated."""
    found, where = file.tensors, file.path
    if config.num_hidden_layers > len(found):  # before so many names are made
        raise InvalidFile(f"{where} has {len(found):,} tensors, too few for {config.num_hidden_layers:,} layers")
    wanted = {name_of(name): tuple(weight.shape) for name, weight in outline(config).named_parameters()}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise InvalidFile(f"{where} lacks {len(missing)} of {len(wanted)} tensors, the first {missing[0]}")
    if unknown:
        raise InvalidFile(f"{where} has {len(unknown)} tensors this model has no place for, the first {unknown[0]!r}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise InvalidFile(f"{where}: {name} has shape {found[name].shape} where its settings make it {shape}")


def settings_of(config: ModelConfig) -> dict[str, gguf.Value]:
    """What a .gguf says of a shape. Raises SettingError for a family that llama.cpp does not have."""
    if config.own_classes or config.model_type not in ARCHITECTURES:
        what = ", ".join(config.own_classes.values()) or f"a {config.model_type} model without biases"
        raise SettingError(f"llama.cpp does not have {what}; --to gguf takes {', '.join(ARCHITECTURES)}")
    prefix, fields = ARCHITECTURES[config.model_type], config.own_fields()
    said: dict[str, Any] = {key: config.__dict__[ours] for key, ours in SETTINGS.items() if ours in fields}
    said |= dict.fromkeys(SAME_AS_HEAD_DIM, config.head_size)
    return {f"{prefix}.{key}": value for key, value in said.items()}


def tensors_of(model: LanguageModel) -> dict[str, Tensor]:
    """Every tensor of a model by llama.cpp's name, low-rank updates added; a tied head is left out there too."""
    return {name_of(name): rotated(name, weight.detach(), model.config) for name, weight in folded(model)}


def name_of(name: str) -> str:
    """llama.cpp's name of a parameter."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    module = (layer[2] if layer else name).removesuffix(".weight")
    return f"{f'blk.{layer[1]}.' if layer else ''}{MODULES[module]}.weight"


def rotated(name: str, weight: Float[Tensor, "..."], config: ModelConfig) -> Float[Tensor, "..."]:
    """A parameter as it stands in a .gguf: of each query and key head, channel d/2 + i behind channel i."""
    return weight if unmoved(name, config) else by_heads(weight, (-1, 2, config.head_size // 2))


def unrotated(name: str, weight: Float[Tensor, "..."], config: ModelConfig) -> Float[Tensor, "..."]:
    """The way back."""
    return weight if unmoved(name, config) else by_heads(weight, (-1, config.head_size // 2, 2))


def unmoved(name: str, config: ModelConfig) -> bool:
    return ARCHITECTURES[config.model_type] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight"))


def by_heads(weight: Float[Tensor, "r c"], sizes: tuple[int, int, int]) -> Float[Tensor, "r c"]:
    return weight.unflatten(0, sizes).transpose(1, 2).reshape(weight.shape)
