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
class Type:
    """One of ggml's types."""

    name: str
    number: int
    """In files: enum ggml_type."""
    size: int
    """Values in a block."""
    size_bytes: int
    """Bytes of a block."""
    decode: Callable[[Blocks], Values]
    encode: Callable[[Values], Blocks] | None = None
    """None for what is only read."""

    def bytes_of(self, values: int) -> int:
        """Bytes of so many values, a multiple of `size`."""
        return values // self.size * self.size_bytes

    def rounded(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What a tensor is after it was kept in this type."""
        return from_blocks(to_blocks(tensor, self), self, tuple(tensor.shape))


def to_blocks(tensor: Float[Tensor, "..."], kind: Type) -> UInt8[Tensor, " _"]:
    """The bytes of a tensor, whose last axis divides into blocks."""
    assert kind.encode is not None and tensor.shape[-1] % kind.size == 0
    return kind.encode(tensor.float().reshape(-1, kind.size)).reshape(-1)


def from_blocks(content: UInt8[Tensor, " _"], kind: Type, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """The tensor again, in fp32."""
    return kind.decode(content.reshape(-1, kind.size_bytes)).reshape(shape)


def plain(name: str, number: int, dtype: torch.dtype) -> Type:
    """A type of single values."""
    return Type(
        name,
        number,
        1,
        dtype.itemsize,
        lambda blocks: blocks.view(dtype).float(),
        lambda values: values.to(dtype).view(torch.uint8),
    )


def half(values: Values) -> Blocks:
    return values.half().view(torch.uint8)


def scale(blocks: Blocks) -> Float[Tensor, "n 1"]:
    return blocks.contiguous().view(torch.float16).float()


def reciprocal(d: Values) -> Values:
    """1 / d, and 0 where a block is all zeros."""
    return torch.where(d == 0, 0.0, 1.0 / d)


def encode_q8_0(values: Values) -> Blocks:
    d = values.abs().amax(-1, keepdim=True) / 127
    wanted = values * reciprocal(d)
    away = wanted.abs()  # C's roundf: halves away from zero
    floor = away.floor()
    rounded = (floor + (2 * (away - floor)).floor()) * wanted.sign()
    return torch.cat([half(d), rounded.to(torch.int8).view(torch.uint8)], -1)


def decode_q8_0(blocks: Blocks) -> Values:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * scale(blocks[:, :2])


def encode_q4_0(values: Values) -> Blocks:
    d = values.gather(-1, values.abs().argmax(-1, keepdim=True)) / -8
    q = (values * reciprocal(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat([half(d), q[:, :16] | q[:, 16:] << 4], -1)


def decode_q4_0(blocks: Blocks) -> Values:
    q = blocks[:, 2:]
    return (torch.cat([q & 15, q >> 4], -1).float() - 8) * scale(blocks[:, :2])


def decode_q6_k(blocks: Blocks) -> Values:
    """Low 4 bits of all, high 2 bits of all, 16 scales, d: dequantize_row_q6_K."""
    low, high, scales, d = blocks.split([128, 64, 16, 2], -1)
    low, high = low.reshape(-1, 2, 1, 64), high.reshape(-1, 2, 1, 32)
    low = torch.cat([low & 15, low >> 4], 2).reshape(-1, 256)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).reshape(-1, 256)
    q = (low | high << 4).float() - 32
    each = scales.contiguous().view(torch.int8).float() * scale(d)
    return (q.reshape(-1, 16, 16) * each[..., None]).reshape(-1, 256)


TYPES = {
    kind.name: kind
    for kind in (
        plain("f32", 0, torch.float32),
        plain("f16", 1, torch.float16),
        plain("bf16", 30, torch.bfloat16),
        Type("q8_0", 8, 32, 34, decode_q8_0, encode_q8_0),
        Type("q4_0", 2, 32, 18, decode_q4_0, encode_q4_0),
        Type("q6_K", 14, 256, 210, decode_q6_k),
    )
}
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
