"""How a model that learns from pairs takes those it has not seen: loss, rewards, how often it prefers the chosen."""

import torch

from smolforge.data.pairs import PairRows
from smolforge.device import moved
from smolforge.objective import Objective


@torch.no_grad()
def measure_pairs(objective: Objective, rows: PairRows, max_tokens: int | None = None) -> dict[str, float]:
    """loss, reward_chosen, reward_rejected, reward_margin and reward_accuracy, each the mean over pairs.

    Of all rows, or of the first that hold `max_tokens`, one at least.
    """
    model, training = objective.model, objective.model.training
    count = rows.count if max_tokens is None else min(rows.count, max(1, max_tokens // rows.sequence_length))
    sums: dict[str, float] = {}
    pairs = 0
    model.eval()
    for number in range(count):
        batch = rows.batch(number, 1)
        pairs += batch.counted
        found = objective(*batch.each(lambda side: moved(side, model.head.device)))
        found.pop("objective")
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    model.train(training)
    return {name: value / pairs for name, value in sums.items()}
