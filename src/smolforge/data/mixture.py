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
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smolforge.config import Data
from smolforge.config.data import integer_weights
from smolforge.data.batches import Batch, TokenWindows
from smolforge.data.corpus import TRAIN, Corpus, Tokens
from smolforge.errors import InvalidFileError
from smolforge.operating_system import relative_path
from smolforge.tokenizer import Tokenizer

MIXTURE_FILE = "mixture.json"
FORMAT_VERSION = 1


class Interleaving:
    """An endless order of sources, each in its share."""

    def __init__(self, shares: tuple[int, ...]) -> None:
        self.shares, self.period = shares, sum(shares)
        self.order = earliest_deadline_first(shares)
        self.positions = [np.flatnonzero(self.order == number) for number in range(len(shares))]

    def source(self, position: int) -> int:
        """Whose window stands at a position."""
        return int(self.order[position % self.period])

    def count(self, source: int, length: int) -> int:
        """How many of the first `length` windows are of a source."""
        periods, remainder = divmod(length, self.period)
        return periods * self.shares[source] + int(np.searchsorted(self.positions[source], remainder))


cached_interleaving = lru_cache(maxsize=64)(Interleaving)


def earliest_deadline_first(shares: Sequence[int]) -> np.ndarray:
    """One period of sources (sum of shares,), in which source i stands shares[i] times."""
    period, counts = sum(shares), [0] * len(shares)
    order = np.empty(period, np.int64)
    for position in range(period):
        behind = (n for n, share in enumerate(shares) if counts[n] * period < (position + 1) * share)
        chosen = min(behind, key=lambda n: -(-(counts[n] + 1) * period // shares[n]))
        order[position] = chosen
        counts[chosen] += 1
    return order


class MixtureSchedule:
    """The sources of all windows of a run: stages strung together, of which the last does not end."""

    def __init__(self, weights: Sequence[Mapping[str, int | float]], ends: Sequence[int]) -> None:
        """`weights` of each stage by source, and the windows after which each but the last ends."""
        self.names = list(weights[0])
        self.stages = [cached_interleaving(tuple(integer_weights(stage_weights).values())) for stage_weights in weights]
        self.starts = [0, *ends]
        self.before = [[0] * len(self.names)]
        for stage, (start, end) in zip(self.stages, itertools.pairwise(self.starts), strict=False):
            counts = [stage.count(number, end - start) for number in range(len(self.names))]
            self.before.append([before + count for before, count in zip(self.before[-1], counts, strict=True)])

    @classmethod
    def from_data(cls, data: Data, ends: Iterable[int], rows: int) -> "MixtureSchedule":
        """What a text's settings say, where stages end after these steps of so many rows."""
        return cls(data.weights, [end * rows for end in ends])

    def stage(self, position: int) -> int:
        """In which stage, from 0, a position lies."""
        return bisect_right(self.starts, position) - 1

    def source_at(self, position: int) -> tuple[int, int]:
        """Whose window stands at a position, and how many of that source stand before it."""
        stage = self.stage(position)
        source = self.stages[stage].source(position - self.starts[stage])
        return source, self._count(stage, source, position)

    def counts(self, position: int) -> list[int]:
        """How many windows of each source stand before a position."""
        stage = self.stage(position)
        return [self._count(stage, source, position) for source in range(len(self.names))]

    def _count(self, stage: int, source: int, position: int) -> int:
        return self.before[stage][source] + self.stages[stage].count(source, position - self.starts[stage])

    def counts_by_stage(self, end: int) -> list[dict[str, int]]:
        """Windows of each source in each stage that begins before `end`, up to there."""
        borders = [*(start for start in self.starts if start < end), end]
        return [
            {
                name: self._count(stage, source, stop) - self.before[stage][source]
                for source, name in enumerate(self.names)
            }
            for stage, stop in enumerate(borders[1:])
        ]


class Mixture:
    """Prepared corpora by name, and how they are mixed: where a run's text is several."""

    format = "text"

    def __init__(self, folder: Path, sources: Mapping[str, Corpus]) -> None:
        self.folder, self.sources = folder, dict(sources)
        fingerprints = {name: corpus.fingerprint for name, corpus in sorted(self.sources.items())}
        self.fingerprint = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()

    @classmethod
    def open(cls, folder: Path) -> "Mixture":
        """What `record` wrote. Raises InvalidFileError where a source is gone, or is another than it was."""
        path = folder / MIXTURE_FILE
        try:
            content = json.loads(path.read_text("utf-8"))
            version, recorded = content["format_version"], {**content["sources"]}
            expected = {
                name: ((folder / entry["folder"]).resolve(), entry["fingerprint"]) for name, entry in recorded.items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidFileError(
                f"{path} is broken: {error!r}; delete it, and the sources are looked up again"
            ) from None
        if version != FORMAT_VERSION:
            raise InvalidFileError(f"{path} has format {version}; this version reads {FORMAT_VERSION}")
        corpora = {}
        for name, (source_folder, fingerprint) in expected.items():
            if not (source_folder / "corpus.json").is_file():
                raise InvalidFileError(
                    f"the prepared source {name} is gone from {source_folder}; bring it back, or delete {path} to have "
                    "it prepared again"
                )
            corpora[name] = Corpus.open(source_folder)
            if corpora[name].fingerprint != fingerprint:
                raise InvalidFileError(
                    f"the source {name} in {source_folder} is another than this run's; bring that one back, "
                    "or start anew"
                )
        return cls(folder, corpora)

    def record(self) -> dict[str, Any]:
        """What `open` needs: where each corpus is, as seen from the run's folder, and which."""
        sources = {
            name: {
                "folder": relative_path(corpus.folder, self.folder),
                "fingerprint": corpus.fingerprint,
                "tokens": corpus.size(TRAIN)["tokens"],
            }
            for name, corpus in self.sources.items()
        }
        return {"format_version": FORMAT_VERSION, "sources": sources}

    def size(self, split: str) -> dict[str, int]:
        """documents, tokens and bytes of a split of all sources together."""
        sizes = [corpus.size(split) for corpus in self.sources.values()]
        return {key: sum(size[key] for size in sizes) for key in ("documents", "tokens", "bytes")}

    def tokenizer(self) -> Tokenizer:
        """All have the same."""
        return next(iter(self.sources.values())).tokenizer()

    def check(self) -> None:
        """Hold every token of every source to its fingerprint. Raises InvalidFileError."""
        for corpus in self.sources.values():
            corpus.check()


PreparedData = Corpus | Mixture


def open_prepared(folder: Path) -> PreparedData:
    """Open what is prepared in a folder, a corpus or a mixture. Raises InvalidFileError for neither."""
    return Mixture.open(folder) if (folder / MIXTURE_FILE).is_file() else Corpus.open(folder)


class MixtureWindows:
    """The windows of all sources, each source's in its own order, in the order of a mixture."""

    def __init__(
        self, texts: Mapping[str, Tokens], schedule: MixtureSchedule, sequence_length: int, *, seed: int
    ) -> None:
        """`texts` are the training tokens of each source."""
        self.schedule, self.sequence_length = schedule, sequence_length
        self.windows = []
        for name in schedule.names:
            tokens = texts[name]
            if len(tokens) <= sequence_length:
                raise InvalidFileError(
                    f"the source {name} has {len(tokens):,} training tokens, which is less than one window of "
                    f"train.sequence_length ({sequence_length:,}) and the token after it; add text, or leave it out"
                )
            self.windows.append(TokenWindows(tokens, sequence_length, source_seed(seed, name)))
        self.count = sum(windows.count for windows in self.windows)

    def batch(self, step: int, rows: int, share: range | None = None) -> Batch:
        """The rows of a step, counted from 0, or a share of them: `range(2)` are the first two."""
        window_ids = [self.schedule.source_at(step * rows + row) for row in (range(rows) if share is None else share)]
        pairs = [self.windows[source].window(number) for source, number in window_ids]
        ids, labels = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
        return Batch(ids, labels)

    def labels(self, position: int) -> dict[str, int]:
        """Tokens learned from each source in all rows before a position."""
        counts = self.schedule.counts(position)
        return {
            name: windows.labels(count)
            for name, windows, count in zip(self.schedule.names, self.windows, counts, strict=True)
        }

    def epochs(self, learned: Mapping[str, int]) -> dict[str, float]:
        """How often each source is gone through with so many tokens of it."""
        sizes = zip(self.schedule.names, self.windows, strict=True)
        return {name: learned[name] / (len(windows.tokens) - 1) for name, windows in sizes}


def source_seed(seed: int, name: str) -> int:
    """Return the seed of a source's own order: what else is in the mixture does not change it."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest())
