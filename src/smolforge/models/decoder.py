"""A Llama-style decoder: token ids in, hidden states and logits out.

    embed -> [ norm -> attention -> + -> norm -> mlp -> + ] x layers -> norm -> logits

Here are the parts of Llama and what all families share. What a family does differently stands in its own module
(qwen3.py, mixtral.py, ...), as a value of models/family.py.

A custom class may replace attention, feed-forward or norm (config/custom_classes.py). It is built like ours, from the
config, attention from its layer's number too, and called like ours.

Parameters have Hugging Face's names, so a checkpoint loads strictly and without renaming. What is
attended to is a value: `hidden_states(ids, positions, context)` hands every layer's queries, keys and values to
`context.attend`, and plain causal attention, a cache or packed documents differ only there.

Axes: b batch, t tokens, h query heads, n heads of either kind, d head width, f pairs of its channels, c hidden,
v vocabulary.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smolforge.config import ModelConfig, custom_classes
from smolforge.config.model import ROPE_SETTINGS
from smolforge.models.activation_checkpointing import LayerCall, call_layer
from smolforge.models.attention import AttentionContext, CausalAttention
from smolforge.models.family import family_of
from smolforge.models.moe import AuxLoss
from smolforge.models.quantized import QuantizationScheme

Hidden = Float[Tensor, "b t c"]
Rotary = tuple[Float[Tensor, "#b 1 t d"], Float[Tensor, "#b 1 t d"]]


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Float[Tensor, " f"]:
    """Return the radians by which each pair of channels turns from one token to the next, in fp32.

    `linear` is of Chen et al. 2023, https://arxiv.org/abs/2306.15595; `llama3` of Llama 3.1's reference code. Each
    operation is Transformers', in its order, so that the results are equal to the bit.
    """
    channel, scaling = torch.arange(0, config.resolved_head_dim, 2, device=device).float(), config.rope_scaling
    frequency = 1.0 / config.rope_theta ** (channel / config.resolved_head_dim)
    if scaling.rope_type == "llama3":
        factor, low, high, context = (scaling.__dict__[name] for name in ROPE_SETTINGS["llama3"])
        wavelength = 2 * math.pi / frequency
        share = (context / wavelength - low) / (high - low)
        smooth = (1 - share) * frequency / factor + share * frequency
        shorter = torch.where(wavelength < context / high, frequency, smooth)
        return torch.where(wavelength > context / low, frequency / factor, shorter)
    return frequency if scaling.factor is None else frequency / scaling.factor


def rope_cos_sin(config: ModelConfig, positions: Int[Tensor, "b t"], dtype: torch.dtype) -> Rotary:
    """Cosine and sine of each position's angles, in fp32 whatever the model's dtype.

    Su et al. 2021, https://arxiv.org/abs/2104.09864. Channel i is paired with i + d/2 (half rotation,
    as in Hugging Face's Llama), so both halves carry the same angles.
    """
    angle = positions[:, None, :, None].float() * inverse_frequencies(config, positions.device)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Float[Tensor, "b n t d"], cos_sin: Rotary) -> Float[Tensor, "b n t d"]:
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RMSNorm(nn.Module):
    """Scale to unit root mean square, in fp32 at least; the weight is applied after casting back.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped keys and values: query head i reads key head i // group."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.resolved_head_dim
        width = config.num_attention_heads * config.resolved_head_dim
        key_width = config.num_key_value_heads * config.resolved_head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm: nn.Module = nn.Identity()  # for a family that norms queries and keys
        self.k_norm: nn.Module = nn.Identity()

    def forward(self, x: Hidden, cos_sin: Rotary, context: AttentionContext) -> Hidden:
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        out = context.attend(self.layer, apply_rope(q, cos_sin), apply_rope(k, cos_sin), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def split_heads(self, x: Float[Tensor, "b t nd"]) -> Float[Tensor, "b n t d"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU, Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Hidden) -> tuple[Hidden, float]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), 0.0


