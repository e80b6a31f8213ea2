"""Weights as small integers, and the layers that compute with them.

    weight (o i)  ->  integers (o i), and one scale for each group of neighbours along i      weight ~ integers x scale

Nothing else is changed: sums are in the dtype of what comes in, over the matrix that the integers stand for. Zero stays
zero (symmetric). Integers stand side by side in words of 32 bits, the first lowest, each raised by half its range: the
layout `pack-quantized` of https://github.com/vllm-project/compressed-tensors, which Transformers and vLLM read. Scales
are bfloat16, and weights are rounded for the scale as it is kept.

Axes: o outputs, i inputs, g groups of a row, w words of a row.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int, Int8, Int32
from torch import Tensor, nn

from smolforge.errors import ConfigError

Layer = TypeVar("Layer", nn.Linear, nn.Embedding)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CLIPS = {8: (1.0,), 4: tuple(step / 40 for step in range(26, 43))}
"""Fractions of a group's largest weight that its scale is tried for. With few integers a cut largest loses less."""


@dataclass(frozen=True)
class QuantizationScheme:
    """How a model's matrices are kept."""

    bits: int
    """Of an integer: 8 or 4."""
    group_size: int | None = None
    """Neighbours that share a scale; by default a whole row, an output channel."""
    embedding: bool = False
    """Whether embedding and head are integers too, of 8 bits with a scale a row."""


def quantize_weight(
    weight: Float[Tensor, "o i"], bits: int, group_size: int | None = None
) -> tuple[Int8[Tensor, "o i"], BFloat16[Tensor, "o g"]]:
    """The nearest integers and their scales, of those clips that lose least in squares."""
    groups = weight.float().unflatten(-1, (-1, group_size or weight.shape[-1]))
    half, smallest = 2 ** (bits - 1), torch.finfo(torch.float32).tiny
    full_scale = groups.abs().amax(-1, keepdim=True) / (half - 0.5)
    best, scales, error = groups, full_scale, torch.full_like(full_scale, torch.inf)
    for clip in CLIPS[bits]:
        scale = (clip * full_scale).bfloat16().float().clamp(min=smallest)
        integers = (groups / scale).round_().clamp_(-half, half - 1)
        squared_error = (integers * scale - groups).square_().sum(-1, keepdim=True)
        better = squared_error <= error  # also where squares are beyond fp32, or too small for it
        best, scales, error = (
            torch.where(better, *pair) for pair in ((integers, best), (scale, scales), (squared_error, error))
        )
    return best.flatten(-2).to(torch.int8), scales.squeeze(-1).bfloat16()


