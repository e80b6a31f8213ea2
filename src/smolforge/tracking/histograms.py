"""What the tensors of a model are like while it trains: norms, and how values are spread.

Nothing is looked at but at the steps, and of the kind, that a recipe asks for.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from smolforge.config import Report
from smolforge.tracking import Event, Histogram, Watched

BINS = 64


class Watch:
    """Looks at gradients when those of a step are whole, at weights after it, and tells at its end."""

    def __init__(self, model: nn.Module, report: Report, tell: Callable[[Event], None]) -> None:
        self.model, self.report, self.tell = model, report, tell
        self.norms: dict[str, Tensor] = {}
        self.spread: dict[str, Histogram] = {}

    def gradients(self, step: int) -> None:
        """Asked at each step, before its gradients are clipped and used."""
        if self.report.watch in ("gradients", "all") and step % self.report.watch_every == 0:
            found = ((name, weight.grad) for name, weight in self.model.named_parameters() if weight.grad is not None)
            self.look("grad_norm", "gradients", found)

    def after(self, step: int) -> dict[str, float]:
        """Tell how all is spread; returns the norms, which join the step's metrics."""
        if self.report.watch in ("parameters", "all"):
            self.look("weight_norm", "parameters", self.model.named_parameters())
        self.tell(Watched(step, self.spread))
        norms = {name: norm.item() for name, norm in self.norms.items()}
        self.norms, self.spread = {}, {}
        return norms

    def look(self, norm: str, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.norms[f"{norm}/{name}"] = torch.linalg.vector_norm(tensor.detach())
            self.spread[f"{kind}/{name}"] = histogram(tensor.detach())


def histogram(tensor: Tensor) -> Histogram:
    """How the finite values of a tensor are spread over BINS equal parts of their range."""
    values = tensor.flatten().float()
    values = values[values.isfinite()]
    low, high = (float(each) for each in values.aminmax()) if values.numel() else (0.0, 0.0)
    if low == high:
        half = max(abs(low), 1.0) / 2
        low, high = low - half, high + half
    counts = torch.histc(values / 4, BINS, low / 4, high / 4)  # a quarter: their range is a finite number too
    return Histogram(counts.cpu().numpy(), np.linspace(low, high, BINS + 1))


def weight_norm(model: nn.Module) -> float:
    """Of all weights together."""
    return nn.utils.get_total_norm(weight.detach() for weight in model.parameters()).item()
