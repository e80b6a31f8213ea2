"""Count how many tokens may still be written, for each split or for both."""

import math
from collections import Counter
from typing import Any

from smolforge.data.corpus import HELD_OUT, TRAIN


class TokenBudget:
    """An upper limit of tokens, and what is used of it. If `shared`, both splits share it; else each has its part."""

    def __init__(self, limit: int | None = None, held_out: float = 0.0, shared: bool = True) -> None:
        self.limits: tuple[Any, ...] = (limit, held_out, shared)
        self.limit, self.shared = math.inf if limit is None else limit, shared
        held_out_tokens = 0 if limit is None else int(limit * held_out)
        self.limits_by_split = {
            TRAIN: self.limit - held_out_tokens,
            HELD_OUT: held_out_tokens if limit is not None else math.inf,
        }
        self.used: Counter[str] = Counter()

    def copy(self) -> "TokenBudget":
        """Return a budget with the same limits, of which nothing is used."""
        return TokenBudget(*self.limits)

    def remaining(self, split: str) -> float:
        return float(self.limit - self.used.total() if self.shared else self.limits_by_split[split] - self.used[split])

    def take(self, split: str, tokens: int) -> None:
        self.used[split] += tokens

    def close(self, split: str) -> None:
        """Accept no more: a split ends with the first document that does not fit, however much is read after it."""
        if self.shared:
            self.limit = self.used.total()
        else:
            self.limits_by_split[split] = self.used[split]

    @property
    def exhausted(self) -> bool:
        return self.remaining(TRAIN) <= 0 and self.remaining(HELD_OUT) <= 0
