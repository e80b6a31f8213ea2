"""One part of a source to chunks on disk, each whole or not there: what a process does alone, and goes on with.

    rows  ->  documents  ->  (repeated within the part: left out)  ->  ids  ->  PART/00000/{ids, learned, rows.npy, ...}

A chunk's facts say how many rows were read, so that the next process goes on behind them. Nothing of it depends on
who does it, nor on which parts are done already.
"""

import fcntl
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.config import Data
from smolforge.data.corpus import SPLITS
from smolforge.data.prepare.chunks import EDITION, FACTS, Chunk, Mark, facts_of, rows_of
from smolforge.data.prepare.dedup import Compare, comparison, tokens_of
from smolforge.data.prepare.document_stream import read
from smolforge.data.prepare.documents import Document
from smolforge.data.prepare.split import Plan, digest, digest_of
from smolforge.data.prepare.token_budget import Rooms
from smolforge.data.prepare.tokenize_documents import FORMS, Encoded
from smolforge.data.sources import Part
from smolforge.errors import SettingError
from smolforge.tokenizer import Tokenizer

OF_READING = ("intra_document_masking", "num_workers", "mixture", "stages", "cache", "warn_epochs")
"""Settings of how a corpus is read, whatever they are it is the same."""
CHUNK_CHARACTERS = 64 << 20
BATCH_CHARACTERS = 2 << 20
"""Enough to keep all cores busy, little to hold."""
AHEAD = 2
"""Batches that are encoded while the next is read and the one before is written."""
Tell = Callable[[dict[str, int]], None]
Piece = tuple[str, Document, Mark | None]
"""Its split, and where a document begins its mark."""


@dataclass(frozen=True)
class Task:
    """What there is to do, as a value that can be sent to another process."""

    part: Part
    data: Data
    plan: Plan
    before: int
    rooms: Rooms
    tokenizer: str
    """Its identity."""
    work: Path
    """Folder of all tasks, with the tokenizer in it."""
    alone: bool = True
    """Whether no other process works beside it, so that encoding a batch may use all cores."""

    @cached_property
    def folder(self) -> Path:
        """Named for all that decides what comes of it: a changed file is another task."""
        data = self.data.model_dump(mode="json", exclude={"sources", *OF_READING})
        asked = [EDITION, self.part, data, self.plan.described(), self.before, self.rooms.limits, self.tokenizer]
        return self.work / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]


def identity(tokenizer: Tokenizer) -> str:
    """A digest of all that decides the ids of a document: the words, what ends a text, how turns are written."""
    template = tokenizer.template.source.splitlines() if tokenizer.template else None
    return hashlib.sha256(json.dumps([tokenizer.fingerprint, tokenizer.eos_token, template]).encode()).hexdigest()


def chunks(task: Task) -> list[Path]:
    """Those that are done, in order."""
    return sorted(path for path in task.folder.glob("[0-9]*") if (path / FACTS).is_file())


def is_done(task: Task) -> bool:
    return bool(done := chunks(task)) and facts_of(done[-1])["whole"]


def run(task: Task, tell: Tell = lambda _: None) -> None:
    """Do what is still to be done of a task; `tell` hears documents, tokens and bytes of each batch."""
    if is_done(task):
        return
    tokenizer = Tokenizer.load(task.work / "tokenizer")
    if identity(tokenizer) != task.tokenizer:
        raise SettingError(f"{task.work} is that of another tokenizer by now; run the same command again")
    with locked(task.folder):
        reading = Reading.resumed(task, comparison(task.data, tokenizer))
        number = len(chunks(task))
        while not reading.whole:
            atomic.write_whole(task.folder / f"{number:05d}", partial(write_chunk, task, reading, tokenizer, tell))
            number += 1


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder, a job of a cluster or somebody's second try."""
    try:
        atomic.make_folder(folder)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise atomic.unwritten(folder, error, 0) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingError(f"another process prepares the same corpus ({folder}); let it finish") from None
        yield


