"""A model's matrices as a processor multiplies a few tokens by them.

    LanguageModel -> packed -> Packed        q, k, v in one product; bias-free Llama in fp32 on a processor, or of
                                             integers (integers.py)
                            -> the model     everything else

A step of decoding reads every weight once, so memory's speed is its limit, and torch's own product of one row
reads well below it. MKL's batched product comes near it for one row or two, given a matrix as a batch of its blocks;
oneDNN's kernels for more, from a layout of their own. Measured in docs/performance.md.

Axes: b batch, t tokens, r rows, c in, n out, v vocabulary.

Matrices of integers in the order in which torch's kernels for a few tokens read them.

    8 bits  torch._weight_int8pack_mm             integers as they are
    4 bits  aten._weight_int4pack_mm_for_cpu      two in a byte, in an order of its own

Both multiply in bfloat16 and sum in fp32, and read a half or an eighth of what fp32 weights take. What they gain they
lose with many tokens, for which the matrix is unrolled once and multiplied as any other: docs/quantisation.md.

Axes: c in, n out, g groups.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smolforge.models.attention import Memory
from smolforge.models.decoder import MLP, Attention, Hidden, LanguageModel, RMSNorm, rotary, rotate
from smolforge.models.quantized import Integers, QuantizedLinear, unpack

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


FEW_ROWS = 2
"""That are multiplied by blocks; from three on the packed layout is as fast or faster."""
MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""Of a layer."""
ROWS_HINT = 16
"""What the layout is chosen for: 4 to 64 rows choose the same, one row another that is slower."""
MOST_BLOCKS = 8
"""Enough for as many threads; 2 to 32 are equally fast on two."""


@runtime_checkable
class Network(Protocol):
    """What decoding needs of a model: states of tokens, and what they say."""

    def hidden(self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "#b t"], memory: Memory) -> Hidden: ...

    def logits(self, hidden: Float[Tensor, "*n c"]) -> Float[Tensor, "*n v"]: ...


class Matrix:
    """Matrices (n c) that share their input, as one; copied only when more than a few rows meet it."""

    def __init__(self, *weights: Float[Tensor, "_ c"]) -> None:
        self.weights = [each.detach() for each in weights]

    def __call__(self, x: Float[Tensor, "... c"], then: str = "none") -> Float[Tensor, "... n"]:
        if not few(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, then, [], "")
        found = self.by_blocks(x)
        return F.silu(found) if then == "swish" else found

    def with_other(self, x: Float[Tensor, "... c"], other: Float[Tensor, "... n"], how: str) -> Float[Tensor, "... n"]:
        """The product plus (add) or times (mul) another of its shape."""
        if not few(x):
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, None, how)
        return self.by_blocks(x).add_(other) if how == "add" else self.by_blocks(x).mul_(other)

    def by_blocks(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... n"]:
        found = [by_blocks(x.flatten(0, -2), weight) for weight in self.weights]
        return (found[0] if len(found) == 1 else torch.cat(found, -1)).unflatten(0, x.shape[:-1])

    @cached_property
    def packed(self) -> Tensor:
        """In oneDNN's layout."""
        together = self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)
        return torch.ops.mkldnn._reorder_linear_weight(together, ROWS_HINT)


def few(x: Float[Tensor, "... c"]) -> bool:
    """Whether there are so few rows that blocks are faster, where there is what makes them so."""
    return x.numel() <= FEW_ROWS * x.shape[-1] and torch.backends.mkl.is_available()


def by_blocks(x: Float[Tensor, "r c"], weight: Float[Tensor, "n c"]) -> Float[Tensor, "r n"]:
    """x @ weight.T, the matrix as a batch of blocks of its rows."""
    blocks = math.gcd(len(weight), MOST_BLOCKS)
    parts = weight.view(blocks, -1, weight.shape[1])
    return torch.bmm(parts, x.T.expand(blocks, -1, -1)).flatten(0, 1).T


class Block:
    """One layer: what `model.Layer` computes, with fewer and larger operations."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_size = attention.head_size
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = laid_out(attention.q_proj, attention.k_proj, attention.v_proj)
        self.keys = attention.k_proj.out_features // self.head_size
        self.out = laid_out(attention.o_proj)
        self.gate, self.up, self.down = (laid_out(each) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def __call__(self, x: Hidden, angles: tuple[Tensor, Tensor], memory: Memory, number: int) -> Hidden:
        heads = self.qkv(normed(self.before, x)).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        q_and_k, v = heads[:, : -self.keys], heads[:, -self.keys :]
        turned = rotate(q_and_k, angles)
        found = memory.attend(number, turned[:, : -self.keys], turned[:, -self.keys :], v)
        x = self.out.with_other(found.transpose(1, 2).flatten(2), x, "add")
        y = normed(self.between, x)
        return self.down.with_other(self.up.with_other(y, self.gate(y, "swish"), "mul"), x, "add")


def laid_out(*layers: Any) -> Matrix | Kernel:
    """Linear layers, all of one kind, or an embedding whose rows are outputs, as one matrix."""
    return Kernel(*layers) if isinstance(layers[0], Integers) else Matrix(*(each.weight for each in layers))


class Packed:
    """A Network that says what its model says, to rounding, as long as its weights stay as they are."""

    def __init__(self, model: LanguageModel) -> None:
        self.config, self.embedding = model.config, model.model.embed_tokens
        self.blocks, self.norm = [Block(layer) for layer in model.model.layers], model.model.norm
        self.head = laid_out(model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head)

    def hidden(self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "#b t"], memory: Memory) -> Hidden:
        """Final states of each token."""
        x = self.embedding(ids)
        angles = rotary(self.config, positions, x.dtype)
        for number, block in enumerate(self.blocks):
            x = block(x, angles, memory, number)
        return normed(self.norm, x)

    def logits(self, hidden: Float[Tensor, "*n c"]) -> Float[Tensor, "*n v"]:
        """The head on states of any number of tokens."""
        return self.head(hidden)


def normed(norm: Any, x: Hidden) -> Hidden:
    """RMSNorm in fp32, in torch's own words."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def packed(model: LanguageModel) -> Network:
    """The model laid out for decoding, or itself where that is not known to be the same or faster."""
    return Packed(model) if packable(model) else model


def packable(model: LanguageModel) -> bool:
    """Whether every part is one that `Block` writes out: ours, unchanged, in fp32 on a processor with oneDNN."""
    head, layers = model.head, list[Any](model.model.layers)
    if not (head.device.type == "cpu" and head.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return False
    plain = all(
        type(layer.self_attn) is Attention
        and type(layer.mlp) is MLP
        and type(layer.input_layernorm) is type(layer.post_attention_layernorm) is RMSNorm
        and type(layer.self_attn.q_norm) is nn.Identity
        and all(multiplies(layer.get_submodule(name)) for name in MATRICES)
        for layer in layers
    )
    return plain and type(model.model.norm) is RMSNorm and not _hooked(model)


def multiplies(layer: nn.Module) -> bool:
    """Whether it is a product and nothing else, of a matrix that can be laid out."""
    return type(layer) is nn.Linear or (type(layer) is QuantizedLinear and layer.bias is None and has_kernel(layer))


def _hooked(model: LanguageModel) -> bool:
    """Whether someone listens to or changes what the modules say, which no other code may then pass by."""
    return any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
