"""Parameter groups, optimizers, the EMA of the weights, and the learning-rate schedule.

gradients -> AdamW, Muon -> weights -> EMA -> `ema_weights`: what is validated, sampled and saved as the model
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
from smolforge.errors import ConfigError, InvalidFileError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def build_optimizers(model: nn.Module, settings: Optim) -> list[Optimizer]:
    """Return the optimizers of a recipe. Each trainable parameter is owned by exactly one; an EMA comes last."""
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = {name: weight for name, weight in trainable.items() if weight.ndim > 1}
    vectors = [weight for weight in trainable.values() if weight.ndim <= 1]
    match settings.name:
        case "adamw":
            optimizers: list[Optimizer] = [adamw(matrices.values(), vectors, settings)]
        case "muon":
            inner = [weight for name, weight in matrices.items() if ".layers." in name]
            outer = [weight for name, weight in matrices.items() if ".layers." not in name]
            optimizers = [
                Muon(inner, settings.matrix_learning_rate, settings.momentum, weight_decay=settings.weight_decay),
                adamw(outer, vectors, settings),
            ]
        case name:
            optimizers = [custom_optimizer(name, param_groups(matrices.values(), vectors, settings), settings)]
    owned = [id(weight) for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(owned) == sorted(map(id, trainable.values())), "a parameter is forgotten or owned twice"
    return optimizers if settings.ema_decay is None else [*optimizers, EMA(trainable.values(), settings.ema_decay)]


def adamw(matrices: Iterable[nn.Parameter], vectors: Iterable[nn.Parameter], settings: Optim) -> AdamW:
    """Return AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101."""
    decayed = param_groups(matrices, vectors, settings)
    return AdamW(decayed, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def param_groups(
    matrices: Iterable[nn.Parameter], vectors: Iterable[nn.Parameter], settings: Optim
) -> list[dict[str, Any]]:
    """Return two groups: matrices decay, vectors do not."""
    return [
        {"params": list(matrices), "weight_decay": settings.weight_decay},
        {"params": list(vectors), "weight_decay": 0.0},
    ]


def custom_optimizer(name: str, groups: list[dict[str, Any]], settings: Optim) -> Optimizer:
    """Return a user's own optimizer class, built from these groups, lr, and other settings its constructor names.

    It needs to know nothing of skipped updates: `step` is then not called. Its state must be tensors, or a run could
    not be resumed; its first step raises ConfigError where it is not.
    """
    available = {"betas": settings.betas, "eps": settings.eps, "momentum": settings.momentum}
    accepted = inspect.signature(custom_classes.get_class("optim.name", name)).parameters
    kwargs = {key: value for key, value in available.items() if key in accepted}
    optimizer = custom_classes.instantiate("optim.name", name, Optimizer, groups, lr=settings.learning_rate, **kwargs)
    plain_step = optimizer.step

    def step(closure: Any = None) -> None:
        found_inf = vars(optimizer).pop("found_inf", None)  # torch's own would take it for a scaler's
        if found_inf is None or not found_inf.item():
            plain_step(closure)
            check_optimizer_state(name, optimizer)

    vars(optimizer)["step"] = step
    return optimizer


def check_optimizer_state(name: str, optimizer: Optimizer) -> None:
    """Raise ConfigError for state that a checkpoint could not hold."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise ConfigError(f"optim.name: {name} keeps {key} as {kind}; a checkpoint can hold tensors only")


