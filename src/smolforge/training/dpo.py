"""Direct preference optimization (DPO): the loss of a micro-batch of pairs.

    margin = beta * ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)))
    loss   = -log sigmoid(margin), the mean over pairs

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290. pi is the model in training, ref the reference model, whose
log-probabilities come with the batch; log p of an answer is the sum over its tokens.

Axes: b rows, t tokens of a row, p pairs a row could have.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.data.batches import count_pairs
from smolforge.training.loss import label_log_probs


@dataclass(frozen=True)
class DPOLoss:
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
        policy = sum_by_sequence(label_log_probs(hidden, head, labels), positions)
        chosen, rejected = (self.beta * (policy - sum_by_sequence(reference, positions))).unbind(-1)
        is_pair = torch.arange(chosen.shape[1], device=labels.device) < count_pairs(positions)[:, None]
        total = -F.logsigmoid(chosen - rejected).where(is_pair, 0).sum()
        metrics = {
            "loss": total,
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
            "reward_margin": (chosen - rejected).sum(),
            "reward_accuracy": (chosen > rejected).sum(),
        }
        return {"objective": total} | {name: value.detach() for name, value in metrics.items()}, is_pair.sum()


def sum_by_sequence(numbers: Float[Tensor, "b t"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b p 2"]:
    """Return the sums over the chosen and the rejected sequence of each pair; 0 where a row has fewer pairs."""
    sequence_index = (positions == 0).cumsum(1) - 1
    sums = numbers.new_zeros(numbers.shape[0], numbers.shape[1] // 2 * 2)
    return sums.scatter_add(1, sequence_index, numbers).unflatten(1, (-1, 2))
