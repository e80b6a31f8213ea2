"""Norms and histograms of a model's weights and gradients while it trains, at the steps that the recipe asks for."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from smolforge.config import Report
from smolforge.tracking import Event, Histogram, Watched

BINS = 64


class Watch:
    """Norms and histograms of a step: of gradients once they are complete, of weights after the step."""

    def __init__(self, model: nn.Module, report: Report, emit: Callable[[Event], None]) -> None:
        self.model, self.report, self.emit = model, report, emit
        self.norms: dict[str, Tensor] = {}
        self.histograms: dict[str, Histogram] = {}

    def gradients(self, step: int) -> None:
        """Record the gradients of a step, before they are clipped; called at each step."""
        if self.report.watch in ("gradients", "all") and step % self.report.watch_every == 0:
            named_gradients = (
                (name, weight.grad) for name, weight in self.model.named_parameters() if weight.grad is not None
            )
            self.record("grad_norm", "gradients", named_gradients)

    def finish_step(self, step: int) -> dict[str, float]:
        """Emit the histograms, and return the norms, which join the step's metrics."""
        if self.report.watch in ("parameters", "all"):
            self.record("weight_norm", "parameters", self.model.named_parameters())
        self.emit(Watched(step, self.histograms))
        norms = {name: norm.item() for name, norm in self.norms.items()}
        self.norms, self.histograms = {}, {}
        return norms

    def record(self, norm: str, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.norms[f"{norm}/{name}"] = torch.linalg.vector_norm(tensor.detach())
            self.histograms[f"{kind}/{name}"] = histogram(tensor.detach())


def histogram(tensor: Tensor) -> Histogram:
    """Return the histogram of the finite values of a tensor, in BINS equal parts of their range."""
    values = tensor.flatten().float()
    values = values[values.isfinite()]
    low, high = (float(bound) for bound in values.aminmax()) if values.numel() else (0.0, 0.0)
    if low == high:
        half = max(abs(low), 1.0) / 2
        low, high = low - half, high + half
    counts = torch.histc(values / 4, BINS, low / 4, high / 4)  # a quarter: their range is a finite number too
    return Histogram(counts.cpu().numpy(), np.linspace(low, high, BINS + 1))


def weight_norm(model: nn.Module) -> float:
    """Return the norm of all weights together."""
    return nn.utils.get_total_norm(weight.detach() for weight in model.parameters()).item()
