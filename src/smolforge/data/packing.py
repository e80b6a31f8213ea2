"""Conversations to rows: whole ones side by side, as many as fit, as a pure function of (seed, step).

    ids        a a a a a b b b . .      two conversations, and what is left over
    positions  0 1 2 3 4 0 1 2 0 1      each begins anew, so that attention stays inside
    labels     - - a a - - b - - -      what follows, where that is learned

The longest go first, each into the fullest row that still holds it (best-fit decreasing, which is within 11/9 of the
fewest rows there could be; of training text, Ding et al. 2024, https://arxiv.org/abs/2404.10830). Which share a row is
decided once; the rows of each epoch come in an order of their own, as windows do.

One longer than a row ends where the assistant's last turn that fits into the row ends, so it keeps its beginning and as
many whole turns as it can. Where not even the first fits, the row's end cuts it; where that leaves nothing to learn, it
is left out.
"""

import logging

import numpy as np
import torch

from smolforge.data.batches import IGNORE_INDEX, Batch, shuffled_index
from smolforge.data.corpus import Corpus, Tokens
from smolforge.errors import InvalidFileError

log = logging.getLogger("smolforge")


class PackedRows:
    """All rows of a split's conversations in the order of a seed."""

    def __init__(self, corpus: Corpus, split: str, sequence_length: int, *, seed: int) -> None:
        self.tokens, self.learned, ends = corpus.tokens(split), corpus.learned(split), corpus.ends(split)
        self.sequence_length, self.seed, self.filler = sequence_length, seed, corpus.metadata["eos_id"]
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.lengths = np.diff(ends, prepend=0)
        long = np.flatnonzero(self.lengths > sequence_length)
        for number in long:
            self.lengths[number] = truncated_length(self.learned, int(self.starts[number]), sequence_length)
        self.num_dropped = int((self.lengths == 0).sum())
        self.num_truncated = len(long) - self.num_dropped
        nonempty = np.flatnonzero(self.lengths)
        if not len(nonempty):
            raise InvalidFileError(
                f"{corpus.folder / split} has no conversation whose first answer begins within a row of "
                f"train.sequence_length ({sequence_length:,}) tokens; lengthen it"
            )
        self.members = pack_rows(nonempty, self.lengths, sequence_length, seed=seed)
        self.count = len(self.members)

    @property
    def padding(self) -> float:
        """Share of the rows that is filled up."""
        return 1 - int(self.lengths.sum()) / (self.count * self.sequence_length)

    def batch(self, step: int, rows: int, share: range | None = None) -> Batch:
        """The rows of a step, counted from 0, or a share of them: `range(2)` are the first two."""
        packed_rows = [self.row(step * rows + row) for row in (range(rows) if share is None else share)]
        return Batch(*(torch.from_numpy(np.stack(side)) for side in zip(*packed_rows, strict=True)))

    def row(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, labels and positions of the row at a position of the endless order."""
        epoch, index = divmod(position, self.count)
        ids = np.full(self.sequence_length, self.filler, np.int64)
        labels = np.full(self.sequence_length, IGNORE_INDEX, np.int64)
        positions = np.arange(self.sequence_length)
        end = 0
        for number in self.members[shuffled_index(index, self.count, self.seed, epoch=epoch)]:
            start, length = int(self.starts[number]), int(self.lengths[number])
            token_ids, learned = (side[start : start + length] for side in (self.tokens, self.learned))
            ids[end : end + length] = token_ids
            labels[end : end + length - 1] = np.where(learned[1:], token_ids[1:], IGNORE_INDEX)
            positions[end:] -= positions[end]
            end += length
        positions[end:] -= positions[end] if end < self.sequence_length else 0
        return ids, labels, positions


def truncated_length(learned: Tokens, start: int, max_tokens: int) -> int:
    """Count the tokens that are used of a conversation longer than `max_tokens`:
    to the end of the last turn that fits.
    """
    part = learned[start : start + max_tokens + 1]
    ends = np.flatnonzero((part[:-1] == 1) & (part[1:] == 0))
    if len(ends):
        return int(ends[-1]) + 1
    return max_tokens if part[:-1].any() else 0


def pack_rows(numbers: np.ndarray, lengths: np.ndarray, capacity: int, *, seed: int) -> list[np.ndarray]:
    """Return which of these numbers are in each row, where number n takes lengths[n] of its capacity."""
    order = numbers[np.lexsort((tie_break_keys(numbers, seed), -lengths[numbers]))]
    rows = best_fit(lengths[order], capacity)
    by_row = np.argsort(rows, kind="stable")
    return np.split(order[by_row], np.searchsorted(rows[by_row], np.arange(1, rows.max() + 1)))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each of these descending lengths: the fullest row in which it fits, or a new one."""
    open_rows: dict[int, list[int]] = {}
    free_mask = 0  # bit n is set where a row with n free tokens is open
    rows, count = np.empty(len(lengths), np.int64), 0
    for number, length in enumerate(lengths.tolist()):
        fitting = free_mask >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            free_mask ^= 0 if open_rows[free] else 1 << free
        else:
            free, row, count = capacity, count, count + 1
        rows[number] = row
        if free > length:
            open_rows.setdefault(free - length, []).append(row)
            free_mask |= 1 << (free - length)
    return rows


def tie_break_keys(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return a key for each number that puts equal lengths out of file order: splitmix64's finalizer."""
    x = numbers.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
