"""Llama, and with it SmolLM2: grouped-query attention, RMSNorm, SwiGLU, no biases.

Touvron et al. 2023, https://arxiv.org/abs/2307.09288.
"""

from smolforge.config import ModelConfig
from smolforge.models.decoder import MLP, Attention, residual_rms_norm
from smolforge.models.family import CONFIG_DEFAULTS, Family, GGUFNames, NanotronNames, TensorLocation


def nanotron_locations(config: ModelConfig) -> dict[str, TensorLocation]:
    """Return the location of every parameter in nanotron's files.

    Names as examples/llama/convert_weights.py of nanotron has them, chunks as its models/llama.py shares them out.
    """
    attention, mlp = ".self_attn.{}_proj.weight", ".mlp.{}_proj.weight"
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    qkv, wide = tuple(count * config.resolved_head_dim for count in heads), (config.intermediate_size,) * 2
    embedding = "model.token_position_embeddings.pp_block.token_embedding.weight"
    locations = {"model.embed_tokens.weight": TensorLocation(embedding)}
    for number in range(config.num_hidden_layers):
        prefix, theirs = f"model.layers.{number}", f"model.decoder.{number}.pp_block"
        for part, letter in enumerate("qkv"):
            location = TensorLocation(f"{theirs}.attn.qkv_proj.weight", 0, qkv, part, letter != "v")
            locations[prefix + attention.format(letter)] = location
        for part, gate in enumerate(("gate", "up")):
            locations[prefix + mlp.format(gate)] = TensorLocation(f"{theirs}.mlp.gate_up_proj.weight", 0, wide, part)
        locations[prefix + attention.format("o")] = TensorLocation(f"{theirs}.attn.o_proj.weight", 1)
        locations[prefix + mlp.format("down")] = TensorLocation(f"{theirs}.mlp.down_proj.weight", 1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            locations[f"{prefix}.{norm}.weight"] = TensorLocation(f"{theirs}.{norm}.weight", None)
    locations["model.norm.weight"] = TensorLocation("model.final_layer_norm.pp_block.weight", None)
    if not config.tie_word_embeddings:
        locations["lm_head.weight"] = TensorLocation("model.lm_head.pp_block.weight")
    return locations


FAMILY = Family(
    "LlamaForCausalLM",
    attention=Attention,
    norm=residual_rms_norm,
    feed_forward=MLP,
    config_defaults={**CONFIG_DEFAULTS, "max_position_embeddings": 2048},
    config_fixed={"attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "rope_interleaved": False},
    gguf=GGUFNames("llama", interleaved=True),
    nanotron=NanotronNames("is_llama_config", nanotron_locations),
)
