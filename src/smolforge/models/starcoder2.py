"""Starcoder2 without its biases: LayerNorm, and GPT-2's feed-forward of two matrices.

Lozhkov et al. 2024, https://arxiv.org/abs/2402.19173.
"""

import torch.nn.functional as F
from torch import nn

from smolforge.config import ModelConfig
from smolforge.models.decoder import Attention, Hidden
from smolforge.models.family import CONFIG_DEFAULTS, INIT_RULES, Family


class GELUMLP(nn.Module):
    """Two matrices around a GELU (its tanh form)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Hidden) -> tuple[Hidden, float]:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), 0.0


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, config.norm_epsilon)


FAMILY = Family(
    "Starcoder2ForCausalLM",
    attention=Attention,
    norm=layer_norm,
    feed_forward=GELUMLP,
    config_defaults={
        **{name: value for name, value in CONFIG_DEFAULTS.items() if name != "rms_norm_eps"},
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "tie_word_embeddings": True,
    },
    config_fixed={
        "attention_dropout": 0.0,
        "sliding_window": None,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "use_bias": False,
    },
    init_rules={**INIT_RULES, "c_fc": "normal", "c_proj": "residual"},
)
