"""Which items stand in a corpus: items in, a corpus' text streamed past their n-grams, items that share one out.

The rule is GPT-3's (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C): texts are lower-cased words
without punctuation, and an item that shares an n-gram of 13 words is suspect. An item of fewer words is one n-gram,
compared whole. What is looked for is the query with its right answer; choices that are wrong do not count.

Hashes of the items' n-grams are all that is held. Where one is met in the text, its words are compared, so nothing is
found that is not there. Words are what stands between white space: texts without it need another rule.
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

SIZE = 13
BORDER = ""
"""Between documents, where a word would be: no n-gram of an item has it."""
BASE = np.uint64(0x9E3779B97F4A7C15)
LONGEST_WORD = 1 << 16
"""Characters after which text without white space is cut anyway."""


class Shared(NamedTuple):
    """An item of which the corpus has `found` of its `total` n-grams, among them `ngram`."""

    id: str
    found: int
    total: int
    ngram: str


class Overlap(NamedTuple):
    """What one task has in common with a corpus. `short` items have fewer than `size` words, and are compared whole."""

    size: int
    items: int
    short: int
    shared: list[Shared]
    """The worst first."""

    @property
    def share(self) -> float:
        return len(self.shared) / self.items


def overlap(tasks: Sequence[Task], texts: Iterable[tuple[str, bool]], size: int = SIZE) -> dict[str, Overlap]:
    """What each task has in common with texts, given as pieces with whether a document ends behind each."""
    items = [item for task in tasks for item in task.items]
    ngrams = NGrams([words_of(example(item)) for item in items], size)
    before: list[str] = []
    for words in words_in_order(texts):
        ngrams.look(before + words)
        before = (before + words)[-(size - 1) :] if size > 1 else []
    found, start = {}, 0
    for task in tasks:
        found[task.name] = ngrams.told(task.items, start)
        start += len(task.items)
    return found


def words_of(text: str) -> list[str]:
    """Lower-cased words without punctuation and symbols."""
    return text.lower().translate(_marks()).split()


@functools.cache
def _marks() -> dict[int, None]:
    """Unicode's punctuation and symbols, to be left out."""
    return {code: None for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "PS"}


def words_in_order(texts: Iterable[tuple[str, bool]]) -> Iterator[list[str]]:
    """The words of each piece, those of a word cut in two with the piece that ends it, and borders of documents."""
    rest = ""
    for text, ends in texts:
        text, rest = rest + text, ""
        if not ends:
            text, rest = cut(text)
        yield words_of(text) + [BORDER] * ends


def cut(text: str) -> tuple[str, str]:
    """What is whole of a text that goes on, and the word that may not be."""
    if not text or text[-1].isspace():
        return text, ""
    last = text.rsplit(None, 1)[-1]
    return (text, "") if len(last) > LONGEST_WORD else (text[: len(text) - len(last)], last)


class NGrams:
    """N-grams of texts, given by their words, and which of them were met."""

    def __init__(self, texts: Sequence[Sequence[str]], size: int) -> None:
        self.texts, self.size = texts, size
        self.met: list[set[int]] = [set() for _ in texts]
        known: dict[int, list[tuple[int, int, int]]] = {}
        for number, words in enumerate(texts):
            length = min(size, len(words))
            for place, code in enumerate(codes(words, length)[-1] if words else ()):
                known.setdefault(length, []).append((int(code), number, place))
        self.known: dict[int, tuple[UInt64[np.ndarray, " n"], list[tuple[int, int]]]] = {}
        for length, entries in known.items():
            entries.sort()
            owners = [(number, place) for _, number, place in entries]
            self.known[length] = np.array([code for code, _, _ in entries], np.uint64), owners

    def look(self, words: Sequence[str]) -> None:
        """Note each n-gram that is among these words."""
        if not self.known or not words:
            return
        for length, found in enumerate(codes(words, max(self.known)), 1):
            if length in self.known:
                self._meet(words, length, found)

    def _meet(self, words: Sequence[str], length: int, found: UInt64[np.ndarray, " m"]) -> None:
        codes_known, owners = self.known[length]
        first = np.searchsorted(codes_known, found)
        for at in np.flatnonzero(codes_known[np.minimum(first, len(codes_known) - 1)] == found).tolist():
            place = int(first[at])
            while place < len(owners) and codes_known[place] == found[at]:
                number, begin = owners[place]
                if begin not in self.met[number] and same(words, at, self.texts[number], begin, length):
                    self.met[number].add(begin)
                place += 1

    def told(self, items: Sequence[Item], start: int) -> Overlap:
        """What was met of the texts from `start`, which are those of these items."""
        shared, short = [], 0
        for number, item in enumerate(items, start):
            words, met = self.texts[number], self.met[number]
            length = min(self.size, len(words))
            short += len(words) < self.size
            if met:
                ngram = " ".join(words[min(met) : min(met) + length])
                shared.append(Shared(item.id, len(met), len(words) - length + 1, ngram))
        shared.sort(key=lambda each: each.found / each.total, reverse=True)
        return Overlap(self.size, len(items), short, shared)


def codes(words: Sequence[str], longest: int) -> list[UInt64[np.ndarray, " _"]]:
    """Hashes of all n-grams of 1, 2, ... `longest` words, by where they begin; of this process only."""
    single = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    found = [single]
    for length in range(2, min(longest, len(words)) + 1):
        found.append(found[-1][:-1] * BASE + single[length - 1 :])
    return found


def same(one: Sequence[str], at: int, other: Sequence[str], begin: int, length: int) -> bool:
    return list(one[at : at + length]) == list(other[begin : begin + length])
