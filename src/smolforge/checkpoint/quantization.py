"""quantization_config of a config.json <-> Scheme, in the words of compressed-tensors; what such a file must hold.

Read strictly: what we write is understood, with any group size; whatever else a file asks for is refused by name.
"""

from pathlib import Path
from typing import Any

import torch

from smolforge.errors import InvalidFile
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import Scheme

KEY, METHOD, FORMAT = "quantization_config", "compressed-tensors", "pack-quantized"
DTYPES = {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64}
"""Of the tensors that a quantised matrix is on disk, by the ends of their names."""
READ = f"{METHOD} of 8 bits a channel or 4 bits a group, symmetric and of weights alone, is what is read here"
LARGEST_GROUP = 2**20


def dtypes(model: LanguageModel) -> dict[str, torch.dtype]:
    """Of every tensor that is part of a model's quantised matrices, by its name on disk."""
    return {f"{name}.{part}": dtype for name in quantized.layers(model) for part, dtype in DTYPES.items()}


def said(scheme: Scheme) -> dict[str, Any]:
    """quantization_config, as Transformers and vLLM read it; embeddings of integers are ours alone to read."""
    groups = [{"targets": ["Linear"], "weights": _weights(scheme.bits, scheme.group_size)}]
    if scheme.embedding:
        groups.append({"targets": [quantized.EMBEDDING, quantized.HEAD], "weights": _weights(8, None)})
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [] if scheme.embedding else [quantized.HEAD],
    }


def _weights(bits: int, group_size: int | None) -> dict[str, Any]:
    how = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **how}


def take(content: dict[str, Any], path: str) -> Scheme | None:
    """The scheme that a config.json names, which is taken out of it; None for weights that are numbers.

    Raises InvalidFile for a scheme that is not implemented.
    """
    config = content.pop(KEY, None)
    if config is None:
        return None
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise InvalidFile(f"{path}: {KEY} has quant_method {str(method)[:60]!r}, which is not implemented; {READ}")
    scheme = _scheme(config)
    if scheme is None:
        raise InvalidFile(f"{path}: {KEY} has no num_bits and group_size that are implemented; {READ}")
    if unlike := _unlike(_plain(config), _plain(said(scheme))):
        raise InvalidFile(f"{path}: {KEY} has {unlike}, which is not implemented; {READ}")
    return scheme


def _scheme(config: dict[str, Any]) -> Scheme | None:
    """What it says where a scheme would say it; None where nothing is there, or no such numbers."""
    try:
        groups = config["config_groups"]
        weights = groups["group_0"]["weights"]
        bits, size = weights["num_bits"], weights.get("group_size")
    except (KeyError, TypeError, AttributeError):
        return None
    sound = size is None or (type(size) is int and 0 < size <= LARGEST_GROUP)
    known = type(bits) is int and bits in (4, 8)
    return Scheme(bits, size, len(groups) > 1) if known and sound else None


def _plain(value: Any) -> Any:
    """Without the keys that are there to say that something is off, or who wrote it."""
    if not isinstance(value, dict):
        return value
    inert = ("version", "observer", "observer_kwargs", "global_compression_ratio")
    kept = {key: _plain(each) for key, each in value.items() if key not in inert}
    off = (None, False, {})
    return {key: each for key, each in kept.items() if each not in off and (key, each) != ("format", FORMAT)}


def _unlike(found: dict[str, Any], wanted: dict[str, Any], below: str = "") -> str:
    """The first key that says something else, and what; nothing where all say the same."""
    for key in sorted(found.keys() | wanted.keys()):
        here, there = found.get(key), wanted.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            if deeper := _unlike(here, there, f"{below}{key}."):
                return deeper
        elif here != there:
            return f"{below}{key} {str(here)[:60]!r}"
    return ""


def check(model: LanguageModel, folder: Path) -> None:
    """Hold a quantised model to what its layers must be. Raises InvalidFile, naming the tensor."""
    for name, layer in quantized.layers(model).items():
        scale = layer.weight_scale
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise InvalidFile(f"{folder}: {name}.weight_scale holds what is no scale: NaN, infinity, 0 or less")
        shape = (layer.out_features, layer.in_features)
        if tuple(layer.weight_shape.tolist()) != shape:
            raise InvalidFile(f"{folder}: {name}.weight_shape is {layer.weight_shape.tolist()}, of a matrix of {shape}")
