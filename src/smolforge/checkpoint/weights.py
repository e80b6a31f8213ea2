"""A Hugging Face model folder <-> a model.

Loading is strict: every setting in config.json is understood or known to change nothing, every tensor of
the file is used, every parameter is filled.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from smolforge.config import ModelConfig
from smolforge.errors import InvalidFile
from smolforge.model import LanguageModel, allocate
from smolforge.tokenizer import Tokenizer

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"

FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "rope_interleaved": False,
    "pretraining_tp": 1,
}
"""Settings of Llama that this model has at one value only; another is refused by name."""

LLAMA: dict[str, Any] = {
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
"""What a config.json that leaves these out means: the defaults of Transformers' LlamaConfig."""

NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

INERT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    }
)
"""Keys that say nothing about what the model computes."""


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a folder, on the CPU.

    Raises InvalidFile, naming file and key, for anything missing, unknown or of another shape.
    """
    config = read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise InvalidFile(f"{folder} has no {WEIGHTS}")
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_names(path, found, config)
            model = allocate(config, dtype)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(file.get_tensor(name))
            if config.tie_word_embeddings and "lm_head.weight" in found:
                check_tie(path, file.get_tensor("lm_head.weight"), file.get_tensor("model.embed_tokens.weight"))
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from None
    return model


def check_names(path: Path, found: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Hold the tensors of a file to those of the model, before anything is allocated."""
    with torch.device("meta"):
        wanted = {name: tuple(weight.shape) for name, weight in LanguageModel(config).named_parameters()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys() - optional)
    if missing:
        raise InvalidFile(f"{path} lacks {len(missing)} of {len(wanted)} tensors, the first {missing[0]}")
    if unknown:
        raise InvalidFile(f"{path} has {len(unknown)} tensors this model has no place for, the first {unknown[0]}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InvalidFile(f"{path}: {name} has shape {found[name]} where config.json makes it {shape}")


def check_tie(path: Path, head: torch.Tensor, embedding: torch.Tensor) -> None:
    """A file may repeat a tied head, but not contradict it."""
    if not torch.equal(head, embedding):
        raise InvalidFile(
            f"{path} has an lm_head.weight that differs from the embedding, but config.json ties them; "
            "set tie_word_embeddings to false there if the head is its own"
        )


def save(model: LanguageModel, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that Transformers, and `load`, read."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    special = {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
    }
    _write_json(folder / CONFIG, to_hugging_face(model.config) | special | {"torch_dtype": dtype})
    _write_json(folder / GENERATION, special)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer:
        tokenizer.save(folder)


def read_config(path: Path) -> ModelConfig:
    """Raises InvalidFile where config.json is missing, broken, or asks for what is not implemented."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidFile(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except (ValueError, OSError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InvalidFile(f"{path} is not a JSON object")
    return from_hugging_face(content, str(path))


def from_hugging_face(content: dict[str, Any], path: str = CONFIG) -> ModelConfig:
    """The shape a config.json describes; `rope_theta` is read in its old and its new place."""
    content = dict(content)
    rope = content.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
        raise InvalidFile(f"{path}: rope_parameters {rope} is a kind of rotary scaling that is not implemented")
    if "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
    lacking = [key for key in NEEDED if key not in content]
    if lacking:
        raise InvalidFile(f"{path} does not say {lacking[0]}")
    settings = dict(LLAMA)
    for key, value in content.items():
        if key in FIXED:
            if value != FIXED[key]:
                raise InvalidFile(f"{path}: {key} is {value!r}, which is not implemented; only {FIXED[key]!r} is")
        elif key in ModelConfig.model_fields:
            settings[key] = value
        elif key not in INERT:
            raise InvalidFile(f"{path} has a setting {key!r} that is not known here, so the model might differ")
    if settings.get("num_key_value_heads") is None:  # older Llama configs: every head has its own
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
    try:
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidFile(f"{path}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """config.json as Transformers 4 and 5 read it."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {"architectures": ["LlamaForCausalLM"]} | config.model_dump() | FIXED | {"rope_parameters": rope}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
