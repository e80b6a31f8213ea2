"""Low-rank adapters in peft's format: adapter_config.json and adapter_model.safetensors, beside the model they change.

Written into every checkpoint that trains one; read as a MODEL, merged into the base it names.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smolforge.checkpoint import hub, huggingface, safetensors_writer
from smolforge.checkpoint.families import read_json
from smolforge.config import Lora
from smolforge.errors import InvalidFile
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INERT = frozenset(
    """
    auto_mapping base_model_name_or_path inference_mode lora_alpha
    lora_dropout megatron_core peft_type peft_version qalora_group_size r revision target_modules task_type
    """.split()  # noqa: SIM905
)
"""Settings that are read, or say nothing about what the adapter computes; others must be off."""
BEGINNING, HARMLESS = "init_lora_weights", (True, "gaussian", "orthogonal", "eva")
"""How it began, and ways that leave the base as it is. pissa, olora, corda and loftq take from the base what they give
to the adapter, and peft does so again when it reads one."""


def settings_of(settings: Lora, base: str) -> dict[str, Any]:
    """adapter_config.json of an adapter of this base, `org/name@revision` or a folder."""
    alpha = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha
    name, revision = hub.split_id(base) if hub.is_id(base) and not Path(base).exists() else (base, None)
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


def write(folder: Path, content: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Write both files; `values` are `lora.adapters` of a model."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    safetensors_writer.write(
        folder / WEIGHTS, {f"{PREFIX}{name}.weight": each for name, each in values.items()}, huggingface.METADATA
    )


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / huggingface.CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The MODEL that an adapter changes. Raises InvalidFile where it does not say."""
    content = read_json(folder / CONFIG)
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(name, str) or not name:
        raise InvalidFile(f"{folder / CONFIG} does not say which model it changes (base_model_name_or_path)")
    if Path(name).resolve() == folder.resolve():
        raise InvalidFile(f"{folder / CONFIG} names itself as the model it changes (base_model_name_or_path)")
    return f"{name}@{revision}" if revision and hub.is_id(name) else name


def apply(model: LanguageModel, folder: Path) -> None:
    """Merge the adapter of a folder into its base. Raises InvalidFile, naming file and key, for what does not fit."""
    if model.scheme is not None:
        raise InvalidFile(
            f"{folder / CONFIG} changes {base_of(folder)}, which holds integers; "
            "let base_model_name_or_path there name the model that was made from"
        )
    content, values = read_json(folder / CONFIG), read(folder)
    check_settings(content, folder / CONFIG)
    ranks = {name.rpartition(".")[0]: value.shape[0] for name, value in values.items() if name.endswith(lora.A)}
    for name, rank in ranks.items():
        if rank != content["r"]:
            raise InvalidFile(f"{folder / WEIGHTS}: {name} has rank {rank}, but {CONFIG} says {content['r']}")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, torch.nn.Linear):
            raise InvalidFile(f"{folder / WEIGHTS} changes {name}, which is no linear layer of its base")
        lora.put(model, name, lora.LowRank(linear, rank, float(content["lora_alpha"])))
    fill(model, values, folder / WEIGHTS)
    lora.merge(model)


def check_settings(content: dict[str, Any], path: Path) -> None:
    """Raises InvalidFile for an adapter that computes something else."""
    if content.get("peft_type") != "LORA":
        raise InvalidFile(f"{path}: peft_type is {content.get('peft_type')!r}; only LORA is implemented")
    for key in ("r", "lora_alpha"):
        if isinstance(content.get(key), bool) or not isinstance(content.get(key), int | float) or content[key] <= 0:
            raise InvalidFile(f"{path}: {key} is {content.get(key)!r}; it should be a number above 0")
    for key, value in content.items():
        known = key in INERT or (key == BEGINNING and value in HARMLESS)
        if not known and value not in (None, False, "none", {}, []):
            raise InvalidFile(f"{path}: {key} is {str(value)[:60]!r}, which is not implemented")


def read(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by our parameters' names. Raises InvalidFile where the file is broken."""
    path = folder / WEIGHTS
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from None
    ends = (f".{lora.A}.weight", f".{lora.B}.weight")
    wrong = [name for name in found if not (name.startswith(PREFIX) and name.endswith(ends))]
    if wrong:
        raise InvalidFile(f"{path} has {wrong[0]!r}, which is no tensor of a low-rank adapter")
    return {name.removeprefix(PREFIX).removesuffix(".weight"): value for name, value in found.items()}


@torch.no_grad()
def fill(model: LanguageModel, values: dict[str, Tensor], path: Path) -> None:
    """Copy an adapter's values into a model's low-rank layers. Raises InvalidFile where they do not fit."""
    wanted = lora.adapters(model)
    unlike = sorted(wanted.keys() ^ values.keys()) or [n for n, each in wanted.items() if each.shape != values[n].shape]
    if unlike:
        raise InvalidFile(f"{path} and the model do not agree on {unlike[0]}")
    for name, weight in wanted.items():
        weight.copy_(values[name])
