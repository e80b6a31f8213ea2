"""A second, simple implementation of the architecture, with common mistakes as options.

If a model's logits are wrong, each known mistake is made here on purpose; the one that gives the same logits is the
most likely cause. One row, no KV cache, not fast: nothing of smolforge.models is used.

Axes: t tokens, n heads, d head width, f pairs of its channels, c hidden, v vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.config import ModelConfig

Weights = Mapping[str, Tensor]
Hidden = Float[Tensor, "t c"]
Heads = Float[Tensor, "n t d"]


@dataclass(frozen=True)
class ReferenceOptions:
    """One way to interpret a file's weights; the defaults are the correct one."""

    rope_theta: float | None = None
    rope_scaling: bool = True
    eps: float | None = None
    interleaved: bool = False
    rotation_axis: Literal["tokens", "heads", "nothing"] = "tokens"
    causal: bool = True
    grouped: bool = True
    swapped: tuple[str, str] | None = None
    scaled_embedding: bool = False
    head: Literal["as said", "embedding", "own"] = "as said"
    qk_norm: bool = True


CORRECT = ReferenceOptions()
THETAS = (10_000.0, 50_000.0, 100_000.0, 130_000.0, 500_000.0, 1_000_000.0)
EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)


def mistakes(config: ModelConfig) -> dict[str, ReferenceOptions]:
    """Return every mistake that is possible for this shape, by the name it is reported under."""
    eps = config.norm_epsilon if "norm_epsilon" in config.family_fields() else config.rms_norm_eps
    variants = {
        "interleaved rotation (channels 2i and 2i + 1 are paired instead of i and i + d/2)": ReferenceOptions(
            interleaved=True
        ),
        "rotation along the heads instead of the tokens": ReferenceOptions(rotation_axis="heads"),
        "no rotation at all": ReferenceOptions(rotation_axis="nothing"),
        "no causal mask": ReferenceOptions(causal=False),
        "k_proj and v_proj swapped": ReferenceOptions(swapped=("k_proj", "v_proj")),
        "q_proj and o_proj swapped": ReferenceOptions(swapped=("q_proj", "o_proj")),
        "gate_proj and up_proj swapped": ReferenceOptions(swapped=("gate_proj", "up_proj")),
        "the two norms of a layer swapped": ReferenceOptions(swapped=("input_layernorm", "post_attention_layernorm")),
        "embedding multiplied by the root of hidden_size": ReferenceOptions(scaled_embedding=True),
    }
    variants |= {f"wrong theta: rope_theta {theta:g} fits": ReferenceOptions(rope_theta=theta) for theta in THETAS}
    variants |= {f"wrong eps: {other:g} fits": ReferenceOptions(eps=other) for other in EPSILONS if other != eps}
    if config.rope_scaling.factor is not None:
        variants[f"rotary scaling of type {config.rope_scaling.rope_type} left out"] = ReferenceOptions(
            rope_scaling=False
        )
    if config.num_key_value_heads not in (1, config.num_attention_heads):
        variants["wrong head grouping (query head i reads key head i % k instead of i // group)"] = ReferenceOptions(
            grouped=False
        )
    if config.model_type == "qwen3":
        variants["no norms on queries and keys"] = ReferenceOptions(qk_norm=False)
    other_head: Literal["embedding", "own"] = "own" if config.tie_word_embeddings else "embedding"
    variants["wrong head: " + ("lm_head is not tied" if other_head == "own" else "untied head, the embedding fits")] = (
        ReferenceOptions(head=other_head)
    )
    return {name: options for name, options in variants.items() if options.rope_theta != config.rope_theta}


def logits(
    weights: Weights, config: ModelConfig, ids: Int[Tensor, " t"], *, options: ReferenceOptions = CORRECT
) -> Tensor:
    """Return next-token logits (t, v) of one row. Raises KeyError or RuntimeError if options do not fit the weights."""
    if options.swapped:
        weights = swap_parts(weights, *options.swapped)
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[ids] * (math.sqrt(config.hidden_size) if options.scaled_embedding else 1.0)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        inner = norm(weights, f"{layer}.input_layernorm", x, config=config, options=options)
        x = x + attention(weights, f"{layer}.self_attn", inner, config=config, options=options)
        inner = norm(weights, f"{layer}.post_attention_layernorm", x, config=config, options=options)
        x = x + feed_forward(weights, f"{layer}.mlp", inner, config=config)
    is_untied = options.head == "own" or (options.head == "as said" and not config.tie_word_embeddings)
    return (
        norm(weights, "model.norm", x, config=config, options=options)
        @ (weights["lm_head.weight"] if is_untied else embedding).T
    )


