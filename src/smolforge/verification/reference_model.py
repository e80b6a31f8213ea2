"""The architecture written once more, as plainly as it can be, with the mistakes people make as switches.

When a model does not say what it should, each known mistake is made here on purpose; the one that says
the same is the likeliest cause. One row, no cache, no speed: nothing of model.py is used.

Axes: t tokens, n heads, d head width, c hidden, v vocabulary.
"""

import math
from collections.abc import Mapping
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
class Reading:
    """One way to read a file's weights; the defaults are the right one."""

    rope_theta: float | None = None
    eps: float | None = None
    interleaved: bool = False
    rotated: Literal["tokens", "heads", "nothing"] = "tokens"
    causal: bool = True
    grouped: bool = True
    swapped: tuple[str, str] | None = None
    scaled_embedding: bool = False
    head: Literal["as said", "embedding", "own"] = "as said"
    normed_heads: bool = True


RIGHT = Reading()
THETAS = (10_000.0, 50_000.0, 100_000.0, 130_000.0, 500_000.0, 1_000_000.0)
EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)


def mistakes(config: ModelConfig) -> dict[str, Reading]:
    """Every mistake that means something to this shape, by the name it is reported under."""
    eps = config.norm_epsilon if config.model_type == "starcoder2" else config.rms_norm_eps
    found = {
        "interleaved rotation (channels 2i and 2i + 1 are paired instead of i and i + d/2)": Reading(interleaved=True),
        "rotation along the heads instead of the tokens": Reading(rotated="heads"),
        "no rotation at all": Reading(rotated="nothing"),
        "no causal mask": Reading(causal=False),
        "k_proj and v_proj swapped": Reading(swapped=("k_proj", "v_proj")),
        "q_proj and o_proj swapped": Reading(swapped=("q_proj", "o_proj")),
        "gate_proj and up_proj swapped": Reading(swapped=("gate_proj", "up_proj")),
        "the two norms of a layer swapped": Reading(swapped=("input_layernorm", "post_attention_layernorm")),
        "embedding multiplied by the root of hidden_size": Reading(scaled_embedding=True),
    }
    found |= {f"wrong theta: rope_theta {theta:g} fits": Reading(rope_theta=theta) for theta in THETAS}
    found |= {f"wrong eps: {other:g} fits": Reading(eps=other) for other in EPSILONS if other != eps}
    if config.num_key_value_heads not in (1, config.num_attention_heads):
        found["wrong head grouping (query head i reads key head i % k instead of i // group)"] = Reading(grouped=False)
    if config.model_type == "qwen3":
        found["no norms on queries and keys"] = Reading(normed_heads=False)
    other_head: Literal["embedding", "own"] = "own" if config.tie_word_embeddings else "embedding"
    found["wrong head: " + ("lm_head is not tied" if other_head == "own" else "untied head, the embedding fits")] = (
        Reading(head=other_head)
    )
    return {name: reading for name, reading in found.items() if reading.rope_theta != config.rope_theta}


def logits(weights: Weights, config: ModelConfig, ids: Int[Tensor, " t"], reading: Reading = RIGHT) -> Tensor:
    """Next-token logits (t, v) of one row. Raises KeyError or RuntimeError where a reading fits no such weights."""
    if reading.swapped:
        weights = exchanged(weights, *reading.swapped)
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[ids] * (math.sqrt(config.hidden_size) if reading.scaled_embedding else 1.0)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        inner = norm(weights, f"{layer}.input_layernorm", x, config, reading)
        x = x + attention(weights, f"{layer}.self_attn", inner, config, reading)
        inner = norm(weights, f"{layer}.post_attention_layernorm", x, config, reading)
        x = x + feed_forward(weights, f"{layer}.mlp", inner, config)
    own = reading.head == "own" or (reading.head == "as said" and not config.tie_word_embeddings)
    return norm(weights, "model.norm", x, config, reading) @ (weights["lm_head.weight"] if own else embedding).T


