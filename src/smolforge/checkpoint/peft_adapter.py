"""Low-rank adapters in peft's format: adapter_config.json and adapter_model.safetensors, beside the model they change.

Written into every checkpoint that trains one; read as a MODEL, merged into the base it names.
"""

import json
from pathlib import Path
from typing import Any

import torch
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
    auto_mapping base_model_name_or_path inference_mode lora_alpha
    lora_dropout megatron_core peft_type peft_version qalora_group_size r revision target_modules task_type
    """.split()  # noqa: SIM905
)
"""Settings that are read, or say nothing about what the adapter computes; others must be off."""
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
    return (folder / CONFIG).is_file() and not (folder / huggingface.CONFIG).is_file()


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
    content, values = read_json(folder / CONFIG), read_adapter(folder)
    check_settings(content, folder / CONFIG)
    ranks = {name.rpartition(".")[0]: value.shape[0] for name, value in values.items() if name.endswith(lora.A)}
    for name, rank in ranks.items():
        if rank != content["r"]:
            raise InvalidFileError(f"{folder / WEIGHTS}: {name} has rank {rank}, but {CONFIG} says {content['r']}")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, torch.nn.Linear):
            raise InvalidFileError(f"{folder / WEIGHTS} changes {name}, which is no linear layer of its base")
        model.set_submodule(name, lora.LoRALinear(linear, rank, float(content["lora_alpha"])))
    fill_adapter(model, values, folder / WEIGHTS)
    lora.merge(model)


def check_settings(content: dict[str, Any], path: Path) -> None:
    """Raises InvalidFileError for an adapter that computes something else."""
    if content.get("peft_type") != "LORA":
        raise InvalidFileError(f"{path}: peft_type is {content.get('peft_type')!r}; only LORA is implemented")
    for key in ("r", "lora_alpha"):
        if isinstance(content.get(key), bool) or not isinstance(content.get(key), int | float) or content[key] <= 0:
            raise InvalidFileError(f"{path}: {key} is {content.get(key)!r}; it should be a number above 0")
    for key, value in content.items():
        supported = key in INERT_SETTINGS or (key == INIT_KEY and value in SUPPORTED_INITS)
        if not supported and value not in (None, False, "none", {}, []):
            raise InvalidFileError(f"{path}: {key} is {str(value)[:60]!r}, which is not implemented")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by our parameters' names. Raises InvalidFileError where the file is broken."""
    path = folder / WEIGHTS
    with huggingface.safetensors_errors(path):
        tensors = load_file(path)
    ends = (f".{lora.A}.weight", f".{lora.B}.weight")
    unexpected = [name for name in tensors if not (name.startswith(PREFIX) and name.endswith(ends))]
    if unexpected:
        raise InvalidFileError(f"{path} has {unexpected[0]!r}, which is no tensor of a low-rank adapter")
    return {name.removeprefix(PREFIX).removesuffix(".weight"): value for name, value in tensors.items()}


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
