"""Matrices of integers in the order in which torch's kernels for a few tokens read them.

    8 bits  torch._weight_int8pack_mm             integers as they are
    4 bits  aten._weight_int4pack_mm_for_cpu      two in a byte, in an order of its own

Both multiply in bfloat16 and sum in fp32, and read a half or an eighth of what fp32 weights take. What they gain they
lose with many tokens, for which the matrix is unrolled once and multiplied as any other: docs/quantisation.md.

Axes: c in, n out, g groups.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smolforge.quantized import Integers, unpack

MOST_TOKENS = 16
"""For which the kernels are faster than a product in fp32."""
GROUPS, OUTPUTS = (32, 64, 128, 256), 32
"""What the kernel of 4 bits takes: these groups, and outputs in multiples of so many."""


class Kernel:
    """Quantised matrices (n c) that share their input, as one."""

    def __init__(self, *layers: Integers) -> None:
        self.layers, group = layers, group_of(layers[0])
        integers = torch.cat([unpack(each.weight_packed, each.bits) for each in layers])
        scale = torch.cat([each.weight_scale for each in layers])
        if layers[0].bits == 8:
            self.weight, self.scale = integers, scale.flatten()
        else:
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int() + 8, 1)
            self.scale = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()  # g n 2
        self.multiply: Callable[[Tensor], Tensor] = self._8_bits if layers[0].bits == 8 else self._4_bits(group)

    def _8_bits(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)

    def _4_bits(self, group: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, group, self.scale)

    def __call__(self, x: Float[Tensor, "... c"], then: str = "none") -> Float[Tensor, "... n"]:
        rows = x.flatten(0, -2)
        if len(rows) > MOST_TOKENS:
            found = torch.cat([F.linear(x, each.matrix(x.dtype)) for each in self.layers], -1)
        else:
            found = self.multiply(rows.bfloat16()).to(x.dtype).unflatten(0, x.shape[:-1])
        return F.silu(found) if then == "swish" else found

    def with_other(self, x: Float[Tensor, "... c"], other: Float[Tensor, "... n"], how: str) -> Float[Tensor, "... n"]:
        """The product plus (add) or times (mul) another of its shape."""
        return self(x).add_(other) if how == "add" else self(x).mul_(other)


def group_of(layer: Integers) -> int:
    return layer.in_features // layer.weight_scale.shape[1]


def has_kernel(layer: object) -> bool:
    """Whether there is a kernel that multiplies by it."""
    if not isinstance(layer, Integers):
        return False
    if layer.bits == 8:
        return layer.weight_scale.shape[1] == 1
    return group_of(layer) in GROUPS and layer.out_features % OUTPUTS == 0
