"""Several corpora to rows in given proportions, as a pure function of (seed, position).

    position   0   1   2   3   4   5   6   7  | 8   9  ..      stage 1: web 3, code 1    stage 2: web 1, code 1
    source     web web cod web web web cod web| web cod        after n windows each has n * share, to less than one
    its own    0   1   0   2   3   4   1   5  | 6   2          each goes on where it stopped, in an order of its own

Shares are whole numbers, so the order of sources repeats after their sum, and one period of it is all there is to
keep. Within it the next window is that of the source whose share falls due first, among those that are behind theirs:
earliest deadline first, which keeps every source within one window of its share at every point (Tijdeman 1980, "The
chairman assignment problem"; Baruah et al. 1996, "Proportionate progress").
"""

import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smolforge.config import Data
from smolforge.config.data import whole_shares
from smolforge.data.batches import Batch, Windows
from smolforge.data.corpus import TRAIN, Corpus, Tokens
from smolforge.errors import InvalidFile
from smolforge.tokenizer import Tokenizer

FILE = "mixture.json"
FORMAT_VERSION = 1


class Interleaving:
    """An endless order of sources, each in its share."""

    def __init__(self, shares: tuple[int, ...]) -> None:
        self.shares, self.period = shares, sum(shares)
        self.order = due_first(shares)
        self.places = [np.flatnonzero(self.order == number) for number in range(len(shares))]

    def source(self, position: int) -> int:
        """Whose window stands at a position."""
        return int(self.order[position % self.period])

    def count(self, source: int, length: int) -> int:
        """How many of the first `length` windows are of a source."""
        periods, rest = divmod(length, self.period)
        return periods * self.shares[source] + int(np.searchsorted(self.places[source], rest))


interleaving = lru_cache(maxsize=64)(Interleaving)


