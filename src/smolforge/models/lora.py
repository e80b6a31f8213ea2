"""LoRA: low-rank matrices that are trained in place of the weights they are added to: W x + alpha / rank * B A x.

Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    model -> add_lora -> training of A and B only -> merged_parameters: the tensors of a plain model, as files have them
                                                  -> merge: a plain model again
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smolforge.config import Lora
from smolforge.errors import ConfigError
from smolforge.formatting import format_value

A, B = "lora_A", "lora_B"


class LoRALinear(nn.Module):
    """A linear layer whose weight stays, and a product of two narrow ones that learns; at first that product is 0."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged_weight(self) -> Float[Tensor, "o i"]:
        """The one matrix that does the same; added in fp32 at least."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.lora_B.to(wide) @ self.lora_A.to(wide)
        return torch.add(self.weight.to(wide), update, alpha=self.scaling).to(self.weight.dtype)


def add_lora(model: nn.Module, settings: Lora, seed: int) -> None:
    """Replace the linear layers that `targets` name by LoRALinear, and freeze everything else.

    A is drawn as peft draws it, uniform within 1 / sqrt(inputs). Raises ConfigError for a target there is none of, or
    a rank that none of them can have.
    """
    assert settings.rank is not None
    for weight in model.parameters():
        weight.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    leaf_names = dict.fromkeys(last_component(name) for name in linear if name != "lm_head")
    for target in settings.targets:
        if target not in leaf_names:
            raise ConfigError(
                f"lora.targets has {format_value(target)}; the linear layers of this model are {', '.join(leaf_names)}"
            )
    chosen = {name: module for name, module in linear.items() if last_component(name) in settings.targets}
    max_rank = max(min(module.weight.shape) for module in chosen.values())
    if settings.rank > max_rank:
        raise ConfigError(f"lora.rank is {settings.rank}; no matrix of lora.targets has a higher one than {max_rank}")
    generator = torch.Generator().manual_seed(seed)
    for name, module in chosen.items():
        lora_linear = LoRALinear(module, settings.rank, settings.alpha)
        bound = 1 / math.sqrt(module.in_features)
        values = torch.empty(lora_linear.lora_A.shape).uniform_(-bound, bound, generator=generator)
        lora_linear.lora_A.data.copy_(values)
        model.set_submodule(name, lora_linear)


def last_component(name: str) -> str:
    return name.rpartition(".")[2]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return every LoRA layer by its name; none where a model is plain."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters of LoRA by name."""
    return {name: weight for name, weight in model.named_parameters() if last_component(name) in (A, B)}


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter of the plain model with the same function, LoRA merged."""
    layers = lora_layers(model)
    for name, weight in model.named_parameters():
        layer = layers.get(name.rpartition(".")[0])
        if layer is None or last_component(name) == "bias":
            yield name, weight
        elif last_component(name) == "weight":
            yield name, layer.merged_weight()


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Make it a plain model again, that says the same to rounding."""
    for name, layer in lora_layers(model).items():
        o, i = layer.weight.shape
        plain = nn.Linear(i, o, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.merged_weight()), layer.bias
        model.set_submodule(name, plain)


def lora_parameter_count(name: str, shape: Sequence[int], settings: Lora) -> int:
    """Count the LoRA parameters for a weight of this name and shape."""
    return (settings.rank or 0) * sum(shape) if last_component(name) in settings.targets and len(shape) == 2 else 0
