"""Token shards to batches, as a pure function of (seed, step).

The corpus is cut into windows of sequence_length, the windows of an epoch are put into an order, and
the rows of step s are the windows at positions s * rows ... (s + 1) * rows of the epochs strung together.
Nothing is remembered between steps, so resuming is asking for the next one, and it does not matter how
many threads ask. Where several ranks train, each asks for its share of the rows of every step.

    tokens   t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9
    window 1             ids    t4 t5 t6 t7
                         labels t5 t6 t7 t8      the first token of the next window is predicted too
    window 2             ids    t8 t9 ..         the last window is filled up with ignored labels
                         labels t9 -- --
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.data.corpus import Tokens
from smolforge.errors import InvalidFileError

IGNORE_INDEX = -100
"""Label of a position that does not count in the loss, as torch and Transformers spell it."""
_MASK = (1 << 64) - 1


class Batch(NamedTuple):
    """Rows of one optimizer step: token ids, and the id that follows each, or IGNORE_INDEX where it is not learned."""

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"] | None = None
    """0 where something begins that sees nothing of what stands before it; None for plain rows."""
    reference: Float[Tensor, "b t"] | None = None
    """Of pairs, the log-probability that a sequence has by the reference, where it begins; elsewhere 0."""

    @property
    def num_labels(self) -> int:
        """Labels to learn from."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_targets(self) -> int:
        """What its loss is a mean over: labels, or pairs."""
        if self.reference is None or self.positions is None:
            return self.num_labels
        return int(count_pairs(self.positions).sum())

    def split(self, rows: int) -> Iterator["Batch"]:
        """Micro-batches of at most so many rows."""
        for start in range(0, len(self.input_ids), rows):
            yield self.map(lambda side, start=start: side[start : start + rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every side changed."""
        positions, reference = (None if side is None else change(side) for side in self[2:])
        return Batch(change(self.input_ids), change(self.labels), positions, reference)


def count_pairs(positions: Int[Tensor, "b t"]) -> Int[Tensor, " b"]:
    """Count the pairs in each row."""
    return (positions == 0).sum(1) // 2


@runtime_checkable
class RowSource(Protocol):
    """What batches are made of: so many rows an epoch, in an endless order."""

    count: int

    def batch(self, step: int, rows: int, share: range | None = None) -> Batch: ...


class TokenWindows:
    """All windows of a corpus in the order of a seed."""

    def __init__(self, tokens: Tokens, sequence_length: int, seed: int) -> None:
        self.tokens, self.sequence_length, self.seed = tokens, sequence_length, seed
        if len(tokens) <= sequence_length:
            raise InvalidFileError(
                f"the corpus has {len(tokens):,} training tokens, which is less than one window of "
                f"train.sequence_length ({sequence_length:,}) and the token after it; add text, or shorten it"
            )
        self.count = -(-(len(tokens) - 1) // sequence_length)

    def batch(self, step: int, rows: int, share: range | None = None) -> Batch:
        """The rows of a step, counted from 0, or a share of them: `range(2)` are the first two."""
        pairs = [self.window(step * rows + row) for row in (range(rows) if share is None else share)]
        ids, labels = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
        return Batch(ids, labels)

    def window(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and labels of the window at a position of the endless order."""
        epoch, index = divmod(position, self.count)
        start = shuffled_index(index, self.count, self.seed, epoch=epoch) * self.sequence_length
        tokens = self.tokens[start : start + self.sequence_length + 1]
        ids = np.zeros(self.sequence_length, np.int64)
        labels = np.full(self.sequence_length, IGNORE_INDEX, np.int64)
        ids[: len(tokens) - 1], labels[: len(tokens) - 1] = tokens[:-1], tokens[1:]
        return ids, labels

    def labels(self, number: int) -> int:
        """Labels in the first `number` windows of the order; in each epoch one window, the last, has fewer."""
        epochs, remainder = divmod(number, self.count)
        missing = self.count * self.sequence_length - (len(self.tokens) - 1)
        short = (
            missing > 0
            and remainder > 0
            and unshuffled_index(self.count - 1, self.count, self.seed, epoch=epochs) < remainder
        )
        return epochs * (len(self.tokens) - 1) + remainder * self.sequence_length - short * missing


def shuffled_index(index: int, count: int, seed: int, *, epoch: int) -> int:
    """Return where `index` goes in a shuffle of range(count) that is computed and never stored.

    A four-round Feistel network over the next even number of bits, walked until it lands inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half, keys = _feistel_rounds(count, seed, epoch)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for key in keys:
            left, right = right, left ^ (_splitmix64(right + key) & low)
        index = left << half | right
        if index < count:
            return index


def unshuffled_index(window: int, count: int, seed: int, *, epoch: int) -> int:
    """Return the index that `shuffled_index` maps to this window: the same rounds backwards."""
    half, keys = _feistel_rounds(count, seed, epoch)
    low = (1 << half) - 1
    while True:
        left, right = window >> half, window & low
        for key in reversed(keys):
            left, right = right ^ (_splitmix64(left + key) & low), left
        window = left << half | right
        if window < count:
            return window


def _feistel_rounds(count: int, seed: int, epoch: int) -> tuple[int, list[int]]:
    """Return the bits of each half of the Feistel network, and the key of each round."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    return half, [_splitmix64(_splitmix64(_splitmix64(seed) + epoch) + number) for number in range(4)]


def _splitmix64(x: int) -> int:
    """Return splitmix64's finalizer of x: Steele, Lea and Flood 2014."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def iterate_batches(
    source: RowSource, numbers: Iterable[int], rows: int, *, num_workers: int, share: range | None = None
) -> Iterator[Batch]:
    """The batches of these numbers in turn, or a share of each, read ahead by `num_workers` threads."""
    if num_workers == 0:
        yield from (source.batch(number, rows, share) for number in numbers)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batches")
    ahead: deque[Future[Batch]] = deque()
    try:
        for number in numbers:
            ahead.append(pool.submit(source.batch, number, rows, share))
            if len(ahead) > num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
