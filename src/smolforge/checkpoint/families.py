"""config.json <-> ModelConfig, and the names of tensors on disk, for each of Transformers' classes we build.

Reading is strict: every key is a setting of ours, or has the one value we implement, or is known to change
nothing. Whatever else a file asks for is refused by name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smolforge.checkpoint import quantization
from smolforge.config import ModelConfig, custom_classes
from smolforge.config.model import PARTS
from smolforge.errors import InvalidFile

OWN = "smolforge"
"""model_type of a model with classes of a person's own, which Transformers must not take for one it knows."""
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype eos_token_id finetuning_task
    gradient_checkpointing id2label is_decoder is_llama_config label2id max_window_layers output_attentions
    output_hidden_states output_router_logits pad_token_id prefix pretraining_tp problem_type pruned_heads return_dict
    sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache

    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)
"""Keys that say nothing about what the model computes; the second group is of how text is drawn from it."""

LARGEST_JSON = 4 << 20
"""Bytes; the largest config.json and index there are take a tenth of it."""


@dataclass(frozen=True)
class Family:
    """How one class of Transformers writes its config.json."""

    architecture: str
    defaults: dict[str, Any]
    """What a file that leaves these out means: the class's own defaults."""
    fixed: dict[str, Any]
    """Settings implemented at one value only."""


_COMMON = {"attention_dropout": 0.0}
_NEVER_WRITTEN = {"is_encoder_decoder": False, "partial_rotary_factor": 1.0}
_UNLESS_SAID = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _UNLESS_SAID | {"max_position_embeddings": 2048},
        _COMMON | {"attention_bias": False, "mlp_bias": False, "rope_interleaved": False},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _UNLESS_SAID | {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        _COMMON | {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _UNLESS_SAID
        | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072},
        _COMMON | {"sliding_window": None, "router_jitter_noise": 0.0},
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        {name: value for name, value in _UNLESS_SAID.items() if name != "rms_norm_eps"}
        | {
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.018042,
            "tie_word_embeddings": True,
        },
        _COMMON | {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0, "use_bias": False},
    ),
}


def read_config(path: Path) -> ModelConfig:
    """Raises InvalidFile where config.json is missing, broken, or asks for what is not implemented."""
    return from_hugging_face(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises InvalidFile where it is missing or none."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
            raise InvalidFile(f"{path} is no regular file")
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise InvalidFile(f"{path} has {size:,} bytes, more than the {LARGEST_JSON:,} of any real one")
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidFile(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InvalidFile(f"{path} is not a JSON object")
    return content


def from_hugging_face(content: dict[str, Any], path: str = "config.json") -> ModelConfig:
    """The shape a config.json describes; `rope_theta` is read in its old and its new place."""
    content = dict(content)
    quantization.take(content, path)
    if "auto_map" in content:
        raise InvalidFile(f"{path} asks for code of its own (auto_map), which is never run; only {_known()} load")
    classes = _take_own_classes(content, path)
    family = FAMILIES.get(str(content.get("model_type", "llama")))
    if family is None:
        raise InvalidFile(f"{path}: model_type is {content['model_type']!r}, which is not implemented; {_known()} are")
    _take_rope_theta(content, path)
    _check_attention_kinds(content, path)
    lacking = [key for key in NEEDED if key not in content]
    if lacking:
        raise InvalidFile(f"{path} does not say {lacking[0]}")
    settings, fixed = dict(family.defaults), family.fixed | _NEVER_WRITTEN
    for key, value in content.items():
        if key in fixed:
            if value != fixed[key]:
                raise InvalidFile(f"{path}: {key} is {value!r}, which is not implemented; only {fixed[key]!r} is")
        elif key in ModelConfig.model_fields and key not in PARTS:
            settings[key] = value
        elif key not in INERT and value is not None:
            raise InvalidFile(f"{path} has a setting {key!r} that is not known here, so the model might differ")
    if settings["num_key_value_heads"] is None:  # every head has its own
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    try:
        return ModelConfig.model_validate(settings | classes, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidFile(f"{path}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None


def _take_own_classes(content: dict[str, Any], path: str) -> dict[str, str]:
    """What stands in the place of which part, where a person has admitted it; the rest is then one of our families."""
    if content.get("model_type") != OWN:
        return {}
    said = content.pop(OWN, None)
    if not isinstance(said, dict) or not {"model_type"} < said.keys() <= {"model_type", *PARTS}:
        raise InvalidFile(f"{path}: model_type is {OWN}, but its table {OWN} does not say of what classes")
    content["model_type"] = said.pop("model_type")
    for part, name in said.items():
        custom_classes.refuse_unless_admitted(f"model.{part}", str(name), f"{path}: ")
    return said


def _known() -> str:
    return ", ".join(FAMILIES)


def _take_rope_theta(content: dict[str, Any], path: str) -> None:
    """Both places that may ask for another rotation, of which the plain one is taken."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.pop(key, None)
        if rope is None:
            continue
        known = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        plain = isinstance(rope, dict) and all(rope[name] == known.get(name) for name in rope if name != "rope_theta")
        if not plain:
            raise InvalidFile(f"{path}: {key} {rope} is a kind of rotary scaling that is not implemented")
        content |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}


def _check_attention_kinds(content: dict[str, Any], path: str) -> None:
    """Qwen3 names the attention of every layer, and a window that counts only where it is switched on."""
    kinds = content.pop("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise InvalidFile(f"{path}: layer_types has other than full_attention, which is all that is implemented")
    if content.get("model_type") == "qwen3" and not content.get("use_sliding_window", False):
        content.pop("sliding_window", None)


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """config.json as Transformers 4 and 5 read it."""
    family = FAMILIES[config.model_type]
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    shape = {name: config.__dict__[name] for name in config.own_fields()}
    content = {"architectures": [family.architecture], **shape, **family.fixed, "rope_parameters": rope}
    if config.own_classes:
        plain = {key: value for key, value in content.items() if key not in config.own_classes}
        table = {"model_type": config.model_type, **config.own_classes}
        return plain | {"architectures": ["LanguageModel"], "model_type": OWN, OWN: table}
    return content


def names_on_disk(name: str, config: ModelConfig) -> list[str]:
    """Where a parameter is in the file: under its own name, or in one tensor for each expert, as Mixtral has them."""
    if config.model_type != "mixtral" or config.feed_forward is not None or ".mlp." not in name:
        return [name]
    layer, _, rest = name.partition(".mlp.")
    if rest == "gate.weight":
        return [f"{layer}.block_sparse_moe.gate.weight"]
    matrix = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[rest.removeprefix("experts.")]
    return [f"{layer}.block_sparse_moe.experts.{e}.{matrix}.weight" for e in range(config.num_local_experts)]