def residual_rms_norm(config: ModelConfig) -> RMSNorm:
    """Build an RMSNorm over the residual stream."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


def build_attention(config: ModelConfig, layer: int) -> nn.Module:
    """Build the attention of a layer."""
    if config.attention is not None:
        return custom_classes.instantiate("model.attention", config.attention, nn.Module, config, layer)
    return family_of(config).attention(config, layer)


def build_norm(config: ModelConfig) -> nn.Module:
    """Build a norm over the residual stream."""
    if config.normalization is not None:
        return custom_classes.instantiate("model.normalization", config.normalization, nn.Module, config)
    return family_of(config).norm(config)


def build_feed_forward(config: ModelConfig) -> nn.Module:
    """Build a feed-forward. Ours return their output and an auxiliary loss, which only experts have."""
    if config.feed_forward is not None:
        return custom_classes.instantiate("model.feed_forward", config.feed_forward, nn.Module, config)
    return family_of(config).feed_forward(config)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = build_attention(config, layer)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = build_feed_forward(config)

    def forward(self, x: Hidden, cos_sin: Rotary, context: AttentionContext) -> tuple[Hidden, AuxLoss | float]:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, context)
        added = self.mlp(self.post_attention_layernorm(x))
        added, aux_loss = added if isinstance(added, tuple) else (added, 0.0)
        return x + added, aux_loss


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)


class LanguageModel(nn.Module):
    """The whole model. A tied head has no parameter of its own: it is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = None  # a Tokenizer, where the model was loaded with one
        self.quantization: QuantizationScheme | None = None  # of its matrices, where they are integers
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        return self.logits(self.hidden_states(ids))

    def hidden_states(
        self,
        ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "#b t"] | None = None,
        context: AttentionContext | None = None,
    ) -> Hidden:
        """Return the final states of each token. The defaults: positions from 0, and `CausalAttention()`."""
        return self.hidden_states_and_aux_loss(ids, positions, context)[0]

    def hidden_states_and_aux_loss(
        self,
        ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "#b t"] | None = None,
        context: AttentionContext | None = None,
        *,
        call: LayerCall = call_layer,
    ) -> tuple[Hidden, AuxLoss | float]:
        """Return the final states and the auxiliary loss of the experts, mean over layers; 0.0 for a dense model.

        `call` calls each layer, and decides what it keeps for its backward.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)
        cos_sin, aux_loss = rope_cos_sin(self.config, positions, x.dtype), 0.0
        for layer in self.model.layers:
            x, layer_loss = call(layer, x, cos_sin, context or CausalAttention())
            aux_loss = aux_loss + layer_loss
        return self.model.norm(x), aux_loss / len(self.model.layers)

    @property
    def lm_head_weight(self) -> Float[Tensor, "v c"]:
        """The matrix that turns a hidden state into logits."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def logits(self, hidden: Float[Tensor, "*n c"]) -> Float[Tensor, "*n v"]:
        return F.linear(hidden, self.lm_head_weight)


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model with fresh weights that depend on nothing but config and seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a class of one's own may draw from it
        model = empty_model(config, dtype)
    initialize(model, seed)
    return model


def empty_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model whose weights are yet to be filled: no time is spent on numbers about to be replaced."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with SkipInit():
            return LanguageModel(config)
    finally:
        torch.set_default_dtype(before)


def meta_model(config: ModelConfig) -> LanguageModel:
    """A model without memory, for its names and shapes."""
    with torch.device("meta"), SkipInit():
        return LanguageModel(config)


class SkipInit(TorchFunctionMode):
    """Modules made under this leave their weights as the memory was."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def initialize(model: LanguageModel, seed: int) -> None:
    """nanotron's scheme (scaling/parametrization.py): N(0, s) for embedding, head and inputs of a block,
    N(0, s / sqrt(2 layers)) for what a block adds to the residual stream, 1 for norms, 0 for their biases.

    What a class of one's own names otherwise is N(0, s) too if it is a matrix, and else stays as the class made it.
    """
    std, rules = model.config.initializer_range, family_of(model.config).init_rules
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        rule = rules.get(name.removesuffix(".weight").split(".")[-1])
        if rule is None and not model.config.custom_classes:
            raise AssertionError(f"no rule to initialize {name}")
        match rule or ("normal" if weight.ndim > 1 else "as made"):
            case "zeros":
                weight.zero_()
            case "ones":
                weight.fill_(1.0)
            case "normal" | "residual" as spread:
                # Drawn in fp32 whatever the dtype, so that a float64 model starts at the same numbers.
                noise = torch.empty(weight.shape)
                weight.copy_(noise.normal_(0.0, std if spread == "normal" else residual_std, generator=generator))


@torch.no_grad()
def adapt_to_config(model: LanguageModel, config: ModelConfig) -> LanguageModel:
    """Return the same weights in a model of another context, theta, or a larger vocabulary.

    The logits of the old tokens are unchanged. Each new token starts as the mean of the old ones, which
    bounds how much it can take from them: Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    The weights are shared with the old model unless its vocabulary grows.
    """
    if config.vocab_size == model.config.vocab_size:
        new_model = copy.copy(model)  # with the very same modules
        new_model.config = config
        return new_model
    new_model, old_weights = empty_model(config, model.lm_head_weight.dtype), dict(model.named_parameters())
    for name, weight in new_model.named_parameters():
        old_weight = old_weights[name]
        weight[: len(old_weight)] = old_weight
        if len(weight) > len(old_weight):
            weight[len(old_weight) :] = old_weight.float().mean(0)
    new_model.tokenizer = model.tokenizer
    return new_model.to(model.lm_head_weight.device).train(model.training)
