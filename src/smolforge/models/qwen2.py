"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

Qwen team 2024, https://arxiv.org/abs/2407.10671.
"""

from torch import nn

from smolforge.config import ModelConfig
from smolforge.models.decoder import MLP, Attention, residual_rms_norm
from smolforge.models.family import CONFIG_DEFAULTS, Family, GGUFNames


def attention(config: ModelConfig, layer: int) -> Attention:
    """Build Llama's attention with biases on its first three projections."""
    attention = Attention(config, layer)
    attention.q_proj = nn.Linear(config.hidden_size, attention.q_proj.out_features)
    attention.k_proj = nn.Linear(config.hidden_size, attention.k_proj.out_features)
    attention.v_proj = nn.Linear(config.hidden_size, attention.v_proj.out_features)
    return attention


FAMILY = Family(
    "Qwen2ForCausalLM",
    attention=attention,
    norm=residual_rms_norm,
    feed_forward=MLP,
    config_defaults={**CONFIG_DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    config_fixed={"attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "use_mrope": False},
    gguf=GGUFNames("qwen2"),
)