def due_first(shares: Sequence[int]) -> np.ndarray:
    """One period of sources (sum of shares,), in which source i stands shares[i] times."""
    period, given = sum(shares), [0] * len(shares)
    order = np.empty(period, np.int64)
    for place in range(period):
        behind = (n for n, share in enumerate(shares) if given[n] * period < (place + 1) * share)
        next_one = min(behind, key=lambda n: -(-(given[n] + 1) * period // shares[n]))
        order[place] = next_one
        given[next_one] += 1
    return order


class Order:
    """The sources of all windows of a run: stages strung together, of which the last does not end."""

    def __init__(self, weights: Sequence[Mapping[str, int | float]], ends: Sequence[int]) -> None:
        """`weights` of each stage by source, and the windows after which each but the last ends."""
        self.names = list(weights[0])
        self.stages = [interleaving(tuple(whole_shares(each).values())) for each in weights]
        self.begins = [0, *ends]
        self.before = [[0] * len(self.names)]
        for stage, (begin, end) in zip(self.stages, itertools.pairwise(self.begins), strict=False):
            counts = [stage.count(number, end - begin) for number in range(len(self.names))]
            self.before.append([had + more for had, more in zip(self.before[-1], counts, strict=True)])

    @classmethod
    def of(cls, data: Data, ends: Iterable[int], rows: int) -> "Order":
        """What a text's settings say, where stages end after these steps of so many rows."""
        return cls(data.weights, [end * rows for end in ends])

    def stage(self, position: int) -> int:
        """In which stage, from 0, a position lies."""
        return bisect_right(self.begins, position) - 1

    def at(self, position: int) -> tuple[int, int]:
        """Whose window stands at a position, and how many of that source stand before it."""
        stage = self.stage(position)
        source = self.stages[stage].source(position - self.begins[stage])
        return source, self._count(stage, source, position)

    def counts(self, position: int) -> list[int]:
        """How many windows of each source stand before a position."""
        stage = self.stage(position)
        return [self._count(stage, source, position) for source in range(len(self.names))]

    def _count(self, stage: int, source: int, position: int) -> int:
        return self.before[stage][source] + self.stages[stage].count(source, position - self.begins[stage])

    def of_stages(self, end: int) -> list[dict[str, int]]:
        """Windows of each source in each stage that begins before `end`, up to there."""
        borders = [*(begin for begin in self.begins if begin < end), end]
        return [
            {
                name: self._count(stage, source, upto) - self.before[stage][source]
                for source, name in enumerate(self.names)
            }
            for stage, upto in enumerate(borders[1:])
        ]


class Mixture:
    """Prepared corpora by name, and how they are mixed: where a run's text is several."""

    format = "text"

    def __init__(self, folder: Path, sources: Mapping[str, Corpus]) -> None:
        self.folder, self.sources = folder, dict(sources)
        facts = {name: corpus.fingerprint for name, corpus in sorted(self.sources.items())}
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @classmethod
    def open(cls, folder: Path) -> "Mixture":
        """What `record` wrote. Raises InvalidFile where a source is gone, or is another than it was."""
        path = folder / FILE
        try:
            said = json.loads(path.read_text("utf-8"))
            version, recorded = said["format_version"], {**said["sources"]}
            places = {
                name: ((folder / each["folder"]).resolve(), each["fingerprint"]) for name, each in recorded.items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidFile(f"{path} is broken: {error!r}; delete it, and the sources are looked up again") from None
        if version != FORMAT_VERSION:
            raise InvalidFile(f"{path} has format {version}; this version reads {FORMAT_VERSION}")
        found = {}
        for name, (place, fingerprint) in places.items():
            if not (place / "corpus.json").is_file():
                raise InvalidFile(
                    f"the prepared source {name} is gone from {place}; bring it back, or delete {path} to have it "
                    "prepared again"
                )
            found[name] = Corpus.open(place)
            if found[name].fingerprint != fingerprint:
                raise InvalidFile(
                    f"the source {name} in {place} is another than this run's; bring that one back, or start anew"
                )
        return cls(folder, found)

    def record(self) -> dict[str, Any]:
        """What `open` needs: where each corpus is, as seen from the run's folder, and which."""
        facts = {
            name: {
                "folder": os.path.relpath(corpus.folder.resolve(), self.folder.resolve()),
                "fingerprint": corpus.fingerprint,
                "tokens": corpus.size(TRAIN)["tokens"],
            }
            for name, corpus in self.sources.items()
        }
        return {"format_version": FORMAT_VERSION, "sources": facts}

    def size(self, split: str) -> dict[str, int]:
        """documents, tokens and bytes of a split of all sources together."""
        sizes = [corpus.size(split) for corpus in self.sources.values()]
        return {key: sum(size[key] for size in sizes) for key in ("documents", "tokens", "bytes")}

    def tokenizer(self) -> Tokenizer:
        """All have the same."""
        return next(iter(self.sources.values())).tokenizer()

    def check(self) -> None:
        """Hold every token of every source to its fingerprint. Raises InvalidFile."""
        for corpus in self.sources.values():
            corpus.check()


Prepared = Corpus | Mixture


def reopened(folder: Path) -> Prepared:
    """What is prepared in a folder, one text or a mixture. Raises InvalidFile for neither."""
    return Mixture.open(folder) if (folder / FILE).is_file() else Corpus.open(folder)


class MixtureRows:
    """The windows of all sources, each source's in its own order, in the order of a mixture."""

    def __init__(self, texts: Mapping[str, Tokens], order: Order, sequence_length: int, seed: int) -> None:
        """`texts` are the training tokens of each source."""
        self.order, self.sequence_length = order, sequence_length
        self.windows = []
        for name in order.names:
            tokens = texts[name]
            if len(tokens) <= sequence_length:
                raise InvalidFile(
                    f"the source {name} has {len(tokens):,} training tokens, which is less than one window of "
                    f"train.sequence_length ({sequence_length:,}) and the token after it; add text, or leave it out"
                )
            self.windows.append(Windows(tokens, sequence_length, seed_of(seed, name)))
        self.count = sum(each.count for each in self.windows)

    def batch(self, step: int, rows: int, share: range | None = None) -> Batch:
        """The rows of a step, counted from 0, or a share of them: `range(2)` are the first two."""
        places = [self.order.at(step * rows + row) for row in (range(rows) if share is None else share)]
        pairs = [self.windows[source].window(number) for source, number in places]
        ids, labels = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
        return Batch(ids, labels)

    def labels(self, position: int) -> dict[str, int]:
        """Tokens learned from each source in all rows before a position."""
        counts = self.order.counts(position)
        return {
            name: windows.labels(count)
            for name, windows, count in zip(self.order.names, self.windows, counts, strict=True)
        }

    def epochs(self, learned: Mapping[str, int]) -> dict[str, float]:
        """How often each source is gone through with so many tokens of it."""
        sizes = zip(self.order.names, self.windows, strict=True)
        return {name: learned[name] / (len(windows.tokens) - 1) for name, windows in sizes}


def seed_of(seed: int, name: str) -> int:
    """Of a source's own order: what else is in the mixture does not change it."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest())
