"""What of a source is held out.

little text:  read once to count; an exact share, of groups or of the end of the last document
much, packed or streamed:  a hash of the group, or of the text itself, so that it is the same wherever it occurs
"""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from smolforge.config import Data
from smolforge.data import sources
from smolforge.data.corpus import HELD_OUT, TRAIN
from smolforge.data.prepare.document_stream import read_part
from smolforge.data.prepare.documents import Document
from smolforge.data.prepare.tokenize_documents import DATA_FORMATS
from smolforge.data.sources import SourcePart
from smolforge.errors import InvalidFileError

MIN_GROUPS = 20
BORDER_CHARACTERS = 1000


@runtime_checkable
class SplitPlan(Protocol):
    """Which part of a source is held out."""

    counted: bool
    """Whether the source was read to make it, so that its shares are exact."""

    def pieces(self, document: Document, start: int) -> Iterator[tuple[str, Document]]:
        """The document with its split, or its two parts. `start` is the number of the source's characters before it."""
        ...

    def cache_key(self) -> Any:
        """What distinguishes it, as JSON."""
        ...


class CountedSplit:
    """Of few documents that are `divisible`, the end of the last; of many, groups."""

    counted = True

    def __init__(self, groups: dict[str, int], held_out: float, divisible: bool = True) -> None:
        total, min_groups = sum(groups.values()), MIN_GROUPS if divisible else 2
        self.by_group = len(groups) >= min_groups and held_out > 0
        self.train_characters = int(total * (1 - held_out)) if divisible else sys.maxsize
        self.held_out_groups: set[str] = set()
        if self.by_group:
            # In the order of a hash, every group that still fits into the share; never none at all.
            remaining = total * held_out
            for group in sorted(groups, key=text_digest):
                if groups[group] <= remaining:
                    self.held_out_groups.add(group)
                    remaining -= groups[group]
            self.held_out_groups = self.held_out_groups or {min(groups, key=lambda group: groups[group])}

    def pieces(self, document: Document, start: int) -> Iterator[tuple[str, Document]]:
        """The document as a whole where its group decides; else what is behind `train_characters` is held out."""
        text = document.text
        if self.by_group:
            yield HELD_OUT if document.group in self.held_out_groups else TRAIN, document
        elif start + len(text) <= self.train_characters:
            ends = document.ends or start + len(text) == self.train_characters
            yield TRAIN, document._replace(ends=ends)
        else:
            cut = max(0, self.train_characters - start)
            search_start = max(0, cut - BORDER_CHARACTERS)
            border = text.rfind("\n" if "\n" in text[search_start:cut] else " ", search_start, cut)
            cut = border + 1 if border >= 0 else cut
            if cut:
                yield TRAIN, document._replace(text=text[:cut], ends=True)
            yield HELD_OUT, document._replace(text=text[cut:], starts=document.starts or cut > 0)

    def cache_key(self) -> Any:
        groups = text_digest("\n".join(sorted(self.held_out_groups))).hex()
        return [self.by_group, str(self.train_characters), groups]


@dataclass(frozen=True)
class HashedSplit:
    """Every group, or document that is in none, by itself: the same one is in the same split of every source."""

    held_out: float
    counted = False

    def pieces(self, document: Document, start: int) -> Iterator[tuple[str, Document]]:
        group_digest = document_digest(document) if document.ungrouped else text_digest(document.group)
        share = int.from_bytes(group_digest[:8], "big") / 2**64
        yield HELD_OUT if share < self.held_out else TRAIN, document

    def cache_key(self) -> Any:
        return ["hash", self.held_out]


@dataclass(frozen=True)
class SourcePlan:
    """A source as it will be read: its parts, the characters before each, and what is held out."""

    source: str
    parts: list[SourcePart]
    characters_before: list[int]
    plan: SplitPlan
    groups: dict[str, int] | None = None
    """Characters of each, where they were counted."""


def plan_sources(data: Data) -> list[SourcePlan]:
    """Plan how all sources are read: a group of group_key is in one split in all of them. Raises as `plan_source`."""
    plans = [plan_source(source, data) for source in data.sources]
    if data.group_key is None or len(plans) == 1:
        return plans
    counted = [source_plan.groups for source_plan in plans if source_plan.groups is not None]
    groups = sum(map(Counter, counted), Counter())
    plan = CountedSplit(groups, data.held_out, False) if len(counted) == len(plans) else HashedSplit(data.held_out)
    return [replace(source_plan, plan=plan) for source_plan in plans]


def plan_source(source: str, data: Data) -> SourcePlan:
    """Plan how a source is read. Raises InvalidFileError where it is broken, or known to be empty."""
    parts = sources.parts(source, data)
    if not sources.is_counted(source, parts):
        return SourcePlan(source, parts, [0] * len(parts), HashedSplit(data.held_out))
    groups: dict[str, int] = defaultdict(int)
    before, total = [], 0
    for part in parts:
        before.append(total)
        for document in read_part(part, data):
            if isinstance(document, Document):
                groups[document.group] += len(document.text)
                total += len(document.text)
    if not total:
        raise InvalidFileError(f"the data source {source!r} is empty{filters_hint(data)}")
    divisible = DATA_FORMATS[data.format].divisible and data.group_key is None
    return SourcePlan(source, parts, before, CountedSplit(groups, data.held_out, divisible), groups)


def filters_hint(data: Data) -> str:
    """Return why a source that has rows may give no documents."""
    chosen = data.filters or data.min_characters or data.max_characters is not None
    return ", or data.filters and the limits of length leave nothing of it" if chosen else ""


def text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def document_digest(document: Document) -> bytes:
    """Return a digest of the content: equal documents have equal digests."""
    if document.ids is not None:
        return hashlib.blake2b(document.ids.astype("<u4").tobytes(), digest_size=16).digest()
    return text_digest(document.text)
