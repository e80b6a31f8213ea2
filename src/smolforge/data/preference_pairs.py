"""Pairs to rows: whole ones side by side, as many as fit, as a pure function of (seed, step).

    ids        p p a a a p p b b q q c q q d d . .   two pairs: a before b, c before d
    positions  0 1 2 3 4 0 1 2 3 0 1 2 0 1 2 3 4 5   each sequence begins anew, so that attention stays inside;
    labels     - a a a - - b b - - c - - d d - - -   what a row is filled up with is seen by nobody
    reference  r . . . . r . . . r . . r . . . . .   log-probability of each sequence by the model to start from

A pair is never parted, so any share of the rows has whole pairs, and whatever rows a step has, its loss is the mean
over their pairs. They are packed and shuffled as conversations are.

Where prompt and longer answer together pass `max_length`, the end of the prompt is kept, `max_prompt_length` tokens;
where that does not suffice, the beginning of the answers: the rule of TRL's trainer when SmolLM2 was made.
"""

from itertools import chain

import numpy as np
import torch

from smolforge.data.batches import IGNORE_INDEX, Batch, shuffled_index
from smolforge.data.corpus import Corpus
from smolforge.data.packing import pack_rows
from smolforge.errors import InvalidFileError


class PairRows:
    """All rows of a split's pairs in the order of a seed.

    `reference` (n,) has the log-probability of each document by the model to start from; without it, all are 0.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        sequence_length: int,
        *,
        lengths: tuple[int, int],
        seed: int,
        reference: np.ndarray | None = None,
    ) -> None:
        """`lengths` are max_length and max_prompt_length. Raises InvalidFileError where the split has no pair."""
        self.split, self.sequence_length, self.seed = split, sequence_length, seed
        self.tokens = corpus.tokens(split)
        self.filler = corpus.metadata["eos_id"]
        documents = corpus.ends(split)
        if not len(documents):
            raise InvalidFileError(f"{corpus.folder} has no pairs in {split}")
        starts = np.concatenate([[0], documents[:-1]]).astype(np.int64)
        self.answers, self.ends = answer_spans(corpus, split)
        max_length, max_prompt_length = lengths
        prompt_lengths, answer_lengths = truncate_pairs(
            self.answers - starts, self.ends - self.answers, max_length, max_prompt_length=max_prompt_length
        )
        self.num_truncated = int((prompt_lengths + answer_lengths < self.ends - starts).reshape(-1, 2).any(1).sum())
        self.starts, self.ends = self.answers - prompt_lengths, self.answers + answer_lengths
        self.reference = np.zeros(len(starts), np.float32) if reference is None else reference
        pair_lengths = (self.ends - self.starts).reshape(-1, 2).sum(1)
        self.pairs = len(pair_lengths)
        self.members = pack_rows(np.arange(self.pairs), pair_lengths, sequence_length, seed=seed)
        self.count = len(self.members)
        self.padding = 1 - int(pair_lengths.sum()) / (self.count * sequence_length)

    def batch(self, step: int, rows: int, share: range | None = None) -> Batch:
        """The rows of a step, counted from 0, or a share of them: `range(2)` are the first two."""
        positions = [divmod(step * rows + row, self.count) for row in (range(rows) if share is None else share)]
        return self.batch_of([shuffled_index(index, self.count, self.seed, epoch=epoch) for epoch, index in positions])

    def batch_of(self, rows: list[int]) -> Batch:
        """Rows by their numbers, as they were packed."""
        return Batch(*(torch.from_numpy(np.stack(side)) for side in zip(*map(self.row, rows), strict=True)))

    def sequences(self, row: int) -> list[int]:
        """The documents of a row, in their order."""
        return list(chain.from_iterable((2 * pair, 2 * pair + 1) for pair in self.members[row].tolist()))

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """ids, labels, positions and reference."""
        ids = np.full(self.sequence_length, self.filler, np.int64)
        labels = np.full(self.sequence_length, IGNORE_INDEX, np.int64)
        positions = np.arange(self.sequence_length)
        reference = np.zeros(self.sequence_length, self.reference.dtype)
        offset = 0
        for document in self.sequences(number):
            start, answer, end = (int(side[document]) for side in (self.starts, self.answers, self.ends))
            token_ids = self.tokens[start:end]
            ids[offset : offset + len(token_ids)] = token_ids
            labels[offset + answer - start - 1 : offset + len(token_ids) - 1] = token_ids[answer - start :]
            positions[offset:] -= positions[offset]
            reference[offset] = self.reference[document]
            offset += len(token_ids)
        return ids, labels, positions, reference


def answer_spans(corpus: Corpus, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the start and end of each document's answer: the one run of learned tokens in it, after its prompt."""
    learned = np.concatenate([np.zeros(1, np.uint8), *corpus.learned(split).shards, np.zeros(1, np.uint8)])
    borders = np.flatnonzero(learned[1:] != learned[:-1])
    assert len(borders) == 2 * corpus.size(split)["documents"], "a pair's document has one answer"
    return borders[0::2], borders[1::2]


def truncate_pairs(
    prompts: np.ndarray, answers: np.ndarray, max_length: int, *, max_prompt_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens are kept of each prompt, its last ones, and of each answer, its first ones.

    Documents 2n and 2n + 1 are a pair, whose longer answer decides what is too long.
    """
    longer = np.repeat(answers.reshape(-1, 2).max(1), 2)
    prompts = np.where(prompts + longer > max_length, np.minimum(prompts, max_prompt_length), prompts)
    max_answer_length = np.where(prompts + longer > max_length, max_length - max_prompt_length, answers)
    return prompts, np.minimum(answers, max_answer_length)
