"""The shape of a model, in the names of Hugging Face's config.json."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from smolforge.config.base import Settings

Width = Annotated[int, Field(gt=0, le=2**20)]
Count = Annotated[int, Field(gt=0, le=2**12)]
# The limits on shapes are far beyond any model; a file that asks for more is refused before anything is built.

CLASS_PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
CustomClass = Annotated[str, Field(pattern=f"^{CLASS_PATTERN}$", title="a class as module:Class")]
PARTS = ("attention", "feed_forward", "normalization")
"""Parts of the model that a custom class may replace."""


class FamilySettings(NamedTuple):
    """What the config.json of a family has beyond the shape that all share."""

    fields: tuple[str, ...] = ("rms_norm_eps",)
    """Settings that not every family has."""
    hidden_act: str = "silu"


FAMILIES = {
    "llama": FamilySettings(),
    "qwen2": FamilySettings(),
    "qwen3": FamilySettings(),
    "mixtral": FamilySettings(("rms_norm_eps", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")),
    "starcoder2": FamilySettings(("norm_epsilon",), "gelu_pytorch_tanh"),
}
"""Every model_type; the module smolforge.models.NAME has the rest of each family."""
FAMILY_FIELDS = {name for family in FAMILIES.values() for name in family.fields}
ModelType = Literal[*FAMILIES]  # pyrefly: ignore
Activation = Literal[*dict.fromkeys(family.hidden_act for family in FAMILIES.values())]  # pyrefly: ignore


ROPE_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Every rope_type, and the settings that it has."""
RopeFactor = Annotated[float, Field(gt=0, le=1e6)]


class RopeScaling(Settings):
    """How rotary wavelengths are lengthened for a longer context, in the names of config.json's `rope_parameters`."""

    rope_type: Literal[*ROPE_SETTINGS] = "default"  # pyrefly: ignore
    """linear lengthens all wavelengths by factor, llama3 only the long ones; default lengthens none."""
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    """linear and llama3: how many times longer wavelengths become."""
    low_freq_factor: RopeFactor | None = None
    """llama3 only: wavelengths above original_max_position_embeddings / low_freq_factor become longer by factor."""
    high_freq_factor: RopeFactor | None = None
    """llama3 only: those below original_max_position_embeddings / high_freq_factor stay; between is a smooth change."""
    original_max_position_embeddings: Annotated[int, Field(gt=0, le=2**30)] | None = None
    """llama3 only: context of the model before."""

    @model_validator(mode="after")
    def _settings_fit(self) -> "RopeScaling":
        for name in ROPE_SETTINGS["llama3"]:
            if (self.__dict__[name] is not None) != (name in ROPE_SETTINGS[self.rope_type]):
                problem = "means nothing to" if self.__dict__[name] is not None else "is missing, which is needed by"
                raise ValueError(f"{name} {problem} rope_type {self.rope_type}")
        if self.rope_type == "llama3" and self.__dict__["high_freq_factor"] <= self.__dict__["low_freq_factor"]:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor ({self.low_freq_factor})"
            )
        return self

    def parameters(self) -> dict[str, Any]:
        """Return the rope_type and its settings, and no others."""
        return self.model_dump(exclude_none=True)


class ModelConfig(Settings):
    """The shape of a decoder, in the names of Hugging Face's config.json; the defaults are SmolLM2-135M."""

    model_type: ModelType = "llama"
    """Architecture of the model, as Transformers names it."""
    vocab_size: Annotated[int, Field(gt=0, le=2**24)] = 49152
    """Number of token ids."""
    hidden_size: Width = 576
    """Width of the residual stream."""
    intermediate_size: Width = 1536
    """Width inside each feed-forward, or inside each expert."""
    num_hidden_layers: Count = 30
    """Number of decoder layers."""
    num_attention_heads: Count = 9
    """Number of query heads."""
    num_key_value_heads: Count = 3
    """Number of key and value heads; each is shared by a group of query heads."""
    head_dim: Width | None = None
    """Width of one head; by default hidden_size / num_attention_heads."""
    max_position_embeddings: Annotated[int, Field(gt=0, le=2**30)] = 8192
    """Longest sequence the model is meant for, in tokens."""
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 100_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    """How rotary wavelengths are lengthened for a longer context."""
    rms_norm_eps: PositiveFloat = 1e-5
    """Added to the mean square before the root."""
    norm_epsilon: PositiveFloat = 1e-5
    """starcoder2 only: added to the variance before the root."""
    tie_word_embeddings: bool = True
    """Read the output logits off the token embedding."""
    hidden_act: Activation | None = None
    """Activation inside the feed-forward; by default the family's."""
    num_local_experts: Count = 8
    """mixtral only: experts in each layer."""
    num_experts_per_tok: Count = 2
    """mixtral only: experts that each token goes to."""
    router_aux_loss_coef: NonNegativeFloat = 0.001
    """mixtral only: weight of the loss that keeps the experts equally busy."""
    attention: CustomClass | None = None
    """A class of your own for attention, as mylab:SlidingAttention; by default the family's."""
    feed_forward: CustomClass | None = None
    """A class of your own for the feed-forward; by default the family's."""
    normalization: CustomClass | None = None
    """A class of your own for the norms over the residual stream; by default the family's."""
    initializer_range: PositiveFloat = 1 / 24
    """Standard deviation of the initial weights (residual outputs: divided by sqrt(2 layers))."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of "
                    f"num_attention_heads ({self.num_attention_heads}), or head_dim must be given"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotation pairs its two halves")
        return self

    @model_validator(mode="after")
    def _family_fits(self) -> "ModelConfig":
        activation = FAMILIES[self.model_type].hidden_act
        if self.hidden_act not in (None, activation):
            raise ValueError(f"hidden_act of a {self.model_type} model is {activation}, not {self.hidden_act}")
        object.__setattr__(self, "hidden_act", activation)
        for name in sorted(FAMILY_FIELDS):
            value, default = self.__dict__[name], type(self).model_fields[name].default
            if value != default and name not in self.family_fields():
                raise ValueError(f"{name} means nothing to a {self.model_type} model")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than "
                f"num_local_experts ({self.num_local_experts})"
            )
        return self

    def family_fields(self) -> list[str]:
        """Names of the settings that mean something to this model's family."""
        others = FAMILY_FIELDS - {*FAMILIES[self.model_type].fields} | {*PARTS} - self.custom_classes.keys()
        return [name for name in type(self).model_fields if name not in others]

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward is a mixture of experts."""
        return "num_local_experts" in FAMILIES[self.model_type].fields

    @property
    def custom_classes(self) -> dict[str, str]:
        """The custom classes that it names, by the part that they replace."""
        return {part: self.__dict__[part] for part in PARTS if self.__dict__[part] is not None}

    @property
    def resolved_head_dim(self) -> int:
        """`head_dim`, resolved."""
        assert self.head_dim is not None
        return self.head_dim
