"""Low-rank updates, which learn in place of the weights they are added to: W x + alpha / rank * B A x.

Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    model -> adapt -> trained: A and B alone -> folded: the tensors of a plain model, as files have them
                                             -> merge: a plain model again
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smolforge.config import Lora
from smolforge.config.base import shown
from smolforge.errors import SettingError

A, B = "lora_A", "lora_B"


class LowRank(nn.Module):
    """A linear layer whose weight stays, and a product of two narrow ones that learns; at first that product is 0."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged(self) -> Float[Tensor, "o i"]:
        """The one matrix that does the same; added in fp32 at least."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        added = self.lora_B.to(wide) @ self.lora_A.to(wide)
        return torch.add(self.weight.to(wide), added, alpha=self.scale).to(self.weight.dtype)


def adapt(model: nn.Module, settings: Lora, seed: int) -> None:
    """Make the linear layers that `targets` name low-rank, and let nothing else of the model learn.

    A is drawn as peft draws it, uniform within 1 / sqrt(inputs). Raises SettingError for a target there is none of, or
    a rank that none of them can have.
    """
    assert settings.rank is not None
    for weight in model.parameters():
        weight.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = dict.fromkeys(last(name) for name in linear if name != "lm_head")
    for target in settings.targets:
        if target not in known:
            raise SettingError(
                f"lora.targets has {shown(target)}; the linear layers of this model are {', '.join(known)}"
            )
    chosen = {name: module for name, module in linear.items() if last(name) in settings.targets}
    highest = max(min(module.weight.shape) for module in chosen.values())
    if settings.rank > highest:
        raise SettingError(f"lora.rank is {settings.rank}; no matrix of lora.targets has a higher one than {highest}")
    generator = torch.Generator().manual_seed(seed)
    for name, module in chosen.items():
        made = LowRank(module, settings.rank, settings.alpha)
        bound = 1 / math.sqrt(module.in_features)
        drawn = torch.empty(made.lora_A.shape).uniform_(-bound, bound, generator=generator)
        made.lora_A.data.copy_(drawn)
        put(model, name, made)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another is."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).add_module(child, module)


def last(name: str) -> str:
    return name.rpartition(".")[2]


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """Every low-rank layer by its name; none where a model is plain."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """What learns, by the parameters' names."""
    return {name: weight for name, weight in model.named_parameters() if last(name) in (A, B)}


def folded(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of the plain model that says the same."""
    layers = low_rank(model)
    for name, weight in model.named_parameters():
        layer = layers.get(name.rpartition(".")[0])
        if layer is None or last(name) == "bias":
            yield name, weight
        elif last(name) == "weight":
            yield name, layer.merged()


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Make it a plain model again, that says the same to rounding."""
    for name, layer in low_rank(model).items():
        o, i = layer.weight.shape
        plain = nn.Linear(i, o, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.merged()), layer.bias
        put(model, name, plain)


def size(name: str, shape: Sequence[int], settings: Lora) -> int:
    """How many numbers learn in place of a weight of this name and shape."""
    return (settings.rank or 0) * sum(shape) if last(name) in settings.targets and len(shape) == 2 else 0
