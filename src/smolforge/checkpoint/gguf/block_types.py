"""How ggml keeps numbers: a row of a tensor is blocks, each of so many values in so many bytes.

    f32 f16 bf16   one value a block
    q8_0 q5_0 q4_0 32 values: a half-precision scale, and 8, 5 or 4 bits each
    q5_1 q4_1      32 values: a half-precision scale and minimum, and 5 or 4 bits each
    q2_K to q6_K   256 values in groups of 16 or 32 with small scales of their own
    iq4_nl iq4_xs  4 bits each, which choose one of 16 values that are not evenly spaced; xs by 256 with small scales

K and iq types are read only: llama-quantize writes them.

The gguf package rounds as ggml's reference does, bit-for-bit.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types."""

    name: str
    type_id: int
    """In files: enum ggml_type."""
    block_size: int
    """Values in a block."""
    type_size: int
    """Bytes of a block."""
    dtype: torch.dtype | None = None
    """The same numbers in torch; None for blocks of several values."""

    def nbytes(self, values: int) -> int:
        """Return the bytes of this many values, a multiple of `block_size`."""
        return values // self.block_size * self.type_size

    def round_trip(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return what a tensor is after it was kept in this type."""
        return from_blocks(to_blocks(tensor, self), self, tuple(tensor.shape))


def type_name(number: int) -> str:
    """Return what people call one of ggml's types, read here or not."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(number).name if number in list(GGMLQuantizationType) else f"type {number}"


def to_blocks(tensor: Float[Tensor, "..."], kind: BlockType) -> UInt8[Tensor, " _"]:
    """Return the bytes of a tensor, whose last axis divides into blocks."""
    if kind.dtype is not None:
        return tensor.to(kind.dtype).reshape(-1).view(torch.uint8)
    from gguf import GGMLQuantizationType, quants

    values = tensor.detach().float().numpy()
    with np.errstate(all="ignore"):  # a scale out of range is infinite, as in C
        return torch.from_numpy(quants.quantize(values, GGMLQuantizationType(kind.type_id)).reshape(-1))


def from_blocks(content: UInt8[Tensor, " _"], kind: BlockType, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Return the tensor again, in fp32."""
    if kind.dtype is not None:
        return content.view(kind.dtype).float().reshape(shape)
    from gguf import GGMLQuantizationType, quants

    rows = content.reshape(-1, kind.nbytes(shape[-1])).numpy()
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType(kind.type_id))).reshape(shape)


def encode_4_bits(
    integers: Int8[Tensor, "o i"], scale: Float[Tensor, "o g"], zero: Int8[Tensor, "o g"] | None
) -> UInt8[Tensor, "o b"]:
    """Return integers with a scale for each 32 as blocks, a row each output: q4_0, or with a zero q4_1.

    Where the scale, times the zero, is exact in half precision, the blocks hold (integers - zero) x scale.
    """
    raised = (integers + 8).view(torch.uint8).unflatten(-1, (-1, 2, 16))
    halves = raised[:, :, 0] | raised[:, :, 1] << 4
    factors = [scale.float()] if zero is None else [scale.float(), -scale.float() * (8 + zero)]
    return torch.cat([torch.stack(factors, -1).half().view(torch.uint8), halves], -1).flatten(1)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("f32", 0, 1, 4, torch.float32),
        BlockType("f16", 1, 1, 2, torch.float16),
        BlockType("bf16", 30, 1, 2, torch.bfloat16),
        BlockType("q4_0", 2, 32, 18),
        BlockType("q4_1", 3, 32, 20),
        BlockType("q5_0", 6, 32, 22),
        BlockType("q5_1", 7, 32, 24),
        BlockType("q8_0", 8, 32, 34),
        BlockType("q2_K", 10, 256, 84),
        BlockType("q3_K", 11, 256, 110),
        BlockType("q4_K", 12, 256, 144),
        BlockType("q5_K", 13, 256, 176),
        BlockType("q6_K", 14, 256, 210),
        BlockType("iq4_nl", 20, 32, 18),
        BlockType("iq4_xs", 23, 256, 136),
    )
}
BLOCK_TYPE_BY_NUMBER = {kind.type_id: kind for kind in BLOCK_TYPES.values()}
