"""Parameter groups, optimizers, the average of the weights they make, and the learning rate as a function of the step.

gradients -> AdamW, Muon -> weights -> Average -> `averaged`: what is measured, sampled and saved as the model
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from smolforge.config import Optim, Schedule, custom_classes
from smolforge.errors import InvalidFile, SettingError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def optimizers(model: nn.Module, settings: Optim) -> list[Optimizer]:
    """The optimizers of a recipe; together they own every parameter that learns exactly once. An average comes last.

    adamw: matrices decay, vectors do not. muon: the matrices inside the layers are orthogonalised;
    embedding, head and norms are AdamW's, as Muon's author advises.
    """
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = {name: weight for name, weight in learning.items() if weight.ndim > 1}
    vectors = [weight for weight in learning.values() if weight.ndim <= 1]
    match settings.name:
        case "adamw":
            chosen: list[Optimizer] = [adamw(matrices.values(), vectors, settings)]
        case "muon":
            inner = [weight for name, weight in matrices.items() if ".layers." in name]
            outer = [weight for name, weight in matrices.items() if ".layers." not in name]
            chosen = [
                Muon(inner, settings.matrix_learning_rate, settings.momentum, settings.weight_decay),
                adamw(outer, vectors, settings),
            ]
        case name:
            chosen = [own_optimizer(name, groups(matrices.values(), vectors, settings), settings)]
    owned = [id(weight) for each in chosen for group in each.param_groups for weight in group["params"]]
    assert sorted(owned) == sorted(map(id, learning.values())), "a parameter is forgotten or owned twice"
    return chosen if settings.ema_decay is None else [*chosen, Average(learning.values(), settings.ema_decay)]


def adamw(matrices: Iterable[nn.Parameter], vectors: Iterable[nn.Parameter], settings: Optim) -> AdamW:
    """Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101."""
    decayed = groups(matrices, vectors, settings)
    return AdamW(decayed, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def groups(matrices: Iterable[nn.Parameter], vectors: Iterable[nn.Parameter], settings: Optim) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    return [
        {"params": list(matrices), "weight_decay": settings.weight_decay},
        {"params": list(vectors), "weight_decay": 0.0},
    ]


def own_optimizer(name: str, decayed: list[dict[str, Any]], settings: Optim) -> Optimizer:
    """A class of a person's own, made of these groups, lr, and what else of the recipe's its constructor names.

    It needs to know nothing of updates that are left out: `step` is then not called. What it remembers must be tensors
    in its `state`, or a run could not be resumed; its first step raises SettingError where it is not.
    """
    said = {"betas": settings.betas, "eps": settings.eps, "momentum": settings.momentum}
    asked = inspect.signature(custom_classes.admitted("optim.name", name)).parameters
    given = {key: value for key, value in said.items() if key in asked}
    chosen = custom_classes.made("optim.name", name, Optimizer, decayed, lr=settings.learning_rate, **given)
    plain = chosen.step

    def step(closure: Any = None) -> None:
        unwanted = vars(chosen).pop("found_inf", None)  # torch's own would take it for a scaler's
        if unwanted is None or not unwanted.item():
            plain(closure)
            check_remembered(name, chosen)

    vars(chosen)["step"] = step
    return chosen


def check_remembered(name: str, chosen: Optimizer) -> None:
    """Raises SettingError for what a checkpoint could not hold."""
    for kept in chosen.state.values():
        for what, value in kept.items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise SettingError(f"optim.name: {name} keeps {what} as {kind}; a checkpoint can hold tensors only")


class Muon(Optimizer):
    """Momentum whose update is the nearest orthogonal matrix: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.

    Equal to torch.optim.Muon with its original learning-rate rule, but orthogonalised in fp32 on a CPU:
    torch's bf16 is 44 times slower there.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"].lerp(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(average, group["momentum"]))
                stretch = math.sqrt(max(1, weight.shape[-2] / weight.shape[-1]))
                moved = weight * (1 - group["lr"] * group["weight_decay"])
                moved.add_(update, alpha=-group["lr"] * stretch)
                for old, new in ((state["momentum_buffer"], average), (weight, moved)):
                    old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))


