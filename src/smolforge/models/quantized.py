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

from smolforge.errors import SettingError

Layer = TypeVar("Layer", nn.Linear, nn.Embedding)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CLIPS = {8: (1.0,), 4: tuple(place / 40 for place in range(26, 43))}
"""What of a group's largest weight its scale may be made for. Few integers are spent better if the largest is cut."""


@dataclass(frozen=True)
class Scheme:
    """How a model's matrices are kept."""

    bits: int
    """Of an integer: 8 or 4."""
    group_size: int | None = None
    """Neighbours that share a scale; by default a whole row, an output channel."""
    embedding: bool = False
    """Whether embedding and head are integers too, of 8 bits with a scale a row."""


def rounded(
    weight: Float[Tensor, "o i"], bits: int, group_size: int | None = None
) -> tuple[Int8[Tensor, "o i"], BFloat16[Tensor, "o g"]]:
    """The nearest integers and their scales, of those clips that lose least in squares."""
    groups = weight.float().unflatten(-1, (-1, group_size or weight.shape[-1]))
    half, least = 2 ** (bits - 1), torch.finfo(torch.float32).tiny
    whole = groups.abs().amax(-1, keepdim=True) / (half - 0.5)
    best, scales, error = groups, whole, torch.full_like(whole, torch.inf)
    for clip in CLIPS[bits]:
        scale = (clip * whole).bfloat16().float().clamp(min=least)
        integers = (groups / scale).round_().clamp_(-half, half - 1)
        lost = (integers * scale - groups).square_().sum(-1, keepdim=True)
        better = lost <= error  # also where squares are beyond fp32, or too small for it
        best, scales, error = (
            torch.where(better, *pair) for pair in ((integers, best), (scale, scales), (lost, error))
        )
    return best.flatten(-2).to(torch.int8), scales.squeeze(-1).bfloat16()


def pack(integers: Int8[Tensor, "o i"], bits: int) -> Int32[Tensor, "o w"]:
    """Side by side in words of 32 bits."""
    raised = (integers.int() + 2 ** (bits - 1)).unflatten(-1, (-1, 32 // bits))
    return (raised << torch.arange(0, 32, bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def unpack(packed: Int32[Tensor, "... w"], bits: int) -> Int8[Tensor, "... i"]:
    """The integers again. A word's bytes stand in memory lowest first."""
    raised = packed.contiguous().view(torch.uint8)
    if bits == 4:
        raised = torch.stack([raised & 15, raised >> 4], -1).flatten(-2)
    return (raised ^ 128).view(torch.int8) if bits == 8 else raised.view(torch.int8) - 8


def unrolled(
    packed: Int32[Tensor, "... w"], scale: BFloat16[Tensor, "... g"], bits: int, dtype: torch.dtype
) -> Float[Tensor, "... i"]:
    """The weights that integers stand for, multiplied in fp32."""
    groups = unpack(packed, bits).float().unflatten(-1, (scale.shape[-1], -1))
    return groups.mul_(scale.float()[..., None]).flatten(-2).to(dtype)


class Integers(nn.Module):
    """A matrix as integers, under the names that files have, yet to be filled; `old` is what it takes the place of."""

    def __init__(self, old: Float[Tensor, "o i"], bits: int, group_size: int | None) -> None:
        super().__init__()
        self.bits, self.dtype = bits, old.dtype
        self.out_features, self.in_features = o, i = old.shape
        self.weight_packed = kept(old.new_empty((o, i * bits // 32), dtype=torch.int32))
        self.weight_scale = kept(old.new_empty((o, i // (group_size or i)), dtype=torch.bfloat16))
        self.weight_shape = kept(old.new_tensor((o, i), dtype=torch.int64))

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """What it stands for; made anew each time."""
        return self.matrix(self.dtype)

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        return unrolled(self.weight_packed, self.weight_scale, self.bits, dtype)

    def take(self, weight: Float[Tensor, "o i"]) -> None:
        """Stand for the nearest to these weights."""
        groups = self.weight_scale.shape[1]
        integers, scale = rounded(weight, self.bits, self.in_features // groups)
        self.weight_packed.copy_(pack(integers, self.bits))
        self.weight_scale.copy_(scale)


class QuantizedLinear(Integers):
    """A linear layer over integers."""

    def __init__(self, old: nn.Linear, scheme: Scheme) -> None:
        super().__init__(old.weight, scheme.bits, scheme.group_size)
        self.bias = old.bias

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.matrix(x.dtype), self.bias)


class QuantizedEmbedding(Integers):
    """An embedding over integers."""

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... i"]:
        return unrolled(self.weight_packed[ids], self.weight_scale[ids], self.bits, self.dtype)


def kept(values: Tensor) -> nn.Parameter:
    """A parameter that does not learn."""
    return nn.Parameter(values, requires_grad=False)


def layers(model: nn.Module) -> dict[str, Integers]:
    """Every layer of integers by its name; none where a model is plain."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Integers)}


def lay(model: Any, scheme: Scheme) -> None:
    """Put layers of integers, yet to be filled, where a scheme has them. Raises SettingError for what does not fit.

    A class derived from nn.Linear may compute something else, and stays as it is.
    """
    if model.config.model_type == "mixtral":
        raise SettingError("the experts of a mixtral are no linear layers, and integers for them are not implemented")
    ends = Scheme(bits=8)
    for name, old in list(model.named_modules()):
        if type(old) is nn.Linear and name != HEAD:
            made: Integers = QuantizedLinear(fitting(name, old, scheme), scheme)
        elif type(old) is nn.Linear and scheme.embedding:
            made = QuantizedLinear(fitting(name, old, ends), ends)
        elif type(old) is nn.Embedding and scheme.embedding and name == EMBEDDING:
            made = QuantizedEmbedding(fitting(name, old, ends).weight, ends.bits, None)
        else:
            continue
        model.set_submodule(name, made)
    model.scheme = scheme


def fitting(name: str, old: Layer, scheme: Scheme) -> Layer:
    """The layer. Raises SettingError where a scheme does not divide its rows."""
    inputs = old.weight.shape[1]
    for what, size in (("groups", scheme.group_size or 1), ("words", 32 // scheme.bits)):
        if inputs % size:
            raise SettingError(f"{name} has {inputs:,} inputs, which {what} of {size} do not divide")
    return old


@torch.no_grad()
def quantize(model: Any, scheme: Scheme) -> None:
    """Make every linear layer of a model one of integers. Raises SettingError for what does not fit."""
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    lay(model, scheme)
    for name, layer in layers(model).items():
        layer.take(before[name].weight)


def unlike(made: nn.Module, read: nn.Module) -> list[str]:
    """The parameters that a model, read from a file, has otherwise than the one in memory that was written."""
    found = dict(read.named_parameters())
    written = {
        name: weight.bfloat16().float() if weight.dtype == torch.float32 else weight
        for name, weight in made.named_parameters()
    }
    return [name for name, weight in written.items() if not torch.equal(weight, found[name])]
