"""Decode on a CPU: a model's matrices in the layouts in which a product with a few tokens is fast.

    LanguageModel -> prepack -> PrepackedModel   q, k, v in one product; bias-free Llama on a CPU, fp32 or quantized
                             -> the model        everything else

    fp32     1 or 2 rows   torch.bmm                           MKL, the matrix as a batch of its blocks
             more rows     mkldnn._linear_pointwise            oneDNN, from a layout of its own
    8 bits                 torch._weight_int8pack_mm           integers as they are
    4 bits                 aten._weight_int4pack_mm_for_cpu    two in a byte, in an order of its own

A step of decoding reads every weight once, so the speed of memory is its limit, and torch's own product of one row
reads well below it. Measured in docs/performance.md. The integer kernels multiply in bfloat16, sum in fp32, and read a
half or an eighth of what fp32 weights take. With many tokens they lose, so the matrix is dequantized once and
multiplied as any other: docs/quantization.md.

Axes: b batch, t tokens, r rows, c in, n out, g groups, v vocabulary.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smolforge.models.attention import AttentionContext
from smolforge.models.decoder import MLP, Attention, Hidden, LanguageModel, RMSNorm, apply_rope, rope_cos_sin
from smolforge.models.quantized import QuantizedLinear, QuantizedWeight

MAX_BLOCKED_ROWS = 2
"""Up to this many rows are multiplied by blocks; from three on the prepacked layout is as fast or faster."""
LINEAR_NAMES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""The linear modules of a layer."""
ROWS_HINT = 16
"""Rows for which oneDNN chooses its layout: 4 to 64 give the same, one row another that is slower."""
MAX_BLOCKS = 8
"""Blocks of a matrix: enough for as many threads; 2 to 32 are equally fast on two."""
MAX_INT_TOKENS = 16
"""Up to this many tokens the integer kernels are faster than a product in fp32."""
INT4_GROUP_SIZES, INT4_OUTPUT_MULTIPLE = (32, 64, 128, 256), 32
"""What the 4-bit kernel takes: these group sizes, and a multiple of this many outputs."""


@runtime_checkable
class DecodingModel(Protocol):
    """What decoding needs of a model: hidden states of tokens, and their logits."""

    def hidden_states(
        self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "#b t"], context: AttentionContext
    ) -> Hidden: ...

    def logits(self, hidden: Float[Tensor, "*n c"]) -> Float[Tensor, "*n v"]: ...


class PrepackedLinear:
    """Matrices (n c) that share their input, as one; copied only when more than a few rows are multiplied."""

    def __init__(self, *weights: Float[Tensor, "_ c"]) -> None:
        self.weights = [weight.detach() for weight in weights]

    def __call__(self, x: Float[Tensor, "... c"], activation: str = "none") -> Float[Tensor, "... n"]:
        if not use_blocked_matmul(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.prepacked_weight, None, activation, [], "")
        output = self.blocked_matmul(x)
        return F.silu(output) if activation == "swish" else output

    def fused_binary(
        self, x: Float[Tensor, "... c"], other: Float[Tensor, "... n"], operation: str
    ) -> Float[Tensor, "... n"]:
        """The product plus (add) or times (mul) another of its shape."""
        if not use_blocked_matmul(x):
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.prepacked_weight, None, operation)
        return self.blocked_matmul(x).add_(other) if operation == "add" else self.blocked_matmul(x).mul_(other)

    def blocked_matmul(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... n"]:
        outputs = [blocked_matmul(x.flatten(0, -2), weight) for weight in self.weights]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)).unflatten(0, x.shape[:-1])

    @cached_property
    def prepacked_weight(self) -> Tensor:
        """In oneDNN's layout."""
        matrix = self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)
        return torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS_HINT)


def use_blocked_matmul(x: Float[Tensor, "... c"]) -> bool:
    """Whether there are so few rows that blocks are faster, where there is what makes them so."""
    return x.numel() <= MAX_BLOCKED_ROWS * x.shape[-1] and torch.backends.mkl.is_available()


def blocked_matmul(x: Float[Tensor, "r c"], weight: Float[Tensor, "n c"]) -> Float[Tensor, "r n"]:
    """x @ weight.T, the matrix as a batch of blocks of its rows."""
    blocks = math.gcd(len(weight), MAX_BLOCKS)
    parts = weight.view(blocks, -1, weight.shape[1])
    return torch.bmm(parts, x.T.expand(blocks, -1, -1)).flatten(0, 1).T


class IntLinear:
    """Quantized matrices (n c) that share their input, as one."""

    def __init__(self, *layers: QuantizedWeight) -> None:
        self.layers, group = layers, group_size_of(layers[0])
        integers = torch.cat([layer.integers for layer in layers])
        scale = torch.cat([layer.weight_scale for layer in layers])
        if layers[0].bits == 8:
            scale = scale.flatten()
            self.matmul: Callable[[Tensor], Tensor] = lambda x: torch._weight_int8pack_mm(x, integers, scale)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int() + 8, 1)
            zeros = [torch.zeros_like(layer.weight_scale) if (zero := layer.zero) is None else zero for layer in layers]
            scale_and_offset = torch.stack([scale, -scale * torch.cat(zeros)], -1).transpose(0, 1).contiguous()  # g n 2
            self.matmul = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale_and_offset)

    def __call__(self, x: Float[Tensor, "... c"], activation: str = "none") -> Float[Tensor, "... n"]:
        rows = x.flatten(0, -2)
        if len(rows) > MAX_INT_TOKENS:
            output = torch.cat([F.linear(x, layer.dequantized(x.dtype)) for layer in self.layers], -1)
        else:
            output = self.matmul(rows.bfloat16()).to(x.dtype).unflatten(0, x.shape[:-1])
        return F.silu(output) if activation == "swish" else output

    def fused_binary(
        self, x: Float[Tensor, "... c"], other: Float[Tensor, "... n"], operation: str
    ) -> Float[Tensor, "... n"]:
        """The product plus (add) or times (mul) another of its shape."""
        return self(x).add_(other) if operation == "add" else self(x).mul_(other)


