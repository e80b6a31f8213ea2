"""Find the items that occur in a corpus: items in, the corpus' text streamed past their n-grams, overlaps out.

The rule is GPT-3's (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C): texts are lower-cased words
without punctuation, and an item that shares an n-gram of 13 words is suspect. An item of fewer words is one n-gram,
compared as a whole. The text of an item is its query with the right answer; wrong choices do not count.

Memory holds only hashes of the items' n-grams. If a hash occurs in the text, the words are compared, so there are no
false matches. White space separates words: texts without it need another rule.
"""

import functools
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from smolforge.evaluation.multiple_choice import Item
from smolforge.evaluation.tasks import Task, example

NGRAM_SIZE = 13
DOCUMENT_BORDER = ""
"""A word between documents, which no n-gram of an item has."""
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
MAX_WORD_LENGTH = 1 << 16
"""Characters after which text without white space is cut anyway."""


class OverlappingItem(NamedTuple):
    """An item of which the corpus has `matched` of its `total` n-grams, among them `ngram`."""

    id: str
    matched: int
    total: int
    ngram: str


class Overlap(NamedTuple):
    """The overlap of one task with a corpus.

    `short` items have fewer than `size` words, and are compared as a whole.
    """

    size: int
    items: int
    short: int
    shared: list[OverlappingItem]
    """The worst first."""

    @property
    def share(self) -> float:
        return len(self.shared) / self.items


def find_overlaps(
    tasks: Sequence[Task], texts: Iterable[tuple[str, bool]], size: int = NGRAM_SIZE
) -> dict[str, Overlap]:
    """Return by task what it shares with `texts`: pieces, each with whether a document ends after it."""
    items = [item for task in tasks for item in task.items]
    ngrams = NGrams([words_of(example(item)) for item in items], size)
    preceding: list[str] = []
    for words in stream_words(texts):
        ngrams.mark(preceding + words)
        preceding = (preceding + words)[-(size - 1) :] if size > 1 else []
    overlaps, start = {}, 0
    for task in tasks:
        overlaps[task.name] = ngrams.overlap_of(task.items, start)
        start += len(task.items)
    return overlaps


def words_of(text: str) -> list[str]:
    """Return the lower-cased words of a text without punctuation and symbols."""
    return text.lower().translate(_punctuation()).split()


@functools.cache
def _punctuation() -> dict[int, None]:
    """Return the translation table that drops Unicode's punctuation and symbols."""
    return {code: None for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "PS"}


def stream_words(texts: Iterable[tuple[str, bool]]) -> Iterator[list[str]]:
    """Yield the words of each piece, a word cut in two with the piece that ends it, and borders of documents."""
    partial_word = ""
    for text, ends in texts:
        text, partial_word = partial_word + text, ""
        if not ends:
            text, partial_word = split_last_word(text)
        yield words_of(text) + [DOCUMENT_BORDER] * ends


def split_last_word(text: str) -> tuple[str, str]:
    """Return the text up to its last word, and that word, which the next piece may continue."""
    if not text or text[-1].isspace():
        return text, ""
    last = text.rsplit(None, 1)[-1]
    return (text, "") if len(last) > MAX_WORD_LENGTH else (text[: len(text) - len(last)], last)


class NGrams:
    """N-grams of texts, given as words, and which of them occurred in a corpus."""

    def __init__(self, texts: Sequence[Sequence[str]], size: int) -> None:
        self.texts, self.size = texts, size
        self.matched: list[set[int]] = [set() for _ in texts]
        self.owners: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        """By length and hash: the text and the position of each n-gram that has them."""
        for number, words in enumerate(texts):
            length = min(size, len(words))
            for position, ngram_hash in enumerate(ngram_hashes(words, length)[-1].tolist() if words else ()):
                self.owners[length][ngram_hash].append((number, position))
        self.known = {length: np.array(sorted(owners), np.uint64) for length, owners in self.owners.items()}

    def mark(self, words: Sequence[str]) -> None:
        """Mark each n-gram that occurs in these words."""
        lengths_and_hashes = enumerate(ngram_hashes(words, max(self.known)), 1) if self.known and words else ()
        for length, hashes in lengths_and_hashes:
            if length in self.known:
                known = self.known[length]
                nearest = known[np.searchsorted(known, hashes).clip(max=len(known) - 1)]
                for position in np.flatnonzero(nearest == hashes).tolist():
                    self._mark_ngram(words[position : position + length], int(hashes[position]))

    def _mark_ngram(self, words: Sequence[str], ngram_hash: int) -> None:
        for number, start in self.owners[len(words)][ngram_hash]:
            if words == self.texts[number][start : start + len(words)]:
                self.matched[number].add(start)

    def overlap_of(self, items: Sequence[Item], start: int) -> Overlap:
        """Return the overlap of these items, whose texts begin at index `start`."""
        shared, short = [], 0
        for number, item in enumerate(items, start):
            words, met = self.texts[number], self.matched[number]
            length = min(self.size, len(words))
            short += len(words) < self.size
            if met:
                ngram = " ".join(words[min(met) : min(met) + length])
                shared.append(OverlappingItem(item.id, len(met), len(words) - length + 1, ngram))
        shared.sort(key=lambda overlapping: overlapping.matched / overlapping.total, reverse=True)
        return Overlap(self.size, len(items), short, shared)


def ngram_hashes(words: Sequence[str], max_length: int) -> list[UInt64[np.ndarray, " _"]]:
    """Return hashes of all n-grams of 1, 2, ... `max_length` words, by first word; valid in this process only."""
    single = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    hashes = [single]
    for length in range(2, min(max_length, len(words)) + 1):
        hashes.append(hashes[-1][:-1] * HASH_BASE + single[length - 1 :])
    return hashes
