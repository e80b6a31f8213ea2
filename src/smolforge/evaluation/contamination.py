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
        by_length: dict[int, list[tuple[int, int, int]]] = {}
        for number, words in enumerate(texts):
            length = min(size, len(words))
            for position, ngram_hash in enumerate(ngram_hashes(words, length)[-1] if words else ()):
                by_length.setdefault(length, []).append((int(ngram_hash), number, position))
        self.entries: dict[int, tuple[UInt64[np.ndarray, " n"], list[tuple[int, int]]]] = {}
        for length, entries in by_length.items():
            entries.sort()
            owners = [(number, position) for _, number, position in entries]
            self.entries[length] = np.array([ngram_hash for ngram_hash, _, _ in entries], np.uint64), owners

    def mark(self, words: Sequence[str]) -> None:
        """Mark each n-gram that occurs in these words."""
        if not self.entries or not words:
            return
        for length, hashes in enumerate(ngram_hashes(words, max(self.entries)), 1):
            if length in self.entries:
                self._mark_length(words, length, hashes)

    def _mark_length(self, words: Sequence[str], length: int, hashes: UInt64[np.ndarray, " m"]) -> None:
        known_hashes, owners = self.entries[length]
        first = np.searchsorted(known_hashes, hashes)
        for position in np.flatnonzero(known_hashes[np.minimum(first, len(known_hashes) - 1)] == hashes).tolist():
            entry = int(first[position])
            while entry < len(owners) and known_hashes[entry] == hashes[position]:
                number, start = owners[entry]
                if start not in self.matched[number] and same_ngram(
                    words, position, self.texts[number], start=start, length=length
                ):
                    self.matched[number].add(start)
                entry += 1

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


def same_ngram(words: Sequence[str], position: int, ngram_words: Sequence[str], *, start: int, length: int) -> bool:
    return list(words[position : position + length]) == list(ngram_words[start : start + length])
