"""A model's matrices in the order in which a processor multiplies a few tokens by them.

    LanguageModel -> packed -> Packed        q, k, v in one product; bias-free Llama in fp32 on a processor
                            -> the model     everything else

A step of decoding reads every weight once, so memory's speed is its limit, and torch's own product of one row
reads well below it. oneDNN's kernels come near it, from a layout of their own, as soon as there are four rows:
so rows are added until there are. Measured in docs/performance.md.

Axes: b batch, t tokens, r rows at least `LEAST_ROWS`, c in, n out, v vocabulary.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smolforge.memory import Heads, KeyHeads, Memory
from smolforge.model import MLP, Attention, Hidden, LanguageModel, RMSNorm, rotary, rotate

LEAST_ROWS = 4
MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""Of a layer."""
ROWS_HINT = 16
"""What the layout is chosen for: 4 to 64 rows choose the same, one row another that is slower."""


@runtime_checkable
class Network(Protocol):
    """What decoding needs of a model: states of tokens, and what they say."""

    def hidden(self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "#b t"], memory: Memory) -> Hidden: ...

    def logits(self, hidden: Float[Tensor, "*n c"]) -> Float[Tensor, "*n v"]: ...


class Matrix:
    """Matrices (n c) that share their input, as one, in oneDNN's layout."""

    def __init__(self, *weights: Float[Tensor, "_ c"]) -> None:
        together = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(together.detach(), ROWS_HINT)

    def __call__(self, x: Float[Tensor, "... c"], then: str = "none") -> Float[Tensor, "... n"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, then, [], "")

    def with_other(self, x: Float[Tensor, "... c"], other: Float[Tensor, "... n"], how: str) -> Float[Tensor, "... n"]:
        """The product plus (add) or times (mul) another of its shape."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, None, how)


class Block:
    """One layer: what `model.Layer` computes, with fewer and larger operations."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_size = attention.head_size
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = Matrix(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self.keys = attention.k_proj.out_features // self.head_size
        self.out = Matrix(attention.o_proj.weight)
        self.gate, self.up, self.down = (Matrix(each.weight) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def __call__(self, x: Hidden, angles: tuple[Tensor, Tensor], memory: "Rows", number: int) -> Hidden:
        heads = self.qkv(normed(self.before, x)).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        q_and_k, v = heads[:, : -self.keys], heads[:, -self.keys :]
        turned = rotate(q_and_k, angles)
        found = memory.attend(number, turned[:, : -self.keys], turned[:, -self.keys :], v)
        x = self.out.with_other(found.transpose(1, 2).flatten(2), x, "add")
        y = normed(self.between, x)
        return self.down.with_other(self.up.with_other(y, self.gate(y, "swish"), "mul"), x, "add")


class Packed:
    """A Network that says what its model says, to rounding. It holds a copy of the matrices as they were."""

    def __init__(self, model: LanguageModel) -> None:
        self.config, self.embedding = model.config, model.model.embed_tokens
        self.blocks, self.norm = [Block(layer) for layer in model.model.layers], model.model.norm
        self.head = Matrix(model.head)

    def hidden(self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "#b t"], memory: Memory) -> Hidden:
        """Final states of each token."""
        rows, added = len(ids), added_rows(*ids.shape)
        ids, positions = (F.pad(each, (0, 0, 0, added)) for each in (ids, positions.expand(rows, -1)))
        x = self.embedding(ids)
        angles, memory = rotary(self.config, positions, x.dtype), Rows(memory, rows, added)
        for number, block in enumerate(self.blocks):
            x = block(x, angles, memory, number)
        return normed(self.norm, x)[:rows]

    def logits(self, hidden: Float[Tensor, "*n c"]) -> Float[Tensor, "*n v"]:
        """The head on states of any number of tokens."""
        states = hidden.flatten(0, -2)
        added = F.pad(states, (0, 0, 0, added_rows(len(states), 1)))
        return self.head(added)[: len(states)].unflatten(0, hidden.shape[:-1])


class Rows:
    """A memory that hears of the first rows alone; the added ones attend to nothing."""

    def __init__(self, memory: Memory, rows: int, added: int) -> None:
        self.memory, self.rows, self.added = memory, rows, added

    def attend(self, layer: int, q: Heads, k: KeyHeads, v: KeyHeads, window: int | None = None) -> Heads:
        if not self.added:
            return self.memory.attend(layer, q, k, v, window)
        q, k, v = (each[: self.rows] for each in (q, k, v))
        found = self.memory.attend(layer, q, k, v, window)
        return F.pad(found, (0, 0, 0, 0, 0, 0, 0, self.added))


def added_rows(rows: int, length: int) -> int:
    """Rows of so many tokens to add, for a product to have `LEAST_ROWS` tokens."""
    return max(0, -(-LEAST_ROWS // length) - rows) if rows else 0


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
        and all(type(layer.get_submodule(name)) is nn.Linear for name in MATRICES)
        for layer in layers
    )
    return plain and type(model.model.norm) is RMSNorm and not _hooked(model)


def _hooked(model: LanguageModel) -> bool:
    """Whether someone listens to or changes what the modules say, which no other code may then pass by."""
    return any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