def attention(weights: Weights, name: str, x: Hidden, config: ModelConfig, reading: Reading) -> Hidden:
    """Each head's queries against its group's keys; softmax; the weighted sum of values."""
    q, k, v = (
        (x @ weights[f"{name}.{each}_proj.weight"].T).unflatten(-1, (-1, config.head_size)).transpose(0, 1)
        for each in "qkv"
    )
    if config.model_type == "qwen3" and reading.normed_heads:
        q, k = (rms(each, weights[f"{name}.{of}_norm.weight"], config, reading) for each, of in ((q, "q"), (k, "k")))
    q, k = rotated(q, config, reading), rotated(k, config, reading)
    group = config.num_attention_heads // config.num_key_value_heads
    k, v = (each.repeat_interleave(group, 0) if reading.grouped else each.repeat(group, 1, 1) for each in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(config.head_size)
    if reading.causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ weights[f"{name}.o_proj.weight"].T


def rotated(x: Heads, config: ModelConfig, reading: Reading) -> Heads:
    """Pairs of channels turned by position times theta^(-2i/d)."""
    if reading.rotated == "nothing":
        return x
    n, t, d = x.shape
    theta = reading.rope_theta or config.rope_theta
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    place = torch.arange(t)[None, :, None] if reading.rotated == "tokens" else torch.arange(n)[:, None, None]
    turn = torch.polar(torch.ones((), dtype=torch.float64), place * frequency)
    pairs = x.double().unflatten(-1, (-1, 2) if reading.interleaved else (2, -1))
    pairs = pairs if reading.interleaved else pairs.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned if reading.interleaved else turned.transpose(-1, -2)).flatten(-2).to(x.dtype)


def norm(weights: Weights, name: str, x: Hidden, config: ModelConfig, reading: Reading) -> Hidden:
    """The norm of a family over the residual stream."""
    scale = weights[f"{name}.weight"]
    if config.model_type != "starcoder2":
        return rms(x, scale, config, reading)
    return F.layer_norm(x, x.shape[-1:], scale, weights[f"{name}.bias"], reading.eps or config.norm_epsilon)


def rms(x: Tensor, scale: Tensor, config: ModelConfig, reading: Reading) -> Tensor:
    return scale * x / (x.square().mean(-1, keepdim=True) + (reading.eps or config.rms_norm_eps)).sqrt()


def feed_forward(weights: Weights, name: str, x: Hidden, config: ModelConfig) -> Hidden:
    """What a family puts between two residual additions."""
    if config.model_type == "starcoder2":
        inner = F.gelu(x @ weights[f"{name}.c_fc.weight"].T, approximate="tanh")
        return inner @ weights[f"{name}.c_proj.weight"].T
    if config.model_type != "mixtral":
        return swiglu(x, *(weights[f"{name}.{each}_proj.weight"] for each in ("gate", "up", "down")))
    share, chosen = (x @ weights[f"{name}.gate.weight"].T).softmax(-1).topk(config.num_experts_per_tok)
    share = share / share.sum(-1, keepdim=True)
    matrices = [weights[f"{name}.experts.{each}_proj"] for each in ("gate", "up", "down")]
    rows = [
        sum(part * swiglu(token, *(matrix[int(e)] for matrix in matrices)) for part, e in zip(*picked, strict=True))
        for token, picked in zip(x, zip(share, chosen, strict=True), strict=True)
    ]
    return torch.stack([torch.as_tensor(row) for row in rows])


def swiglu(x: Float[Tensor, "*t c"], gate: Tensor, up: Tensor, down: Tensor) -> Float[Tensor, "*t c"]:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def exchanged(weights: Weights, one: str, other: str) -> dict[str, Tensor]:
    """The same weights with two parts of their names exchanged everywhere."""

    def renamed(name: str) -> str:
        parts = name.split(".")
        return ".".join({one: other, other: one}.get(part, part) for part in parts)

    return {renamed(name): weight for name, weight in weights.items()}


def with_layers_exchanged(weights: Weights, one: int, other: int) -> dict[str, Tensor]:
    """The same weights with two layers in each other's place."""

    def renamed(name: str) -> str:
        head, _, rest = name.partition("model.layers.")
        number, _, tail = rest.partition(".")
        swap = {str(one): other, str(other): one}
        return f"{head}model.layers.{swap[number]}.{tail}" if number in swap else name

    return {renamed(name): weight for name, weight in weights.items()}