@dataclass
class Reading:
    """Where a task stands in its part."""

    documents: Iterator[Document | str]
    read: int = 0
    """Rows, of which the last chunk's are the latest."""
    characters: int = 0
    open: bool = False
    """Whether the latest document goes on."""
    whole: bool = False
    seen: set[bytes] = field(default_factory=set)
    rooms: Rooms = field(default_factory=Rooms)
    compare: Compare | None = None
    settled: set[str] = field(default_factory=set)
    """Splits that are full without any near duplicates."""

    @classmethod
    def resumed(cls, task: Task, compare: Compare | None) -> "Reading":
        """Behind what earlier chunks hold."""
        seen: set[bytes] = set()
        facts: dict[str, Any] = {"read": 0, "characters": task.before, "open": False}
        for chunk in chunks(task):
            rows, facts = rows_of(chunk), facts_of(chunk)
            seen |= {row.tobytes() for row in rows["digest"][rows["first"]]}
        documents = read(task.part, task.data, facts["read"])
        reading = cls(documents, facts["read"], facts["characters"], facts["open"], False, seen, compare=compare)
        reading.settle(task, chunks(task))
        return reading

    def settle(self, task: Task, done: Sequence[Path]) -> None:
        """Count what is taken: near duplicates, which are found chunk by chunk, make room for others."""
        self.rooms = tokens_of(done, task.rooms)
        self.settled = {split for split in SPLITS if self.rooms.left(split) <= 0}

    @property
    def in_doubt(self) -> bool:
        """Whether a split looks full, and near duplicates in it are not yet counted."""
        looks_full = {split for split in SPLITS if self.rooms.left(split) <= 0}
        return self.compare is not None and looks_full != self.settled

    def facts(self) -> dict[str, Any]:
        """What the next process goes on from."""
        return {"read": self.read, "characters": self.characters, "open": self.open, "whole": self.whole}

    def pieces(self, task: Task, dropped: Counter[str]) -> Iterator[list[Piece]]:
        """Each document that is new here, in the pieces there is room for. It ends where the part does, or the room."""
        while not (self.in_doubt or self.rooms.full):
            if (found := next(self.documents, None)) is None:
                self.whole = True
                return
            self.read += 1
            if isinstance(found, str):
                dropped[found] += 1
                continue
            start, self.characters = self.characters, self.characters + len(found.text)
            continues, self.open = self.open, not found.ends
            begins = None if continues else digest_of(found) if found.ends else digest(f"{found.place}\n{found.text}")
            if begins in self.seen:
                dropped["repeated"] += 1
            elif found.text.strip() or found.ids is not None or continues or self.open:
                self.seen |= {begins} if begins else set()
                mark = Mark(begins, self.compare(found) if self.compare else None) if begins else None
                split = [each for each in task.plan.pieces(found, start) if self.rooms.left(each[0]) > 0]
                yield [(*each, None if number else mark) for number, each in enumerate(split)]
        self.whole = not self.in_doubt


def write_chunk(task: Task, reading: Reading, tokenizer: Tokenizer, tell: Tell, folder: Path) -> None:
    """Read on until there is enough for a chunk, and write it."""
    dropped: Counter[str] = Counter()
    lost: Counter[int] = Counter()
    begun = reading.read
    encode = partial(with_ids, task.data.format, tokenizer)
    found = batches(reading.pieces(task, dropped), BATCH_CHARACTERS if task.alone else 0, CHUNK_CHARACTERS)
    with Chunk(folder, tokenizer, task.data.format) as chunk:
        for batch, whole in ahead(encode, found) if task.alone else map(encode, found):
            tell(add_encoded(chunk, batch, whole, reading, dropped, lost))
    if reading.in_doubt:
        reading.settle(task, [*chunks(task), folder])
        reading.whole = reading.whole or reading.rooms.full
    facts = {
        **reading.facts(),
        "rows": reading.read - begun,
        "dropped": dropped,
        "lost": {str(byte): count for byte, count in sorted(lost.items())},
    }
    (folder / FACTS).write_text(json.dumps(facts), "utf-8")


def with_ids(form: str, tokenizer: Tokenizer, batch: list[Piece]) -> tuple[list[Piece], list[list[Encoded]]]:
    """A batch, and what each of its documents becomes."""
    return batch, FORMS[form].encode(tokenizer, [document for _, document, _ in batch])


def ahead(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """What threads make of items, in their order. (The tokenizers library lets go of the interpreter.)"""
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def add_encoded(
    chunk: Chunk,
    batch: Sequence[Piece],
    encoded: Sequence[list[Encoded]],
    reading: Reading,
    dropped: Counter[str],
    lost: Counter[int],
) -> dict[str, int]:
    """Write a batch into the chunk; returns its documents, tokens and bytes."""
    sizes = Counter(documents=0, tokens=0, bytes=0)
    for (split, _, begins), whole in zip(batch, encoded, strict=True):
        dropped["unanswered"] += not whole
        sizes["documents"] += bool(whole and begins)  # a pair is one, though it stands in the shards as two
        for number, each in enumerate(whole):
            lost.update(each.lost)
            reading.rooms.take(split, len(each.ids))
            chunk.add(split, each, None if number else begins)
            sizes["tokens"] += len(each.ids)
            sizes["bytes"] += each.text_bytes
    return dict(sizes)


def batches(documents: Iterator[list[Piece]], characters: int, most: int) -> Iterator[list[Piece]]:
    """Runs of documents of about so many characters each, and at most about so many in all."""
    batch: list[Piece] = []
    size = total = 0
    for pieces in documents:
        batch += pieces
        size += sum(length(document) for _, document, _ in pieces)
        if size >= characters:
            yield batch
            batch, size, total = [], 0, total + size
            if total >= most:
                return
    if batch:
        yield batch


def length(document: Document) -> int:
    """In characters, or about as many for ids."""
    return len(document.text) if document.ids is None else 4 * len(document.ids)
