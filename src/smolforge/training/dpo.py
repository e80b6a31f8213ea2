"""What a micro-batch of pairs loses: direct preference optimisation (DPO).

    margin = beta * ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)))
    loss   = -log sigmoid(margin), the mean over pairs

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290. pi is the model that learns, ref the one it began as, whose
log-probabilities come with the batch; log p of an answer is the sum over its tokens.

Axes: b rows, t tokens of a row, p pairs a row could have.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.data.batches import pairs_of
from smolforge.training.loss import label_log_probs


@dataclass(frozen=True)
class Preference:
    """The loss of pairs. In a row they stand side by side, of each the chosen sequence before the rejected one."""

    beta: float

    def __call__(
        self,
        hidden: Float[Tensor, "b t c"],
        head: Float[Tensor, "v c"],
        labels: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        reference: Float[Tensor, "b t"],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over pairs by name, of which `objective` has a gradient, and how many pairs there are.

        `reference` has log ref of each sequence where that begins, and 0 elsewhere.
        """
        policy = by_sequence(label_log_probs(hidden, head, labels), positions)
        chosen, rejected = (self.beta * (policy - by_sequence(reference, positions))).unbind(-1)
        there = torch.arange(chosen.shape[1], device=labels.device) < pairs_of(positions)[:, None]
        total = -F.logsigmoid(chosen - rejected).where(there, 0).sum()
        told = {
            "loss": total,
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
            "reward_margin": (chosen - rejected).sum(),
            "reward_accuracy": (chosen > rejected).sum(),
        }
        return {"objective": total} | {name: value.detach() for name, value in told.items()}, there.sum()


def by_sequence(numbers: Float[Tensor, "b t"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b p 2"]:
    """Sums over the chosen and the rejected sequence of each pair; 0 where a row has fewer pairs."""
    place = (positions == 0).cumsum(1) - 1
    room = numbers.new_zeros(numbers.shape[0], numbers.shape[1] // 2 * 2)
    return room.scatter_add(1, place, numbers).unflatten(1, (-1, 2))
