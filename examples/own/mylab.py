"""Classes of one's own, for a recipe or a study beside this file to name."""

import torch
from torch.optim import Optimizer

from smolforge.models.attention import SlidingWindow
from smolforge.models.decoder import Attention


class SlidingAttention(Attention):
    """Ours, but that a token sees the last 64 alone, in every layer except each fourth."""

    def forward(self, x, cos_sin, context):
        return super().forward(x, cos_sin, context if self.layer % 4 == 3 else SlidingWindow(context, 64))


class Lion(Optimizer):
    """The sign of a momentum: Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2."""

    def __init__(self, params, lr, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(momentum.lerp(weight.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                momentum.lerp_(weight.grad, 1 - group["betas"][1])
