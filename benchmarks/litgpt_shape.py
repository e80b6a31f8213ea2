"""A Hugging Face model folder's shape, as litgpt says it. Imported where litgpt is."""

import json
from pathlib import Path

from litgpt.config import Config


def shape_of(folder: Path, block_size: int) -> Config:
    """litgpt's name for each of config.json's settings, for rows of at most so many tokens."""
    ours = json.loads((folder / "config.json").read_text("utf-8"))
    return Config(
        name=folder.name,
        block_size=block_size,
        vocab_size=ours["vocab_size"],
        padded_vocab_size=ours["vocab_size"],
        n_layer=ours["num_hidden_layers"],
        n_head=ours["num_attention_heads"],
        n_query_groups=ours["num_key_value_heads"],
        n_embd=ours["hidden_size"],
        head_size=ours["head_dim"],
        intermediate_size=ours["intermediate_size"],
        rope_base=int(ours["rope_parameters"]["rope_theta"]),
        norm_eps=ours["rms_norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
