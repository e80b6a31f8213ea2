"""What a model is made of and what it costs, from its shape alone: parameters, FLOPs, bytes of cache."""

import functools
import math
import re
from collections import Counter
from typing import Literal, NamedTuple

from smolforge.config import ModelConfig
from smolforge.models.decoder import meta_model

AttentionCount = Literal["causal", "full"]
_ATTENTION_FLOPS = {"causal": 6, "full": 12}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by component, as a person who studies the model counts them."""
    counts: Counter[str] = Counter()
    for row in parameter_table(config):
        counts[row.component] += row.parameters
    return dict(counts)


class ParameterRow(NamedTuple):
    """One line of the parameter table: a tensor that every layer, or the model, has."""

    name: str
    component: str
    shape: tuple[int, ...]
    times: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) * self.times


@functools.lru_cache(maxsize=16)  # a run asks for it twenty times
def parameter_table(config: ModelConfig) -> tuple[ParameterRow, ...]:
    """Return every tensor of the model in order, those of layers once, with their number."""
    one_layer_model = meta_model(config.model_copy(update={"num_hidden_layers": 1}))
    times: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for name, weight in one_layer_model.named_parameters():
        short = re.sub(r"^model\.(layers\.\d+)?", lambda match: "layers.N" if match[1] else "", name)
        count = config.num_hidden_layers if ".layers." in name else 1
        times[short.removesuffix(".weight"), component(name), tuple(weight.shape)] += count
    return tuple(ParameterRow(*key, count) for key, count in times.items())


def component(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    parts = name.split(".")
    if any(part.endswith("norm") for part in parts):
        return "norms"
    kinds = {"embed_tokens": "embedding", "self_attn": "attention", "experts": "experts", "gate": "router"}
    return next((kind for part, kind in kinds.items() if part in parts), "mlp" if "mlp" in parts else "lm_head")


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: all, but of the experts only those it goes to."""
    counts = parameter_counts(config)
    idle = config.num_local_experts - config.num_experts_per_tok
    return sum(counts.values()) - counts.get("experts", 0) * idle // config.num_local_experts


def kv_bytes_per_token(config: ModelConfig, width: int = 4) -> int:
    """What a token's keys and values take in the cache, at `width` bytes a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.resolved_head_dim * width


def flops_per_token(config: ModelConfig, sequence_length: int, attention: AttentionCount = "causal") -> int:
    """Matrix FLOPs of one training token, forward and backward: 6 N + a L W t.

    N weights of matrices that the token meets, the head's among them: 2 forward and 4 backward each. In each of L
    layers its query, of width W = heads x head_dim, meets t keys and mixes t values: 4 forward, 8 backward. So a = 12
    with attention counted in `full`, as PaLM (https://arxiv.org/abs/2204.02311, appendix B), nanoGPT and torch's
    counter do, and a = 6 where `causal` attention is half of that, as in llm.c. Neither counts what is no matrix
    product, nor what is computed a second time: attention's scores, or recomputed activations.
    """
    vectors = sum(row.parameters for row in parameter_table(config) if len(row.shape) == 1)  # norms and biases
    embedding_only = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    matrices = active_parameters(config) - vectors - embedding_only
    width = config.num_attention_heads * config.resolved_head_dim
    return 6 * matrices + _ATTENTION_FLOPS[attention] * config.num_hidden_layers * width * sequence_length
