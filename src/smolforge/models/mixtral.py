"""Mixtral: Llama with a mixture of experts for the feed-forward.

Jiang et al. 2024, https://arxiv.org/abs/2401.04088.
"""

from smolforge.config import ModelConfig
from smolforge.models.decoder import Attention, residual_rms_norm
from smolforge.models.family import CONFIG_DEFAULTS, GGUF_MODULES, INIT_RULES, Family, GGUFNames
from smolforge.models.moe import MoE


def disk_names(name: str, config: ModelConfig) -> list[str]:
    """Return the tensors on disk that a parameter is made of: the experts' matrices one by one."""
    if config.feed_forward is not None or ".mlp." not in name:
        return [name]
    layer, _, suffix = name.partition(".mlp.")
    if suffix == "gate.weight":
        return [f"{layer}.block_sparse_moe.gate.weight"]
    matrix = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[suffix.removeprefix("experts.")]
    return [f"{layer}.block_sparse_moe.experts.{e}.{matrix}.weight" for e in range(config.num_local_experts)]


FAMILY = Family(
    "MixtralForCausalLM",
    attention=Attention,
    norm=residual_rms_norm,
    feed_forward=MoE,
    config_defaults={
        **CONFIG_DEFAULTS,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
    },
    config_fixed={"attention_dropout": 0.0, "sliding_window": None, "router_jitter_noise": 0.0},
    init_rules={**INIT_RULES, "gate": "normal"},
    disk_names=disk_names,
    gguf=GGUFNames(
        "llama",
        interleaved=True,
        modules={
            **GGUF_MODULES,
            "mlp.gate": "ffn_gate_inp",
            "mlp.experts.gate_proj": "ffn_gate_exps",
            "mlp.experts.up_proj": "ffn_up_exps",
            "mlp.experts.down_proj": "ffn_down_exps",
        },
        settings={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
)
