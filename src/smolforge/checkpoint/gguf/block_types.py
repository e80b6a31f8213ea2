"""How ggml keeps numbers: a row of a tensor is blocks, each of so many values in so many bytes.

    f32 f16 bf16   one value a block
    q8_0           d | q0 ... q31              32 values, q * d: a half-precision scale and 8 bits each
    q4_0           d | q16 q0 | q17 q1 | ...   32 values, (q - 8) * d: 4 bits each, the first 16 in the low halves
    q6_K           256 values in 16 groups with a scale of their own; read only, for the head of others' q4_0 files

Rounding is that of ggml's reference (ggml-quants.c: quantize_row_q8_0_ref, quantize_row_q4_0_ref), to the bit.
Axes: n blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Values = Float[Tensor, "n _"]
Blocks = UInt8[Tensor, "n _"]


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
    decode: Callable[[Blocks], Values]
    encode: Callable[[Values], Blocks] | None = None
    """None for what is only read."""

    def nbytes(self, values: int) -> int:
        """Return the bytes of this many values, a multiple of `size`."""
        return values // self.block_size * self.type_size

    def round_trip(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What a tensor is after it was kept in this type."""
        return from_blocks(to_blocks(tensor, self), self, tuple(tensor.shape))


def to_blocks(tensor: Float[Tensor, "..."], kind: BlockType) -> UInt8[Tensor, " _"]:
    """The bytes of a tensor, whose last axis divides into blocks."""
    assert kind.encode is not None and tensor.shape[-1] % kind.block_size == 0
    return kind.encode(tensor.float().reshape(-1, kind.block_size)).reshape(-1)


def from_blocks(content: UInt8[Tensor, " _"], kind: BlockType, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """The tensor again, in fp32."""
    return kind.decode(content.reshape(-1, kind.type_size)).reshape(shape)


def scalar_type(name: str, number: int, dtype: torch.dtype) -> BlockType:
    """A type of single values."""
    return BlockType(
        name,
        number,
        1,
        dtype.itemsize,
        lambda blocks: blocks.view(dtype).float(),
        lambda values: values.to(dtype).view(torch.uint8),
    )


def encode_scale(values: Values) -> Blocks:
    return values.half().view(torch.uint8)


def decode_scale(blocks: Blocks) -> Float[Tensor, "n 1"]:
    return blocks.contiguous().view(torch.float16).float()


def reciprocal(d: Values) -> Values:
    """1 / d, and 0 where a block is all zeros."""
    return torch.where(d == 0, 0.0, 1.0 / d)


def encode_q8_0(values: Values) -> Blocks:
    d = values.abs().amax(-1, keepdim=True) / 127
    scaled = values * reciprocal(d)
    magnitude = scaled.abs()  # C's roundf: halves away from zero
    floor = magnitude.floor()
    rounded = (floor + (2 * (magnitude - floor)).floor()) * scaled.sign()
    return torch.cat([encode_scale(d), rounded.to(torch.int8).view(torch.uint8)], -1)


def decode_q8_0(blocks: Blocks) -> Values:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * decode_scale(blocks[:, :2])


def encode_q4_0(values: Values) -> Blocks:
    d = values.gather(-1, values.abs().argmax(-1, keepdim=True)) / -8
    q = (values * reciprocal(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat([encode_scale(d), q[:, :16] | q[:, 16:] << 4], -1)


def decode_q4_0(blocks: Blocks) -> Values:
    q = blocks[:, 2:]
    return (torch.cat([q & 15, q >> 4], -1).float() - 8) * decode_scale(blocks[:, :2])


def decode_q6_k(blocks: Blocks) -> Values:
    """Low 4 bits of all, high 2 bits of all, 16 scales, d: dequantize_row_q6_K."""
    low, high, scales, d = blocks.split([128, 64, 16, 2], -1)
    low, high = low.reshape(-1, 2, 1, 64), high.reshape(-1, 2, 1, 32)
    low = torch.cat([low & 15, low >> 4], 2).reshape(-1, 256)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).reshape(-1, 256)
    q = (low | high << 4).float() - 32
    group_scales = scales.contiguous().view(torch.int8).float() * decode_scale(d)
    return (q.reshape(-1, 16, 16) * group_scales[..., None]).reshape(-1, 256)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        scalar_type("f32", 0, torch.float32),
        scalar_type("f16", 1, torch.float16),
        scalar_type("bf16", 30, torch.bfloat16),
        BlockType("q8_0", 8, 32, 34, decode_q8_0, encode_q8_0),
        BlockType("q4_0", 2, 32, 18, decode_q4_0, encode_q4_0),
        BlockType("q6_K", 14, 256, 210, decode_q6_k),
    )
}
BLOCK_TYPE_BY_NUMBER = {kind.type_id: kind for kind in BLOCK_TYPES.values()}
