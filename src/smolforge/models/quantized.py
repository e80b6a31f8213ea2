"""Weights as small integers, and the layers that compute with them.

    weight (o i) -> integers (o i), and for each group of neighbours along i a scale, and where the scheme has it a zero
    weight ~ (integers - zero) x scale

Nothing else is changed: sums are in the dtype of what comes in, over the matrix that the integers stand for. Without a
zero of its own a group's is 0 (symmetric). Integers stand side by side in words of 32 bits, the first lowest, each
raised by half its range: the layout `pack-quantized` of https://github.com/vllm-project/compressed-tensors, which
Transformers and vLLM read. There zeros stand side by side along o. Scales are bfloat16, and weights are rounded for the
scale as it is kept.

Axes: o outputs, i inputs, g groups of a row, w words of a row.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int, Int8, Int32
from torch import Tensor, nn

from smolforge.errors import ConfigError

Layer = TypeVar("Layer", nn.Linear, nn.Embedding)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CLIPS = {8: (1.0,), 4: tuple(step / 40 for step in range(26, 43))}
"""Fractions of a group's full range that its scale is tried for. With few integers a cut largest loses less."""
ZERO_BITS = 7
"""Significant bits of the scale of a group with a zero, so that scale x (half + zero) is exact in half precision."""


@dataclass(frozen=True)
class QuantizationScheme:
    """How a model's matrices are kept."""

    bits: int
    """Of an integer: 8 or 4."""
    group_size: int | None = None
    """Neighbours that share a scale; by default a whole row, an output channel."""
    embedding: bool = False
    """Whether embedding and head are integers too, of 8 bits with a scale a row."""
    zero_point: bool = False
    """Whether each group has an integer, of as many bits, that stands for 0."""
    calibrated: bool = False
    """Whether a text chose the integers (exporters/gptq.py). Without it they are the nearest."""


