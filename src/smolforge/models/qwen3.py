"""Qwen3: Llama with an RMSNorm over each head's queries and keys.

Qwen team 2025, https://arxiv.org/abs/2505.09388; the norms are of Dehghani et al. 2023,
https://arxiv.org/abs/2302.05442.
"""

from smolforge.config import ModelConfig
from smolforge.models.decoder import MLP, Attention, RMSNorm, residual_rms_norm
from smolforge.models.family import CONFIG_DEFAULTS, GGUF_MODULES, INIT_RULES, Family, GGUFNames


def attention(config: ModelConfig, layer: int) -> Attention:
    """Build Llama's attention with norms on queries and keys."""
    attention = Attention(config, layer)
    attention.q_norm = RMSNorm(config.resolved_head_dim, config.rms_norm_eps)
    attention.k_norm = RMSNorm(config.resolved_head_dim, config.rms_norm_eps)
    return attention


FAMILY = Family(
    "Qwen3ForCausalLM",
    attention=attention,
    norm=residual_rms_norm,
    feed_forward=MLP,
    config_defaults={
        **CONFIG_DEFAULTS,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    config_fixed={
        "attention_dropout": 0.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    init_rules={**INIT_RULES, "q_norm": "ones", "k_norm": "ones"},
    gguf=GGUFNames(
        "qwen3",
        modules={**GGUF_MODULES, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    ),
)