def group_size_of(layer: QuantizedWeight) -> int:
    return layer.in_features // layer.weight_scale.shape[1]


def has_int_kernel(layer: object) -> bool:
    """Whether an integer kernel multiplies by this layer."""
    if not isinstance(layer, QuantizedWeight):
        return False
    if layer.bits == 8:
        return layer.weight_scale.shape[1] == 1
    return group_size_of(layer) in INT4_GROUP_SIZES and layer.out_features % INT4_OUTPUT_MULTIPLE == 0


class PrepackedLayer:
    """One layer: what `decoder.DecoderLayer` computes, with fewer and larger operations."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = attention.head_dim
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv_proj = prepack_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.num_key_value_heads = attention.k_proj.out_features // self.head_dim
        self.o_proj = prepack_linear(attention.o_proj)
        self.gate_proj, self.up_proj, self.down_proj = (
            prepack_linear(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )

    def __call__(self, x: Hidden, cos_sin: tuple[Tensor, Tensor], context: AttentionContext, layer: int) -> Hidden:
        heads = self.qkv_proj(rms_norm(self.input_layernorm, x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_and_k, v = heads[:, : -self.num_key_value_heads], heads[:, -self.num_key_value_heads :]
        rotated = apply_rope(q_and_k, cos_sin)
        attended = context.attend(
            layer, rotated[:, : -self.num_key_value_heads], rotated[:, -self.num_key_value_heads :], v
        )
        x = self.o_proj.fused_binary(attended.transpose(1, 2).flatten(2), x, "add")
        y = rms_norm(self.post_attention_layernorm, x)
        return self.down_proj.fused_binary(self.up_proj.fused_binary(y, self.gate_proj(y, "swish"), "mul"), x, "add")


def prepack_linear(*layers: Any) -> PrepackedLinear | IntLinear:
    """Prepack linear layers, all of one kind, or an embedding whose rows are outputs, as one matrix."""
    return (
        IntLinear(*layers)
        if isinstance(layers[0], QuantizedWeight)
        else PrepackedLinear(*(layer.weight for layer in layers))
    )


class PrepackedModel:
    """A DecodingModel with the logits of its model, to rounding, as long as the weights do not change."""

    def __init__(self, model: LanguageModel) -> None:
        self.config, self.embed_tokens = model.config, model.model.embed_tokens
        self.layers, self.norm = [PrepackedLayer(layer) for layer in model.model.layers], model.model.norm
        self.lm_head = prepack_linear(model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head)

    def hidden_states(
        self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "#b t"], context: AttentionContext
    ) -> Hidden:
        """Final states of each token."""
        x = self.embed_tokens(ids)
        cos_sin = rope_cos_sin(self.config, positions, x.dtype)
        for number, block in enumerate(self.layers):
            x = block(x, cos_sin, context, number)
        return rms_norm(self.norm, x)

    def logits(self, hidden: Float[Tensor, "*n c"]) -> Float[Tensor, "*n v"]:
        """The head on states of any number of tokens."""
        return self.lm_head(hidden)


def rms_norm(norm: Any, x: Hidden) -> Hidden:
    """Apply RMSNorm in fp32 with torch's function."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def prepack(model: LanguageModel) -> DecodingModel:
    """Return the model prepacked for decoding, or the model itself where that is not known to be the same or faster."""
    return PrepackedModel(model) if can_prepack(model) else model


def can_prepack(model: LanguageModel) -> bool:
    """Whether `PrepackedLayer` computes every part: ours, unchanged, in fp32 on a CPU with oneDNN."""
    head, layers = model.lm_head_weight, list[Any](model.model.layers)
    if not (head.device.type == "cpu" and head.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return False
    plain = all(
        type(layer.self_attn) is Attention
        and type(layer.mlp) is MLP
        and type(layer.input_layernorm) is type(layer.post_attention_layernorm) is RMSNorm
        and type(layer.self_attn.q_norm) is nn.Identity
        and all(can_prepack_linear(layer.get_submodule(name)) for name in LINEAR_NAMES)
        for layer in layers
    )
    return plain and type(model.model.norm) is RMSNorm and not _has_hooks(model)


def can_prepack_linear(layer: nn.Module) -> bool:
    """Whether a module is a product and nothing else, of a matrix that can be prepacked."""
    if type(layer) is QuantizedLinear:
        return layer.bias is None and has_int_kernel(layer)
    return type(layer) is nn.Linear and layer.bias is None


def _has_hooks(model: LanguageModel) -> bool:
    """Whether a module has forward hooks, which the prepacked model would not call."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