class Grid(NamedTuple):
    """The values that a matrix can take: (n - zero) x scale for each integer n."""

    scale: BFloat16[Tensor, "o g"]
    zero: Int8[Tensor, "o g"]

    def per_weight(self, inputs: int) -> tuple[Float[Tensor, "o i"], Float[Tensor, "o i"]]:
        """Return scale and zero of every weight of a matrix with so many inputs."""
        scale, zero = (part.float().repeat_interleave(inputs // part.shape[1], 1) for part in self)
        return scale, zero


def search_grid(
    weight: Float[Tensor, "o i"], scheme: QuantizationScheme, importance: Float[Tensor, " i"] | None = None
) -> Grid:
    """Return, of those clips that are tried, the grid on which rounding loses least in squares.

    The square of a weight counts as much as its input's `importance`, by default all the same.
    """
    group_size = scheme.group_size or weight.shape[-1]
    groups = weight.float().unflatten(-1, (-1, group_size))
    share = groups.new_ones(group_size) if importance is None else importance.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if not scheme.zero_point:
        high = groups.abs().amax(-1, keepdim=True)
        low = -high
    half = 2 ** (scheme.bits - 1)
    best_scale, best_zero, least = high, torch.zeros_like(high), torch.full_like(high, torch.inf)
    for clip in CLIPS[scheme.bits]:
        scale = storable_scale(clip * (high / (2 * half - 1) - low / (2 * half - 1)), scheme)
        zero = ((low + high) / (-2 * scale) - 0.5).round_().clamp_(-half, half - 1)
        values = (groups / scale).round_().clamp_(-half - zero, half - 1 - zero) * scale
        error = (values.sub_(groups).square_() * share).sum(-1, keepdim=True)
        better = error <= least  # also where squares are beyond fp32, or too small for it
        best_scale, best_zero, least = (
            torch.where(better, *pair) for pair in ((scale, best_scale), (zero, best_zero), (error, least))
        )
    return Grid(best_scale.squeeze(-1).bfloat16(), best_zero.squeeze(-1).to(torch.int8))


def storable_scale(scale: Float[Tensor, "..."], scheme: QuantizationScheme) -> Float[Tensor, "..."]:
    """Return the nearest scale that a file can hold, above 0: bfloat16, and of calibrated weights half precision too.

    So a .gguf, whose scales are of half precision, can have the same integers.
    """
    if scheme.zero_point:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp((mantissa * 2**ZERO_BITS).round_(), exponent - ZERO_BITS)
    scale = scale.bfloat16().float()
    if scheme.calibrated:
        in_half = scale.half().float()
        scale = torch.where((in_half > 0) & in_half.isfinite(), in_half, scale)
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def nearest_integers(weight: Float[Tensor, "o i"], grid: Grid, bits: int) -> Int8[Tensor, "o i"]:
    """Return the integers whose values are nearest to these weights."""
    scale, zero = grid.per_weight(weight.shape[-1])
    half = 2 ** (bits - 1)
    return ((weight.float() / scale).round_() + zero).clamp_(-half, half - 1).to(torch.int8)


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


def pack_zeros(zero: Int8[Tensor, "o g"], bits: int) -> Int32[Tensor, "w g"]:
    """Side by side along o, the last word filled up."""
    return pack(F.pad(zero.T, (0, -len(zero) % (32 // bits))), bits).T.contiguous()


def dequantize(
    integers: Int8[Tensor, "... i"], scale: BFloat16[Tensor, "... g"], zero: Int8[Tensor, "... g"] | None = None
) -> Float[Tensor, "... i"]:
    """The weights that integers stand for, in fp32."""
    groups = integers.unflatten(-1, (scale.shape[-1], -1))
    steps = groups if zero is None else groups - zero[..., None]
    return steps.float().mul_(scale.float()[..., None]).flatten(-2)


class QuantizedWeight(nn.Module):
    """A matrix as integers, under the names that files have, yet to be filled; `old` is what it takes the place of."""

    def __init__(self, old: Float[Tensor, "o i"], scheme: QuantizationScheme) -> None:
        super().__init__()
        self.scheme, self.bits, self.dtype = scheme, scheme.bits, old.dtype
        self.out_features, self.in_features = o, i = old.shape
        groups = i // (scheme.group_size or i)
        self.weight_packed = frozen(old.new_empty((o, i * self.bits // 32), dtype=torch.int32))
        self.weight_scale = frozen(old.new_empty((o, groups), dtype=torch.bfloat16))
        words = -(-o * self.bits // 32)
        self.weight_zero_point = (
            frozen(old.new_empty((words, groups), dtype=torch.int32)) if scheme.zero_point else None
        )
        self.weight_shape = frozen(old.new_tensor((o, i), dtype=torch.int64))

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """What it stands for; made anew each time."""
        return self.dequantized(self.dtype)

    @property
    def integers(self) -> Int8[Tensor, "o i"]:
        return unpack(self.weight_packed, self.bits)

    @property
    def zero(self) -> Int8[Tensor, "o g"] | None:
        """What stands for 0 in each group; None where 0 itself does."""
        packed = self.weight_zero_point
        return None if packed is None else unpack(packed.T, self.bits).T[: self.out_features]

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        return dequantize(self.integers, self.weight_scale, self.zero).to(dtype)

    def quantize_from(self, weight: Float[Tensor, "o i"]) -> None:
        """Stand for the nearest to these weights."""
        grid = search_grid(weight, self.scheme)
        self.fill(nearest_integers(weight, grid, self.bits), grid)

    def fill(self, integers: Int8[Tensor, "o i"], grid: Grid) -> None:
        """Stand for these integers."""
        self.weight_packed.copy_(pack(integers, self.bits))
        self.weight_scale.copy_(grid.scale)
        if self.weight_zero_point is not None:
            self.weight_zero_point.copy_(pack_zeros(grid.zero, self.bits))


class QuantizedLinear(QuantizedWeight):
    """A linear layer over integers."""

    def __init__(self, old: nn.Linear, scheme: QuantizationScheme) -> None:
        super().__init__(old.weight, scheme)
        self.bias = old.bias

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.dequantized(x.dtype), self.bias)


class QuantizedEmbedding(QuantizedWeight):
    """An embedding over integers."""

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... i"]:
        return dequantize(unpack(self.weight_packed[ids], self.bits), self.weight_scale[ids]).to(self.dtype)


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
            layer = QuantizedEmbedding(checked_layer(name, old, end_scheme).weight, end_scheme)
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
    """Make every linear layer of a model one of integers. Raises ConfigError for what does not fit.

    Where a text is to choose integers, only embedding and head are filled.
    """
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    insert_quantized_layers(model, scheme)
    for name, layer in quantized_layers(model).items():
        if not layer.scheme.calibrated:
            layer.quantize_from(before[name].weight)


def changed_parameters(written_model: nn.Module, read_model: nn.Module) -> list[str]:
    """Return the parameters of a model read from a file that differ from those of the model that was written."""
    read_weights = dict(read_model.named_parameters())
    written_weights = {
        name: weight.bfloat16().float() if weight.dtype == torch.float32 else weight
        for name, weight in written_model.named_parameters()
    }
    return [name for name, weight in written_weights.items() if not torch.equal(weight, read_weights[name])]
