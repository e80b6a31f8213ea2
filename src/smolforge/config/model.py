"""The shape of a model, in the names of Hugging Face's config.json."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from smolforge.config.base import Settings

Width = Annotated[int, Field(gt=0, le=2**20)]
Count = Annotated[int, Field(gt=0, le=2**12)]
# The limits on shapes are far beyond any model; a file that asks for more is refused before anything is built.

OWN_CLASS = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
OwnClass = Annotated[str, Field(pattern=f"^{OWN_CLASS}$", title="a class as module:Class")]
PARTS = ("attention", "feed_forward", "normalization")
"""What a class of one's own may take the place of."""

OF_ONE_FAMILY = {
    "rms_norm_eps": ("llama", "qwen3", "mixtral"),
    "norm_epsilon": ("starcoder2",),
    "num_local_experts": ("mixtral",),
    "num_experts_per_tok": ("mixtral",),
    "router_aux_loss_coef": ("mixtral",),
}
"""Settings of a shape that not every family has."""


class ModelConfig(Settings):
    """The shape of a decoder, in the names of Hugging Face's config.json; the defaults are SmolLM2-135M."""

    model_type: Literal["llama", "qwen3", "mixtral", "starcoder2"] = "llama"
    """Family: qwen3 norms queries and keys, mixtral has experts, starcoder2 has LayerNorm and a two-matrix GELU."""
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
    rms_norm_eps: PositiveFloat = 1e-5
    """Added to the mean square before the root."""
    norm_epsilon: PositiveFloat = 1e-5
    """starcoder2 only: added to the variance before the root."""
    tie_word_embeddings: bool = True
    """Read the output logits off the token embedding."""
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] | None = None
    """Activation inside the feed-forward; by default the family's."""
    num_local_experts: Count = 8
    """mixtral only: experts in each layer."""
    num_experts_per_tok: Count = 2
    """mixtral only: experts that each token goes to."""
    router_aux_loss_coef: NonNegativeFloat = 0.001
    """mixtral only: weight of the loss that keeps the experts equally busy."""
    attention: OwnClass | None = None
    """A class of your own for attention, as mylab:SlidingAttention; by default the family's."""
    feed_forward: OwnClass | None = None
    """A class of your own for the feed-forward; by default the family's."""
    normalization: OwnClass | None = None
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
        if self.head_size % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotation pairs its two halves")
        return self

    @model_validator(mode="after")
    def _family_fits(self) -> "ModelConfig":
        activation = "gelu_pytorch_tanh" if self.model_type == "starcoder2" else "silu"
        if self.hidden_act not in (None, activation):
            raise ValueError(f"hidden_act of a {self.model_type} model is {activation}, not {self.hidden_act}")
        object.__setattr__(self, "hidden_act", activation)
        for name in OF_ONE_FAMILY:
            given, default = self.__dict__[name], type(self).model_fields[name].default
            if given != default and name not in self.own_fields():
                raise ValueError(f"{name} means nothing to a {self.model_type} model")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than "
                f"num_local_experts ({self.num_local_experts})"
            )
        return self

    def own_fields(self) -> list[str]:
        """Names of the settings that mean something to this model's family."""
        names = (name for name in type(self).model_fields if name not in PARTS or name in self.own_classes)
        return [name for name in names if self.model_type in OF_ONE_FAMILY.get(name, self.model_type)]

    @property
    def own_classes(self) -> dict[str, str]:
        """The classes of a person's own that it names, by what they take the place of."""
        return {part: self.__dict__[part] for part in PARTS if self.__dict__[part] is not None}

    @property
    def head_size(self) -> int:
        """`head_dim`, resolved."""
        assert self.head_dim is not None
        return self.head_dim