def orthogonal(matrix: Float[Tensor, "*e r c"], rounds: int = 5) -> Float[Tensor, "*e r c"]:
    """Singular values driven towards 1 by a quintic Newton-Schulz iteration (the coefficients are Muon's).

    The matrices of several experts are so many matrices.
    """
    if matrix.ndim > 2:
        return torch.stack([orthogonal(each, rounds) for each in matrix])
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Average(Optimizer):
    """An exponential moving average of the weights, which it leaves alone until `swap` puts the average in their place.

    Stepped after what updates them. Update n counts for max(1 - decay, 9 / (n + 8)): in a run too short for its decay
    the mean age of what is averaged is a tenth of the run. TensorFlow's rule, its t counted from the second update:
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage. torch's AveragedModel would not hear
    of updates left out.
    """

    STATE = ("average", "training", "averaged")
    """Of each weight: one of the first two, whichever it is not itself just now, and how many updates are averaged."""

    def __init__(self, params: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__(params, {"decay": decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take in the weights as they are, unless their update was left out."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in self.state:
                    self.state[weight] = {"average": weight.clone(), "averaged": weight.new_zeros(())}
            states = [self.state[weight] for weight in group["params"]]
            wanted = 1.0 if self.found_inf is None else 1 - self.found_inf
            share = wanted * (9 / (states[0]["averaged"] + 9)).clamp(min=1 - group["decay"])
            for weight, state in zip(group["params"], states, strict=True):
                state["average"].lerp_(weight, share)
                state["averaged"] += wanted

    def swap(self) -> None:
        """Exchange weights and average; nothing is copied."""
        for weight, state in self.state.items():
            here, there = ("average", "training") if "average" in state else ("training", "average")
            weight.data, state[there] = state.pop(here), weight.data


OURS = (AdamW, Muon, Average)
"""Of these it is known what they remember."""


def swap_average(chosen: Sequence[Optimizer]) -> None:
    """Where there is an average, give the model its averaged weights, or back those that are trained."""
    for each in chosen:
        if isinstance(each, Average):
            each.swap()


@contextmanager
def averaged(chosen: Sequence[Optimizer]) -> Iterator[None]:
    """In here the model has its averaged weights, where there is an average."""
    swap_average(chosen)
    try:
        yield
    finally:
        swap_average(chosen)


def learning_rate(step: int, peak: float, schedule: Schedule) -> float:
    """The rate of the update that follows `step` finished ones.

    The first update of a warm-up of w steps has peak / w, the w-th the peak; the fall starts at the
    peak and would reach `final_learning_rate` with the first step beyond the horizon, so no update is
    spent at rate 0. Linear and 1-sqrt as in nanotron (optim's lr lambda); warmup-stable-decay: Hu et
    al. 2024, https://arxiv.org/abs/2404.06395; 1-sqrt: Hägele et al. 2024, https://arxiv.org/abs/2405.18392.
    """
    assert schedule.steps is not None and schedule == schedule.over(0), "a run settles its schedule when it starts"
    warmup, final = schedule.warmup_steps, schedule.final_learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.decay is None:
        return peak
    length = schedule.decay_steps or schedule.steps - warmup
    progress = min(max(0.0, (step - (schedule.steps - length)) / max(1, length)), 1.0)
    match schedule.decay:
        case "linear":
            kept = 1 - progress
        case "1-sqrt":
            kept = 1 - math.sqrt(progress)
        case "cosine":
            kept = (1 + math.cos(math.pi * progress)) / 2
        case _:
            assert_never(schedule.decay)
    return final + (peak - final) * kept


def leave_out(chosen: Sequence[Optimizer], unwanted: Float[Tensor, ""] | None) -> None:
    """Make the next update change nothing, moments included, where `unwanted` is 1.0 by then; None is no question.

    The device decides, so nobody waits for the number. It is how GradScaler tells torch's fused optimizers.
    """
    for each in chosen:
        vars(each)["found_inf"] = unwanted


def scale_learning_rates(chosen: Sequence[Optimizer], factor: float) -> None:
    """Set every group's rate to this share of its peak."""
    for each in chosen:
        for group in each.param_groups:
            if "lr" in group:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def state_tensors(chosen: Sequence[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Everything the optimizers remember, named `<what>.<parameter>`, ready for a safetensors file."""
    return {
        f"{what}.{name}": value
        for name, weight in model.named_parameters()
        for each in chosen
        for what, value in each.state.get(weight, {}).items()
    }


def load_state_tensors(chosen: Sequence[Optimizer], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the optimizers back what `state_tensors` named.

    Raises InvalidFile where the tensors are not this model's.
    """
    weights = dict(model.named_parameters())
    names = {weight: name for name, weight in weights.items()}
    owners = {
        (names[weight], isinstance(each, Average)): each
        for each in chosen
        for group in each.param_groups
        for weight in group["params"]
    }
    for key, tensor in tensors.items():
        what, _, name = key.partition(".")
        owner = owners.get((name, what in Average.STATE))
        fits = not isinstance(owner, OURS) or tensor.shape in (weights[name].shape, torch.Size([]))
        if owner is None or not fits:
            raise InvalidFile(f"the optimizer state has {key!r}, which does not fit this model")
        # A copy: where they lie in the file, tensors are not aligned as those of a run that goes on are.
        owner.state[weights[name]][what] = tensor.to(weights[name].device, copy=True)
    for (name, _), owner in owners.items():
        if tensors and isinstance(owner, OURS) and not owner.state[weights[name]]:
            raise InvalidFile(f"the optimizer state lacks {name!r}")
