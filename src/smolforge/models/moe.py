"""A sparse mixture of experts: each token goes to the few feed-forwards a router picks for it.

Mixtral's, Jiang et al. 2024, https://arxiv.org/abs/2401.04088. Tokens are sorted by expert, every expert
works on its own stretch of rows, and the rows go back to where they came from:

    token       A A B B C C          sorted    A C | B C | A B
    its experts 0 2 1 2 0 1          expert    0 0 | 1 1 | 2 2

Axes: b batch, t tokens, c hidden, f intermediate, e experts, n = b t tokens in one row, r = n times
`num_experts_per_tok` rows.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smolforge.config import ModelConfig

AuxLoss = Float[Tensor, ""]


class MoE(nn.Module):
    """A router and its experts, in the place of a dense feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = GroupedExperts(config)

    def forward(self, x: Float[Tensor, "b t c"]) -> tuple[Float[Tensor, "b t c"], AuxLoss]:
        """What is added to the residual stream, and the balance loss of this layer."""
        tokens, top_k = x.flatten(0, 1), self.num_experts_per_tok
        scores = self.gate(tokens)
        probabilities = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        weights, chosen = probabilities.topk(top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=probabilities.shape[1])
        rows = self.experts(tokens.repeat_interleave(top_k, 0)[order], counts)
        unsorted = rows[order.argsort()].unflatten(0, (-1, top_k))
        mixed = (unsorted * weights[..., None].to(unsorted.dtype)).sum(1)
        return mixed.view_as(x), balance_loss(probabilities, counts)


class GroupedExperts(nn.Module):
    """SwiGLU feed-forwards side by side, their matrices stacked by expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, inside, outside = config.num_local_experts, config.intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(count, inside, outside))
        self.up_proj = nn.Parameter(torch.empty(count, inside, outside))
        self.down_proj = nn.Parameter(torch.empty(count, outside, inside))

    def forward(self, rows: Float[Tensor, "r c"], counts: Int[Tensor, " e"]) -> Float[Tensor, "r c"]:
        gate = grouped_linear(rows, self.gate_proj, counts)
        return grouped_linear(F.silu(gate) * grouped_linear(rows, self.up_proj, counts), self.down_proj, counts)


def grouped_linear(
    rows: Float[Tensor, "r i"], matrices: Float[Tensor, "e o i"], counts: Int[Tensor, " e"]
) -> Float[Tensor, "r o"]:
    """The first counts[0] rows times matrices[0], the next counts[1] times matrices[1], and so on."""
    if rows.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        rows, matrices = rows.to(dtype), matrices.to(dtype)
    if rows.is_cuda and supports_grouped_mm(matrices):
        return grouped_mm_kernel(rows, matrices, counts)
    groups = rows.split(counts.tolist())
    return torch.cat([F.linear(group, matrix) for group, matrix in zip(groups, matrices, strict=True)])


def grouped_mm_kernel(
    rows: Float[Tensor, "r i"], matrices: Float[Tensor, "e o i"], counts: Int[Tensor, " e"]
) -> Float[Tensor, "r o"]:
    """Compute `grouped_linear` as one kernel, without asking the device how many rows each expert has."""
    return F.grouped_mm(rows, matrices.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


def supports_grouped_mm(matrices: Float[Tensor, "e o i"]) -> bool:
    """Whether the kernel takes the matrices:
    bfloat16 whose rows, and those of its transpose, begin at multiples of 16 bytes.
    """
    available = "grouped_mm" in F.__dict__ and matrices.dtype == torch.bfloat16
    return available and all(side * matrices.element_size() % 16 == 0 for side in matrices.shape[1:])


def balance_loss(probabilities: Float[Tensor, "n e"], counts: Int[Tensor, " e"]) -> AuxLoss:
    """Experts times the sum over experts of (share of tokens sent) x (mean probability): Fedus et al. 2021,
    https://arxiv.org/abs/2101.03961, equations 4 to 6. `num_experts_per_tok` when all are used alike.
    """
    share = counts.to(probabilities.dtype) / probabilities.shape[0]
    return probabilities.shape[1] * (share * probabilities.mean(0)).sum()
