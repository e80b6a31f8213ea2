"""quantization_config of a config.json <-> QuantizationScheme, in the format of compressed-tensors.

Read strictly: what we write is understood, with any group size; whatever else a file asks for is refused by name.
"""

from pathlib import Path
from typing import Any

import torch

from smolforge.errors import InvalidFileError
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import QuantizationScheme

KEY, METHOD, FORMAT = "quantization_config", "compressed-tensors", "pack-quantized"
ACTIVATION_ORDER = "weight"
"""What `actorder` says of calibrated integers: chosen in the order of their inputs' size, and kept in their own."""
DTYPES = {
    "weight_packed": torch.int32,
    "weight_scale": torch.bfloat16,
    "weight_zero_point": torch.int32,
    "weight_shape": torch.int64,
}
"""Dtypes of the tensors of a quantized matrix on disk, by the ends of their names."""
SUPPORTED_SCHEMES = f"{METHOD} of 8 bits a channel or 4 bits a group, of weights alone, is what is read here"
MAX_GROUP_SIZE = 2**20


def quantized_dtypes(model: LanguageModel) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of a model's quantized matrices, by its name on disk."""
    return {
        f"{name}.{part}": dtype
        for name, layer in quantized.quantized_layers(model).items()
        for part, dtype in DTYPES.items()
        if getattr(layer, part) is not None
    }


def quantization_config(scheme: QuantizationScheme) -> dict[str, Any]:
    """Return quantization_config as Transformers and vLLM read it; only we read quantized embeddings.

    compressed-tensors 0.20 has no place for packed zeros, unless Transformers dequantizes while it loads.
    """
    groups = [{"targets": ["Linear"], "weights": _weights_entry(scheme)}]
    if scheme.embedding:
        ends = [quantized.EMBEDDING, quantized.HEAD]
        groups.append({"targets": ends, "weights": _weights_entry(QuantizationScheme(8))})
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [] if scheme.embedding else [quantized.HEAD],
        **({"dequantize": True} if scheme.zero_point else {}),
    }


def _weights_entry(scheme: QuantizationScheme) -> dict[str, Any]:
    size = scheme.group_size
    granularity = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    order = {"actorder": ACTIVATION_ORDER} if scheme.calibrated else {}
    kind = {"num_bits": scheme.bits, "type": "int", "symmetric": not scheme.zero_point, "dynamic": False}
    return kind | granularity | order


def pop_scheme(content: dict[str, Any], path: str) -> QuantizationScheme | None:
    """Remove the scheme from a config.json and return it; None for weights that are not quantized.

    Raises InvalidFileError for a scheme that is not implemented.
    """
    config = content.pop(KEY, None)
    if config is None:
        return None
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise InvalidFileError(
            f"{path}: {KEY} has quant_method {str(method)[:60]!r}, which is not implemented; {SUPPORTED_SCHEMES}"
        )
    scheme = _parse_scheme(config)
    if scheme is None:
        raise InvalidFileError(
            f"{path}: {KEY} has no num_bits and group_size that are implemented; {SUPPORTED_SCHEMES}"
        )
    if difference := _first_difference(_without_inert_keys(config), _without_inert_keys(quantization_config(scheme))):
        raise InvalidFileError(f"{path}: {KEY} has {difference}, which is not implemented; {SUPPORTED_SCHEMES}")
    return scheme


def _parse_scheme(config: dict[str, Any]) -> QuantizationScheme | None:
    """Parse bits and group size; None where they are missing or not implemented."""
    try:
        groups = config["config_groups"]
        weights = groups["group_0"]["weights"]
        bits, size = weights["num_bits"], weights.get("group_size")
    except (KeyError, TypeError, AttributeError):
        return None
    valid_size = size is None or (type(size) is int and 0 < size <= MAX_GROUP_SIZE)
    if not valid_size or type(bits) is not int or bits not in (4, 8):
        return None
    zero_point, calibrated = weights.get("symmetric") is False, weights.get("actorder") == ACTIVATION_ORDER
    return QuantizationScheme(bits, size, len(groups) > 1, zero_point=zero_point, calibrated=calibrated)


def _without_inert_keys(value: Any) -> Any:
    """Return a value without the keys that only say that something is off, or who wrote it."""
    if not isinstance(value, dict):
        return value
    inert = ("version", "dequantize", "observer", "observer_kwargs", "global_compression_ratio")
    cleaned = {key: _without_inert_keys(item) for key, item in value.items() if key not in inert}
    off, implied = (None, False, {}), (("format", FORMAT), ("zp_dtype", "torch.int8"))
    return {key: item for key, item in cleaned.items() if item not in off and (key, item) not in implied}


def _first_difference(content: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> str:
    """Return the first key whose value is another than expected, with that value; empty where all agree."""
    for key in sorted(content.keys() | expected.keys()):
        value, expected_value = content.get(key), expected.get(key)
        if isinstance(value, dict) and isinstance(expected_value, dict):
            if difference := _first_difference(value, expected_value, f"{prefix}{key}."):
                return difference
        elif value != expected_value:
            return f"{prefix}{key} {str(value)[:60]!r}"
    return ""


def check_quantized_layers(model: LanguageModel, folder: Path) -> None:
    """Check scales and shapes of a quantized model. Raises InvalidFileError with the tensor's name."""
    for name, layer in quantized.quantized_layers(model).items():
        scale = layer.weight_scale
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise InvalidFileError(f"{folder}: {name}.weight_scale holds what is no scale: NaN, infinity, 0 or less")
        shape = (layer.out_features, layer.in_features)
        if tuple(layer.weight_shape.tolist()) != shape:
            raise InvalidFileError(
                f"{folder}: {name}.weight_shape is {layer.weight_shape.tolist()}, of a matrix of {shape}"
            )
