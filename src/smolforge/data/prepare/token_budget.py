"""How many tokens may still come: a number of them, for each split or for both."""

import math
from collections import Counter
from typing import Any

from smolforge.data.corpus import HELD_OUT, TRAIN


class Rooms:
    """An upper limit, and what was taken of it. `together` the splits share it; else each has its part."""

    def __init__(self, limit: int | None = None, held_out: float = 0.0, together: bool = True) -> None:
        self.limits: tuple[Any, ...] = (limit, held_out, together)
        self.limit, self.together = math.inf if limit is None else limit, together
        held = 0 if limit is None else int(limit * held_out)
        self.of = {TRAIN: self.limit - held, HELD_OUT: held if limit is not None else math.inf}
        self.taken: Counter[str] = Counter()

    def copy(self) -> "Rooms":
        """One of which nothing is taken."""
        return Rooms(*self.limits)

    def left(self, split: str) -> float:
        return float(self.limit - self.taken.total() if self.together else self.of[split] - self.taken[split])

    def take(self, split: str, tokens: int) -> None:
        self.taken[split] += tokens

    def close(self, split: str) -> None:
        """Let no more come to it: what is put in ends with the first that does not fit, however much is read on."""
        if self.together:
            self.limit = self.taken.total()
        else:
            self.of[split] = self.taken[split]

    @property
    def full(self) -> bool:
        return self.left(TRAIN) <= 0 and self.left(HELD_OUT) <= 0
