"""Low-rank adapters in peft's format: adapter_config.json and adapter_model.safetensors, beside the model they change.

Written into every checkpoint that trains one; read as a MODEL, merged into the base it names.
"""

import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import SchemaError
from safetensors.torch import load_file
from torch import Tensor

from smolforge.checkpoint import hub, huggingface, safetensors_writer
from smolforge.checkpoint.families import read_json
from smolforge.config import Lora
from smolforge.errors import InvalidFileError
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INERT_SETTINGS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision target_modules task_type use_rslora
    """.split()  # noqa: SIM905
)
"""Settings that are read, that the names of the tensors say again (which layers, whether biases), or that say
nothing about what the adapter computes; others must be off."""
INIT_KEY, SUPPORTED_INITS = "init_lora_weights", (True, "gaussian", "orthogonal", "eva")
"""The initialization, and those of its values that leave the base as it is. pissa, olora, corda and loftq
take from the base what they give to the adapter, and peft does so again when it reads one."""


def adapter_config(settings: Lora, base: str) -> dict[str, Any]:
    """Return adapter_config.json of an adapter of this base, `org/name@revision` or a folder."""
    alpha = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha
    name, revision = hub.split_hub_id(base) if hub.is_hub_id(base) and not Path(base).exists() else (base, None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def write_adapter(folder: Path, content: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Write both files; `values` are the `lora_parameters` of a model."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8", newline="\n")
    safetensors_writer.write(
        folder / WEIGHTS, {f"{PREFIX}{name}.weight": tensor for name, tensor in values.items()}, huggingface.METADATA
    )


def is_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter, and no model itself; some tools copy config.json beside an adapter."""
    names = (huggingface.WEIGHTS, huggingface.INDEX) if (folder / WEIGHTS).is_file() else (huggingface.CONFIG,)
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in names)


def base_model_of(folder: Path) -> str:
    """Return the base MODEL of an adapter. Raises InvalidFileError where its config does not name one."""
    content = read_json(folder / CONFIG)
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(name, str) or not name:
        raise InvalidFileError(f"{folder / CONFIG} does not say which model it changes (base_model_name_or_path)")
    if Path(name).resolve() == folder.resolve():
        raise InvalidFileError(f"{folder / CONFIG} names itself as the model it changes (base_model_name_or_path)")
    return f"{name}@{revision}" if revision and hub.is_hub_id(name) else name


def merge_adapter(model: LanguageModel, folder: Path) -> None:
    """Merge the adapter of a folder into its base.

    Raises InvalidFileError, with file and key, for what does not fit.
    """
    if model.quantization is not None:
        raise InvalidFileError(
            f"{folder / CONFIG} changes {base_model_of(folder)}, which holds integers; "
            "let base_model_name_or_path there name the model that was made from"
        )
    content, path = read_json(folder / CONFIG), folder / WEIGHTS
    check_settings(content, folder / CONFIG)
    values = read_adapter(folder)
    replaced = {name: value for name, value in values.items() if lora.last_component(name) not in (lora.A, lora.B)}
    for module in content.get("modules_to_save") or []:
        if not any(f".{module}." in f".{name}" for name in replaced):
            raise InvalidFileError(f"{path} lacks {str(module)[:60]!r}, which modules_to_save of {CONFIG} names")
    replace_parameters(model, replaced, path)
    for name, value in values.items():
        if name.endswith(lora.A):
            add_layer(model, name.rpartition(".")[0], len(value), content=content, path=path)
    fill_adapter(model, {name: value for name, value in values.items() if name not in replaced}, path)
    lora.merge(model)


def add_layer(model: LanguageModel, name: str, rank: int, *, content: dict[str, Any], path: Path) -> None:
    """Replace a linear layer by one with LoRA, of the rank that the file has and the alpha that the settings say."""
    expected = pattern_value(content, "rank_pattern", name, default="r", path=path)
    if rank != expected:
        raise InvalidFileError(f"{path}: {name} has rank {rank}, but {CONFIG} says {expected}")
    alpha = float(pattern_value(content, "alpha_pattern", name, default="lora_alpha", path=path))
    alpha *= math.sqrt(rank) if content.get("use_rslora") else 1.0  # which is divided by the rank
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, torch.nn.Linear):
        tied = "; the base ties its head to the embedding" if f"{name}.weight" == huggingface.HEAD else ""
        raise InvalidFileError(f"{path} changes {name}, which is no linear layer of its base{tied}")
    model.set_submodule(name, lora.LoRALinear(linear, rank, alpha))