class Muon(Optimizer):
    """Momentum whose update is the nearest orthogonal matrix: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon.

    Equal to torch.optim.Muon with its original learning-rate rule, but orthogonalised in fp32 on a CPU:
    torch's bf16 is 44 times slower there.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, *, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights from their gradients."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"].lerp(weight.grad, 1 - group["momentum"])
                update = newton_schulz(weight.grad.lerp(average, group["momentum"]))
                stretch = math.sqrt(max(1, weight.shape[-2] / weight.shape[-1]))
                moved = weight * (1 - group["lr"] * group["weight_decay"])
                moved.add_(update, alpha=-group["lr"] * stretch)
                for old, new in ((state["momentum_buffer"], average), (weight, moved)):
                    old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))


def newton_schulz(matrix: Float[Tensor, "*e r c"], num_iterations: int = 5) -> Float[Tensor, "*e r c"]:
    """Return the matrix with singular values driven towards 1 by a quintic Newton-Schulz iteration (Muon's
    coefficients).

    The weights of several experts are as many matrices.
    """
    if matrix.ndim > 2:
        return torch.stack([newton_schulz(expert, num_iterations) for expert in matrix])
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(num_iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class EMA(Optimizer):
    """An exponential moving average of the weights; `swap` exchanges it with the weights.

    Stepped after the optimizers that update them. Update n counts for max(1 - decay, 9 / (n + 8)): in a run too short
    for its decay the mean age of what is averaged is a tenth of the run. TensorFlow's rule, its t counted from the
    second update: https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage. torch's AveragedModel
    would not skip the updates that a guard skips.
    """

    STATE = ("average", "training", "averaged")
    """Of each weight: one of the first two, whichever it is not itself just now, and how many updates are averaged."""

    def __init__(self, params: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__(params, {"decay": decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Add the weights to the average, unless their update was skipped."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in self.state:
                    self.state[weight] = {"average": weight.clone(), "averaged": weight.new_zeros(())}
            states = [self.state[weight] for weight in group["params"]]
            applied = 1.0 if self.found_inf is None else 1 - self.found_inf
            share = applied * (9 / (states[0]["averaged"] + 9)).clamp(min=1 - group["decay"])
            for weight, state in zip(group["params"], states, strict=True):
                state["average"].lerp_(weight, share)
                state["averaged"] += applied

    def swap(self) -> None:
        """Exchange weights and average; nothing is copied."""
        for weight, state in self.state.items():
            key, other_key = ("average", "training") if "average" in state else ("training", "average")
            weight.data, state[other_key] = state.pop(key), weight.data


BUILT_IN = (AdamW, Muon, EMA)
"""Of these it is known what they remember."""


def swap_ema(optimizers: Sequence[Optimizer]) -> None:
    """Exchange the model's weights with their EMA, where there is one."""
    for optimizer in optimizers:
        if isinstance(optimizer, EMA):
            optimizer.swap()


@contextmanager
def ema_weights(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Give the model the EMA of its weights while the context is open, where there is one."""
    swap_ema(optimizers)
    try:
        yield
    finally:
        swap_ema(optimizers)


def lr_at_step(step: int, peak: float, schedule: Schedule) -> float:
    """Return the learning rate of the update that follows `step` completed ones.

    The first update of a warm-up of w steps has peak / w, the w-th the peak. The decay starts at the peak and would
    reach `final_learning_rate` with the first step beyond the horizon, so no update is spent at rate 0. Linear and
    1-sqrt as in nanotron (optim's lr lambda); warmup-stable-decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395;
    1-sqrt: Hägele et al. 2024, https://arxiv.org/abs/2405.18392.
    """
    assert schedule.steps is not None and schedule == schedule.resolved(0), "a run settles its schedule when it starts"
    warmup, final = schedule.warmup_steps, schedule.final_learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.decay is None:
        return peak
    length = schedule.decay_steps or schedule.steps - warmup
    progress = min(max(0.0, (step - (schedule.steps - length)) / max(1, length)), 1.0)
    match schedule.decay:
        case "linear":
            remaining = 1 - progress
        case "1-sqrt":
            remaining = 1 - math.sqrt(progress)
        case "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
        case _:
            assert_never(schedule.decay)
    return final + (peak - final) * remaining


def set_found_inf(optimizers: Sequence[Optimizer], found_inf: Float[Tensor, ""] | None) -> None:
    """Make the next update change nothing, moments included, where `found_inf` is 1.0 by then; None: always update.

    The device decides, so the CPU waits for no number. GradScaler tells torch's fused optimizers in the same way.
    """
    for optimizer in optimizers:
        vars(optimizer)["found_inf"] = found_inf


def set_lr_scale(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def state_tensors(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Return the state of all optimizers, named `<key>.<parameter>`, for a safetensors file."""
    return {
        f"{key}.{name}": value
        for name, weight in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(weight, {}).items()
    }


def load_state_tensors(optimizers: Sequence[Optimizer], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load what `state_tensors` returned. Raises InvalidFileError where the tensors are not this model's."""
    weights = dict(model.named_parameters())
    names = {weight: name for name, weight in weights.items()}
    owners = {
        (names[weight], isinstance(optimizer, EMA)): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    for key, tensor in tensors.items():
        key_of_state, _, name = key.partition(".")
        owner = owners.get((name, key_of_state in EMA.STATE))
        fits = not isinstance(owner, BUILT_IN) or tensor.shape in (weights[name].shape, torch.Size([]))
        if owner is None or not fits:
            raise InvalidFileError(f"the optimizer state has {key!r}, which does not fit this model")
        # A copy: where they lie in the file, tensors are not aligned as those of a run that goes on are.
        owner.state[weights[name]][key_of_state] = tensor.to(weights[name].device, copy=True)
    for (name, _), owner in owners.items():
        if tensors and isinstance(owner, BUILT_IN) and not owner.state[weights[name]]:
            raise InvalidFileError(f"the optimizer state lacks {name!r}")
