"""config.json <-> ModelConfig, for each family of models.

Reading is strict: every key is a setting of ours, or has the one value we implement, or is known to change
nothing. Whatever else a file asks for is refused by name.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smolforge.checkpoint import quantization
from smolforge.config import ModelConfig, custom_classes
from smolforge.config.model import FAMILIES, PARTS, ROPE_SETTINGS, RopeScaling
from smolforge.errors import InvalidFileError
from smolforge.models.family import Family, family_of, load_family

log = logging.getLogger("smolforge")
CUSTOM_MODEL_TYPE = "smolforge"
"""model_type of a model with custom classes; Transformers must not take it for one that it knows."""
REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

INERT_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class _commit_hash
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled _name_or_path _output_attentions
    add_cross_attention architectures attn_implementation base_model_ep_plan base_model_pp_plan base_model_tp_plan
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype
    eos_token_id finetuning_task gradient_checkpointing has_no_defaults_at_init id2label is_composition is_decoder
    is_llama_config keys_to_ignore_at_inference label2id max_sequence_length max_window_layers model_max_length
    output_attentions output_hidden_states output_router_logits pad_token_id prefix pretraining_tp problem_type
    pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    use_cache use_return_dict

    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length min_p no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)
"""Keys that say nothing about what the model computes; the second group is of how text is drawn from it."""

MAX_JSON_BYTES = 4 << 20
"""Bytes; the largest config.json and index there are take a tenth of it."""


FIXED_NOT_WRITTEN = {"is_encoder_decoder": False, "partial_rotary_factor": 1.0}
"""Settings implemented at one value only, for every family."""


def read_config(path: Path) -> ModelConfig:
    """Return the ModelConfig of a config.json.

    Raises InvalidFileError where it is missing, broken, or asks for what is not implemented.
    """
    return from_hugging_face(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises InvalidFileError where it is missing or none."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
            raise InvalidFileError(f"{path} is no regular file")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InvalidFileError(f"{path} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} of any real one")
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidFileError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InvalidFileError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InvalidFileError(f"{path} is not a JSON object")
    return content


def from_hugging_face(content: dict[str, Any], path: str = "config.json") -> ModelConfig:
    """Return the ModelConfig that a config.json describes; rotary settings are read from their old and new places."""
    content = dict(content)
    quantization.pop_scheme(content, path)
    if "auto_map" in content:
        raise InvalidFileError(
            f"{path} asks for code of its own (auto_map), which is never run; only {_implemented_families()} load"
        )
    classes = _pop_custom_classes(content, path)
    model_type = str(content.get("model_type", "llama"))
    if model_type not in FAMILIES:
        raise InvalidFileError(
            f"{path}: model_type is {content['model_type']!r}, which is not implemented; {_implemented_families()} are"
        )
    family = load_family(model_type)
    _move_rope_settings(content, path)
    _check_layer_types(content, family, path)
    missing = [key for key in REQUIRED_KEYS if content.get(key) is None]
    if missing:
        raise InvalidFileError(f"{path} does not say {missing[0]}")
    settings, fixed = dict(family.config_defaults), {**family.config_fixed, **FIXED_NOT_WRITTEN}
    for key, value in content.items():
        if value is None and key != "num_key_value_heads":  # as if it were not there, whether it is known or not
            continue
        if key in fixed:
            if value != fixed[key]:
                raise InvalidFileError(f"{path}: {key} is {value!r}, which is not implemented; only {fixed[key]!r} is")
        elif key in ModelConfig.model_fields and key not in PARTS:
            settings[key] = value
        elif key not in INERT_KEYS:
            raise InvalidFileError(f"{path} has a setting {key!r} that is not known here, so the model might differ")
    if ignored := sorted(content.keys() & INERT_KEYS):
        log.debug("%s: what a model computes does not depend on %s", path, ", ".join(ignored))
    if settings["num_key_value_heads"] is None:  # every head has its own
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    try:
        return ModelConfig.model_validate(settings | classes, strict=True)
    except ValidationError as error:
        raise InvalidFileError(f"{path}: {_first_problem(error)}") from None


def _pop_custom_classes(content: dict[str, Any], path: str) -> dict[str, str]:
    """Remove and return the custom class of each part, if the user allowed it; what is left is one of our families."""
    if content.get("model_type") != CUSTOM_MODEL_TYPE:
        return {}
    table = content.pop(CUSTOM_MODEL_TYPE, None)
    if not isinstance(table, dict) or not {"model_type"} < table.keys() <= {"model_type", *PARTS}:
        raise InvalidFileError(
            f"{path}: model_type is {CUSTOM_MODEL_TYPE}, but its table {CUSTOM_MODEL_TYPE} does not say of what classes"
        )
    content["model_type"] = table.pop("model_type")
    for part, name in table.items():
        custom_classes.check_imported(f"model.{part}", str(name), f"{path}: ")
    return table


def _implemented_families() -> str:
    return ", ".join(FAMILIES)


def _move_rope_settings(content: dict[str, Any], path: str) -> None:
    """Move rope_theta out of rope_scaling or rope_parameters, and make the rest a RopeScaling.

    Raises InvalidFileError for a kind of rotary scaling that is not implemented, or two that differ.
    """
    scalings = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.pop(key, None)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise InvalidFileError(f"{path}: {key} is {rope!r}, which is no table of rotary settings")
        rope = dict(rope)
        content |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        kind = rope.pop("type", "default")
        scalings[key] = parse_rope_scaling({"rope_type": kind} | rope, f"{path}: {key}")
    if len(set(scalings.values())) > 1:
        raise InvalidFileError(f"{path}: rope_scaling and rope_parameters differ; remove the one that is wrong")
    content |= {"rope_scaling": next(iter(scalings.values()), RopeScaling())}


def parse_rope_scaling(settings: dict[str, Any], location: str) -> RopeScaling:
    """Return rotary settings as a RopeScaling. Raises InvalidFileError naming a rope_type that is not implemented."""
    kind = settings["rope_type"]
    if kind not in [*ROPE_SETTINGS]:
        implemented = ", ".join(ROPE_SETTINGS)
        raise InvalidFileError(f"{location}: rope_type is {kind!r}, which is not implemented; {implemented} are")
    try:
        return RopeScaling.model_validate(settings, strict=True)
    except ValidationError as error:
        raise InvalidFileError(f"{location}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"


def _check_layer_types(content: dict[str, Any], family: Family, path: str) -> None:
    """Qwen names the attention of every layer, and a window that counts only where it is switched on."""
    kinds = content.pop("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise InvalidFileError(f"{path}: layer_types has other than full_attention, which is all that is implemented")
    if "use_sliding_window" in family.config_fixed and not content.get("use_sliding_window", False):
        content.pop("sliding_window", None)


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """config.json as Transformers 4 and 5 read it."""
    family = family_of(config)
    shape = {name: config.__dict__[name] for name in config.family_fields() if name != "rope_scaling"}
    rope = config.rope_scaling.parameters()
    if config.rope_scaling != RopeScaling():  # Transformers 4 reads no rope_parameters
        shape["rope_scaling"] = rope
    rope_parameters = {**rope, "rope_theta": config.rope_theta}
    content = {
        "architectures": [family.architecture],
        **shape,
        **family.config_fixed,
        "rope_parameters": rope_parameters,
    }
    if config.custom_classes:
        plain = {key: value for key, value in content.items() if key not in config.custom_classes}
        table = {"model_type": config.model_type, **config.custom_classes}
        return plain | {"architectures": ["LanguageModel"], "model_type": CUSTOM_MODEL_TYPE, CUSTOM_MODEL_TYPE: table}
    return content