def pattern_value(content: dict[str, Any], key: str, name: str, *, default: str, path: Path) -> int | float:
    """Return the value of the first pattern that fits the end of a layer's name, else that of the setting `default`.

    The regular expressions are matched in linear time, by pydantic's engine: a file may hold any.
    """
    for pattern, value in (content.get(key) or {}).items():
        try:
            fits = TypeAdapter(Annotated[str, Field(pattern=rf"^(.*\.)?({pattern})$")])
        except SchemaError:
            raise InvalidFileError(f"{path.with_name(CONFIG)}: {key} has {pattern[:60]!r}, which is not read") from None
        with suppress(ValidationError):
            fits.validate_python(name)
            return value
    return content[default]


@torch.no_grad()
def replace_parameters(model: LanguageModel, values: dict[str, Tensor], path: Path) -> None:
    """Replace whole parameters, of modules_to_save and biases. Raises InvalidFileError where they do not fit."""
    parameters = dict(model.named_parameters())
    tied = {huggingface.HEAD, huggingface.EMBEDDING} if model.config.tie_word_embeddings else set()
    saved = [values[name] for name in tied & values.keys()]
    if saved and (len(saved) != len(tied) or not torch.equal(*saved)):
        raise InvalidFileError(
            f"{path} has another {min(tied & values.keys())}, and its base ties the head to the embedding; "
            "merge it with peft (merge_and_unload) and save that with tie_word_embeddings false"
        )
    for name, value in values.items():
        if name == huggingface.HEAD in tied:
            continue
        if name not in parameters:
            raise InvalidFileError(f"{path} has {name!r}, which is no tensor of a low-rank adapter, nor of its base")
        if parameters[name].shape != value.shape:
            shapes = f"{tuple(value.shape)}, and {tuple(parameters[name].shape)} in its base"
            raise InvalidFileError(f"{path}: {name} has shape {shapes}")
        parameters[name].copy_(value)


def check_settings(content: dict[str, Any], path: Path) -> None:
    """Raises InvalidFileError for an adapter that computes something else."""
    if content.get("peft_type") != "LORA":
        raise InvalidFileError(f"{path}: peft_type is {content.get('peft_type')!r}; only LORA is implemented")
    numbers = {key: content.get(key) for key in ("r", "lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):
        table = content.get(key) or {}
        if not isinstance(table, dict):
            raise InvalidFileError(f"{path}: {key} is {str(table)[:60]!r}; it should be a table")
        numbers |= {f"{key} of {name[:60]!r}": value for name, value in table.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InvalidFileError(f"{path}: {key} is {value!r}; it should be a number above 0")
    for key, value in content.items():
        supported = key in INERT_SETTINGS or (key == INIT_KEY and value in SUPPORTED_INITS)
        if not supported and value not in (None, False, "none", {}, []):
            raise InvalidFileError(f"{path}: {key} is {str(value)[:60]!r}, which is not implemented")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by our parameters' names. Raises InvalidFileError where the file is broken."""
    path = folder / WEIGHTS
    with huggingface.safetensors_errors(path):
        tensors = load_file(path)
    values = {}
    for name, stored in huggingface.plain_names(tensors, path).items():
        inner = huggingface.OUTER_WRAPPERS.sub("", name.removeprefix(PREFIX), count=1).replace(".base_layer.", ".")
        inner = re.sub(rf"\.({lora.A}|{lora.B})\.weight$", r".\1", inner)
        if not name.startswith(PREFIX) or (".lora_" in inner and not inner.endswith((f".{lora.A}", f".{lora.B}"))):
            raise InvalidFileError(f"{path} has {stored!r}, which is no tensor of a low-rank adapter")
        values[inner] = tensors[stored]
    return values


@torch.no_grad()
def fill_adapter(model: LanguageModel, values: dict[str, Tensor], path: Path) -> None:
    """Copy an adapter's values into a model's LoRA layers. Raises InvalidFileError where they do not fit."""
    parameters = lora.lora_parameters(model)
    mismatched = sorted(parameters.keys() ^ values.keys()) or [
        name for name, parameter in parameters.items() if parameter.shape != values[name].shape
    ]
    if mismatched:
        raise InvalidFileError(f"{path} and the model do not agree on {mismatched[0]}")
    for name, weight in parameters.items():
        weight.copy_(values[name])