def pack(integers: Int8[Tensor, "o i"], bits: int) -> Int32[Tensor, "o w"]:
    """Side by side in words of 32 bits."""
    raised = (integers.int() + 2 ** (bits - 1)).unflatten(-1, (-1, 32 // bits))
    return (raised << torch.arange(0, 32, bits, dtype=torch.int32, device=integers.device)).sum(-1, dtype=torch.int32)


def unpack(packed: Int32[Tensor, "... w"], bits: int) -> Int8[Tensor, "... i"]:
    """The integers again. A word's bytes stand in memory lowest first."""
    raised = packed.contiguous().view(torch.uint8)
    if bits == 4:
        raised = torch.stack([raised & 15, raised >> 4], -1).flatten(-2)
    return (raised ^ 128).view(torch.int8) if bits == 8 else raised.view(torch.int8) - 8


def dequantize(
    packed: Int32[Tensor, "... w"], scale: BFloat16[Tensor, "... g"], bits: int, *, dtype: torch.dtype
) -> Float[Tensor, "... i"]:
    """The weights that integers stand for, multiplied in fp32."""
    groups = unpack(packed, bits).float().unflatten(-1, (scale.shape[-1], -1))
    return groups.mul_(scale.float()[..., None]).flatten(-2).to(dtype)


class QuantizedWeight(nn.Module):
    """A matrix as integers, under the names that files have, yet to be filled; `old` is what it takes the place of."""

    def __init__(self, old: Float[Tensor, "o i"], bits: int, group_size: int | None) -> None:
        super().__init__()
        self.bits, self.dtype = bits, old.dtype
        self.out_features, self.in_features = o, i = old.shape
        self.weight_packed = frozen(old.new_empty((o, i * bits // 32), dtype=torch.int32))
        self.weight_scale = frozen(old.new_empty((o, i // (group_size or i)), dtype=torch.bfloat16))
        self.weight_shape = frozen(old.new_tensor((o, i), dtype=torch.int64))

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """What it stands for; made anew each time."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        return dequantize(self.weight_packed, self.weight_scale, self.bits, dtype=dtype)

    def quantize_from(self, weight: Float[Tensor, "o i"]) -> None:
        """Stand for the nearest to these weights."""
        groups = self.weight_scale.shape[1]
        integers, scale = quantize_weight(weight, self.bits, self.in_features // groups)
        self.weight_packed.copy_(pack(integers, self.bits))
        self.weight_scale.copy_(scale)


class QuantizedLinear(QuantizedWeight):
    """A linear layer over integers."""

    def __init__(self, old: nn.Linear, scheme: QuantizationScheme) -> None:
        super().__init__(old.weight, scheme.bits, scheme.group_size)
        self.bias = old.bias

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.dequantized(x.dtype), self.bias)


class QuantizedEmbedding(QuantizedWeight):
    """An embedding over integers."""

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... i"]:
        return dequantize(self.weight_packed[ids], self.weight_scale[ids], self.bits, dtype=self.dtype)


def frozen(values: Tensor) -> nn.Parameter:
    """A parameter that does not learn."""
    return nn.Parameter(values, requires_grad=False)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return every quantized layer by its name; none where a model is plain."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}


def insert_quantized_layers(model: Any, scheme: QuantizationScheme) -> None:
    """Insert quantized layers, yet to be filled, where a scheme has them. Raises ConfigError for what does not fit.

    A class derived from nn.Linear may compute something else, and stays as it is.
    """
    if model.config.has_experts:
        kind = model.config.model_type
        raise ConfigError(f"the experts of a {kind} are no linear layers, and integers for them are not implemented")
    end_scheme = QuantizationScheme(bits=8)
    for name, old in list(model.named_modules()):
        if type(old) is nn.Linear and name != HEAD:
            layer: QuantizedWeight = QuantizedLinear(checked_layer(name, old, scheme), scheme)
        elif type(old) is nn.Linear and scheme.embedding:
            layer = QuantizedLinear(checked_layer(name, old, end_scheme), end_scheme)
        elif type(old) is nn.Embedding and scheme.embedding and name == EMBEDDING:
            layer = QuantizedEmbedding(checked_layer(name, old, end_scheme).weight, end_scheme.bits, None)
        else:
            continue
        model.set_submodule(name, layer)
    model.quantization = scheme


def checked_layer(name: str, old: Layer, scheme: QuantizationScheme) -> Layer:
    """Return the layer. Raises ConfigError where a scheme does not divide its rows."""
    inputs = old.weight.shape[1]
    for unit, size in (("groups", scheme.group_size or 1), ("words", 32 // scheme.bits)):
        if inputs % size:
            raise ConfigError(f"{name} has {inputs:,} inputs, which {unit} of {size} do not divide")
    return old


@torch.no_grad()
def quantize(model: Any, scheme: QuantizationScheme) -> None:
    """Make every linear layer of a model one of integers. Raises ConfigError for what does not fit."""
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    insert_quantized_layers(model, scheme)
    for name, layer in quantized_layers(model).items():
        layer.quantize_from(before[name].weight)


def changed_parameters(written_model: nn.Module, read_model: nn.Module) -> list[str]:
    """Return the parameters of a model read from a file that differ from those of the model that was written."""
    read_weights = dict(read_model.named_parameters())
    written_weights = {
        name: weight.bfloat16().float() if weight.dtype == torch.float32 else weight
        for name, weight in written_model.named_parameters()
    }
    return [name for name, weight in written_weights.items() if not torch.equal(weight, read_weights[name])]
