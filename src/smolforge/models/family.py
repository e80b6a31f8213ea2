"""What an architecture is: its parts, how its weights start, and its names in other people's files.

    models/qwen3.py   FAMILY = Family("Qwen3ForCausalLM", attention=..., ...)
    config/model.py   FAMILIES = {"qwen3": FamilySettings(), ...}             the one entry

The module is named as the family's model_type. docs/howto/add-a-model.md shows each step.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from torch import nn

from smolforge.config import ModelConfig
from smolforge.config.model import FAMILIES

InitRule = Literal["normal", "residual", "ones", "zeros"]
"""N(0, initializer_range); that divided by sqrt(2 layers), for what a block adds to the residual stream; constants."""
INIT_RULES: Mapping[str, InitRule] = {
    "embed_tokens": "normal",
    "lm_head": "normal",
    "input_layernorm": "ones",
    "q_proj": "normal",
    "k_proj": "normal",
    "v_proj": "normal",
    "o_proj": "residual",
    "post_attention_layernorm": "ones",
    "gate_proj": "normal",
    "up_proj": "normal",
    "down_proj": "residual",
    "norm": "ones",
    "bias": "zeros",
}
"""Llama's parameters, by the last part of their name without `.weight`."""
CONFIG_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,  # every head has its own
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""Defaults that most classes of Transformers share."""
GGUF_MODULES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Llama's modules in llama.cpp's words."""


@dataclass(frozen=True)
class GGUFNames:
    """What llama.cpp calls a family and its parts."""

    architecture: str
    """Families may share one: a llama with experts is a mixtral."""
    interleaved: bool = False
    """Whether its rotation pairs neighboring channels, so that the rows of query and key heads are reordered."""
    modules: Mapping[str, str] = field(default_factory=lambda: GGUF_MODULES)
    settings: Mapping[str, str] = field(default_factory=dict)
    """Keys beyond Llama's, behind the architecture's prefix, and the fields of ModelConfig that they set."""


@dataclass(frozen=True)
class TensorLocation:
    """Where a parameter is in nanotron's files."""

    name: str
    """nanotron's."""
    split_dim: int | None = 0
    """The dimension shared out over ranks; None where each has all."""
    chunks: tuple[int, ...] = ()
    """What stands one after another along dimension 0, all ranks together; each chunk is shared out by itself."""
    part: int = 0
    """Which of these it is."""
    is_rotary: bool = False
    """Whether its rows are channels that rotation pairs."""


@dataclass(frozen=True)
class NanotronNames:
    """What nanotron calls a family and its parts."""

    flag: str
    """The key of model_config.json that is true for this family alone."""
    locations: Callable[[ModelConfig], dict[str, TensorLocation]]
    """Return the location of every parameter, by our name."""


def same_names(name: str, config: ModelConfig) -> list[str]:
    """Return the names on disk of a parameter: its own."""
    return [name]


@dataclass(frozen=True)
class Family:
    """One architecture, as a class of Transformers has it."""

    architecture: str
    """That class."""
    attention: Callable[[ModelConfig, int], nn.Module]
    """Build the attention of a layer of this number."""
    norm: Callable[[ModelConfig], nn.Module]
    """Build a norm over the residual stream."""
    feed_forward: Callable[[ModelConfig], nn.Module]
    """Build a feed-forward. It may return an auxiliary loss beside its output."""
    config_defaults: Mapping[str, Any]
    """What a config.json means that leaves these out: the class's own defaults."""
    config_fixed: Mapping[str, Any]
    """Settings of config.json that are implemented at one value only."""
    init_rules: Mapping[str, InitRule] = field(default_factory=lambda: INIT_RULES)
    disk_names: Callable[[str, ModelConfig], list[str]] = same_names
    """Return the tensors on disk that a parameter is made of."""
    gguf: GGUFNames | None = None
    """None where llama.cpp does not have it."""
    nanotron: NanotronNames | None = None


def family_of(config: ModelConfig) -> Family:
    """Return the family of a model."""
    return load_family(config.model_type)


def load_family(model_type: str) -> Family:
    """Return a family by name."""
    return import_module(f"smolforge.models.{model_type}").FAMILY


def all_families() -> Iterator[tuple[str, Family]]:
    """Yield (model_type, Family) of every family."""
    yield from ((name, load_family(name)) for name in FAMILIES)