def attention(weights: Weights, name: str, x: Hidden, *, config: ModelConfig, options: ReferenceOptions) -> Hidden:
    """Return attention: each head's queries against its group's keys, softmax, the weighted sum of values."""
    q, k, v = (
        (x @ weights[f"{name}.{letter}_proj.weight"].T + weights.get(f"{name}.{letter}_proj.bias", 0))
        .unflatten(-1, (-1, config.resolved_head_dim))
        .transpose(0, 1)
        for letter in "qkv"
    )
    if f"{name}.q_norm.weight" in weights and options.qk_norm:
        q, k = (
            rms_norm(heads, weights[f"{name}.{letter}_norm.weight"], config, options=options)
            for heads, letter in ((q, "q"), (k, "k"))
        )
    q, k = apply_rotation(q, config, options), apply_rotation(k, config, options)
    group = config.num_attention_heads // config.num_key_value_heads
    k, v = (heads.repeat_interleave(group, 0) if options.grouped else heads.repeat(group, 1, 1) for heads in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(config.resolved_head_dim)
    if options.causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ weights[f"{name}.o_proj.weight"].T


def apply_rotation(x: Heads, config: ModelConfig, options: ReferenceOptions) -> Heads:
    """Rotate pairs of channels by position times theta^(-2i/d)."""
    if options.rotation_axis == "nothing":
        return x
    n, t, d = x.shape
    theta = options.rope_theta or config.rope_theta
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if options.rope_scaling:
        frequency = frequency / frequency_divisors(frequency, config)
    position = torch.arange(t)[None, :, None] if options.rotation_axis == "tokens" else torch.arange(n)[:, None, None]
    turn = torch.polar(torch.ones((), dtype=torch.float64), position * frequency)
    pairs = x.double().unflatten(-1, (-1, 2) if options.interleaved else (2, -1))
    pairs = pairs if options.interleaved else pairs.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned if options.interleaved else turned.transpose(-1, -2)).flatten(-2).to(x.dtype)


def frequency_divisors(frequency: Float[Tensor, " f"], config: ModelConfig) -> Float[Tensor, " f"]:
    """Return by what rotary scaling divides each frequency."""
    scaling = config.rope_scaling
    divisors = torch.full_like(frequency, scaling.factor or 1.0)
    if scaling.rope_type == "llama3":
        low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
        assert low is not None and high is not None and context is not None
        unchanged = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return 1 / (unchanged + (1 - unchanged) / divisors)
    return divisors


def norm(weights: Weights, name: str, x: Hidden, *, config: ModelConfig, options: ReferenceOptions) -> Hidden:
    """Apply the norm of the model's family to the residual stream."""
    scale, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is None:
        return rms_norm(x, scale, config, options=options)
    return F.layer_norm(x, x.shape[-1:], scale, bias, options.eps or config.norm_epsilon)


def rms_norm(x: Tensor, scale: Tensor, config: ModelConfig, *, options: ReferenceOptions) -> Tensor:
    return scale * x / (x.square().mean(-1, keepdim=True) + (options.eps or config.rms_norm_eps)).sqrt()


def feed_forward(weights: Weights, name: str, x: Hidden, *, config: ModelConfig) -> Hidden:
    """Return the feed-forward layer of the model's family, which the names of its weights tell."""
    if f"{name}.c_fc.weight" in weights:
        inner = F.gelu(x @ weights[f"{name}.c_fc.weight"].T, approximate="tanh")
        return inner @ weights[f"{name}.c_proj.weight"].T
    if f"{name}.gate.weight" not in weights:
        return swiglu(x, (weights[f"{name}.{projection}_proj.weight"] for projection in ("gate", "up", "down")))
    share, expert_ids = (x @ weights[f"{name}.gate.weight"].T).softmax(-1).topk(config.num_experts_per_tok)
    share = share / share.sum(-1, keepdim=True)
    matrices = [weights[f"{name}.experts.{projection}_proj"] for projection in ("gate", "up", "down")]
    rows = [
        sum(part * swiglu(token, (matrix[int(e)] for matrix in matrices)) for part, e in zip(*picked, strict=True))
        for token, picked in zip(x, zip(share, expert_ids, strict=True), strict=True)
    ]
    return torch.stack([torch.as_tensor(row) for row in rows])


def swiglu(x: Float[Tensor, "*t c"], projections: Iterable[Tensor]) -> Float[Tensor, "*t c"]:
    gate, up, down = projections
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def swap_parts(weights: Weights, one: str, other: str) -> dict[str, Tensor]:
    """Return the weights with two parts of their names swapped everywhere."""

    def new_name(name: str) -> str:
        parts = name.split(".")
        return ".".join({one: other, other: one}.get(part, part) for part in parts)

    return {new_name(name): weight for name, weight in weights.items()}


def swap_layers(weights: Weights, one: int, other: int) -> dict[str, Tensor]:
    """Return the weights with two layers swapped."""

    def new_name(name: str) -> str:
        head, _, suffix = name.partition("model.layers.")
        number, _, tail = suffix.partition(".")
        swap = {str(one): other, str(other): one}
        return f"{head}model.layers.{swap[number]}.{tail}" if number in swap else name

    return {new_name(name): weight for name, weight in weights.items()}
