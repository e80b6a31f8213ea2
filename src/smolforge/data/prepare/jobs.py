"""Write one part of a source as chunks on disk, each atomic, in one process that can be resumed.

    rows  ->  documents  ->  (repeated within the part: left out)  ->  ids  ->  PART/00000/{ids, learned, rows.npy, ...}

A chunk's facts.json says how many rows were read, so that the next process continues after them. The result depends
neither on which process runs a job, nor on which parts are done already.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.config import Data
from smolforge.data.corpus import SPLITS
from smolforge.data.prepare.chunks import (
    CHUNK_VERSION,
    METADATA_FILE,
    ChunkWriter,
    DocumentKey,
    load_metadata,
    load_rows,
)
from smolforge.data.prepare.dedup import BandFunction, band_function, spent_budget
from smolforge.data.prepare.document_stream import read_part
from smolforge.data.prepare.documents import Document
from smolforge.data.prepare.split import SplitPlan, document_digest, text_digest
from smolforge.data.prepare.token_budget import TokenBudget
from smolforge.data.prepare.tokenize_documents import DATA_FORMATS, EncodedDocument
from smolforge.data.sources import SourcePart
from smolforge.errors import ConfigError
from smolforge.tokenizer import Tokenizer

READ_SETTINGS = ("intra_document_masking", "num_workers", "mixture", "stages", "cache", "warn_epochs")
"""Settings of how a corpus is read, whatever they are it is the same."""
CHUNK_CHARACTERS = 64 << 20
BATCH_CHARACTERS = 2 << 20
"""Enough to keep all cores busy, little to hold."""
BATCHES_AHEAD = 2
"""Batches that are encoded while the next is read and the one before is written."""
ProgressCallback = Callable[[dict[str, int]], None]
Piece = tuple[str, Document, DocumentKey | None]
"""Its split, and where a document begins its mark."""


@dataclass(frozen=True)
class PrepareJob:
    """What to prepare of one part of a source, as a value that can be sent to another process."""

    part: SourcePart
    data: Data
    plan: SplitPlan
    characters_before: int
    budget: TokenBudget
    tokenizer: str
    """Its identity."""
    work: Path
    """Folder of all jobs, with the tokenizer in it."""
    exclusive: bool = True
    """Whether no other process works beside it, so that encoding a batch may use all cores."""

    @cached_property
    def folder(self) -> Path:
        """Return the job's folder, named by a hash of all that decides its result: a changed file is another job."""
        data = self.data.model_dump(mode="json", exclude={"sources", *READ_SETTINGS})
        key = [
            CHUNK_VERSION,
            self.part,
            data,
            self.plan.cache_key(),
            self.characters_before,
            self.budget.limits,
            self.tokenizer,
        ]
        return self.work / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a digest of all that decides the ids of a document: vocabulary, BOS and eos tokens, and chat template."""
    template = tokenizer.template.source.splitlines() if tokenizer.template else None
    key = [tokenizer.fingerprint, tokenizer.eos_token, template, *tokenizer.bos_ids]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def finished_chunks(job: PrepareJob) -> list[Path]:
    """Return the folders of the chunks that are finished, in order."""
    return sorted(path for path in job.folder.glob("[0-9]*") if (path / METADATA_FILE).is_file())


def is_done(job: PrepareJob) -> bool:
    return bool(finished := finished_chunks(job)) and load_metadata(finished[-1])["whole"]


def run_job(job: PrepareJob, report: ProgressCallback = lambda _: None) -> None:
    """Run the rest of a job; `report` is called with documents, tokens and bytes of each batch."""
    if is_done(job):
        return
    tokenizer = Tokenizer.load(job.work / "tokenizer")
    if tokenizer_digest(tokenizer) != job.tokenizer:
        raise ConfigError(f"{job.work} is that of another tokenizer by now; run the same command again")
    with lock_folder(job.folder):
        reader = PartReader.resumed(job, band_function(job.data, tokenizer))
        number = len(finished_chunks(job))
        while not reader.finished:
            fill = partial(write_chunk, job=job, reader=reader, tokenizer=tokenizer, report=report)
            atomic.write_dir_atomic(job.folder / f"{number:05d}", fill)
            number += 1


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder, a job of a cluster or somebody's second try."""
    with ExitStack() as stack:
        try:
            atomic.make_dir_durable(folder)
            refusal = f"another process prepares the same corpus ({folder}); let it finish"
            stack.enter_context(atomic.lock_file(folder / ".lock", lambda _: refusal))
        except OSError as error:
            raise atomic.write_error(folder, error, 0) from error
        yield


@dataclass
class PartReader:
    """Position of a job in its part."""

    documents: Iterator[Document | str]
    rows_read: int = 0
    """Rows, of which the last chunk's are the latest."""
    characters: int = 0
    document_open: bool = False
    """Whether the latest document goes on."""
    finished: bool = False
    seen_digests: set[bytes] = field(default_factory=set)
    budget: TokenBudget = field(default_factory=TokenBudget)
    compare: BandFunction | None = None
    full_splits: set[str] = field(default_factory=set)
    """Splits that are full without any near duplicates."""

    @classmethod
    def resumed(cls, job: PrepareJob, compare: BandFunction | None) -> "PartReader":
        """Behind what earlier chunks hold."""
        seen: set[bytes] = set()
        metadata: dict[str, Any] = {"read": 0, "characters": job.characters_before, "open": False}
        for chunk in finished_chunks(job):
            rows, metadata = load_rows(chunk), load_metadata(chunk)
            seen |= {row.tobytes() for row in rows["digest"][rows["first"]]}
        documents = read_part(job.part, job.data, metadata["read"])
        reader = cls(
            documents, metadata["read"], metadata["characters"], metadata["open"], False, seen, compare=compare
        )
        reader.recount_budget(job, finished_chunks(job))
        return reader

    def recount_budget(self, job: PrepareJob, chunk_folders: Sequence[Path]) -> None:
        """Recount the budget: near duplicates, which are found chunk by chunk, do not use it up."""
        self.budget = spent_budget(chunk_folders, job.budget)
        self.full_splits = {split for split in SPLITS if self.budget.remaining(split) <= 0}

    @property
    def needs_recount(self) -> bool:
        """Whether a split looks full, and near duplicates in it are not yet counted."""
        looks_full = {split for split in SPLITS if self.budget.remaining(split) <= 0}
        return self.compare is not None and looks_full != self.full_splits

    def metadata(self) -> dict[str, Any]:
        """What the next process goes on from."""
        return {
            "read": self.rows_read,
            "characters": self.characters,
            "open": self.document_open,
            "whole": self.finished,
        }

    def pieces(self, job: PrepareJob, dropped: Counter[str]) -> Iterator[list[Piece]]:
        """Yield each new document in the pieces that the budget allows, to the end of the part or of the budget."""
        while not (self.needs_recount or self.budget.exhausted):
            if (item := next(self.documents, None)) is None:
                self.finished = True
                return
            self.rows_read += 1
            if isinstance(item, str):
                dropped[item] += 1
                continue
            start, self.characters = self.characters, self.characters + len(item.text)
            continues, self.document_open = self.document_open, not item.ends
            start_digest = (
                None
                if continues
                else document_digest(item)
                if item.ends
                else text_digest(f"{item.location}\n{item.text}")
            )
            if start_digest in self.seen_digests:
                dropped["repeated"] += 1
            elif item.text.strip() or item.ids is not None or continues or self.document_open:
                self.seen_digests |= {start_digest} if start_digest else set()
                key = DocumentKey(start_digest, self.compare(item) if self.compare else None) if start_digest else None
                split = [
                    piece
                    for piece in job.plan.pieces(item._replace(starts=not continues), start)
                    if self.budget.remaining(piece[0]) > 0
                ]
                yield [(*piece, None if number else key) for number, piece in enumerate(split)]
        self.finished = not self.needs_recount


def write_chunk(
    folder: Path, job: PrepareJob, reader: PartReader, *, tokenizer: Tokenizer, report: ProgressCallback
) -> None:
    """Read on until there is enough for a chunk, and write it."""
    dropped: Counter[str] = Counter()
    lost: Counter[int] = Counter()
    first_row = reader.rows_read
    encode = partial(encode_pieces, job.data.format, tokenizer)
    piece_batches = batch_pieces(
        reader.pieces(job, dropped), BATCH_CHARACTERS if job.exclusive else 0, CHUNK_CHARACTERS
    )
    with ChunkWriter(folder, tokenizer, job.data.format) as chunk:
        for batch, encoded in map_ahead(encode, piece_batches) if job.exclusive else map(encode, piece_batches):
            report(add_encoded(chunk, batch, encoded, reader=reader, dropped=dropped, lost=lost))
    if reader.needs_recount:
        reader.recount_budget(job, [*finished_chunks(job), folder])
        reader.finished = reader.finished or reader.budget.exhausted
    metadata = {
        **reader.metadata(),
        "rows": reader.rows_read - first_row,
        "dropped": dropped,
        "lost": {str(byte): count for byte, count in sorted(lost.items())},
    }
    (folder / METADATA_FILE).write_text(json.dumps(metadata), "utf-8", newline="\n")


def encode_pieces(
    format_name: str, tokenizer: Tokenizer, batch: list[Piece]
) -> tuple[list[Piece], list[list[EncodedDocument]]]:
    """Return a batch, and its documents encoded."""
    return batch, DATA_FORMATS[format_name].encode(tokenizer, [document for _, document, _ in batch])


def map_ahead(fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Map items in threads, in order. (The tokenizers library releases the GIL.)"""
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(BATCHES_AHEAD) as pool:
        for item in items:
            pending.append(pool.submit(fn, item))
            if len(pending) > BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def add_encoded(
    chunk: ChunkWriter,
    batch: Sequence[Piece],
    encoded: Sequence[list[EncodedDocument]],
    *,
    reader: PartReader,
    dropped: Counter[str],
    lost: Counter[int],
) -> dict[str, int]:
    """Write a batch into the chunk; returns its documents, tokens and bytes."""
    sizes = Counter(documents=0, tokens=0, bytes=0)
    for (split, _, key), parts in zip(batch, encoded, strict=True):
        dropped["unanswered"] += not parts
        sizes["documents"] += bool(parts and key)  # a pair is one, though it stands in the shards as two
        for number, part in enumerate(parts):
            lost.update(part.lost_bytes)
            reader.budget.take(split, len(part.ids))
            chunk.add(split, part, None if number else key)
            sizes["tokens"] += len(part.ids)
            sizes["bytes"] += part.text_bytes
    return dict(sizes)


def batch_pieces(documents: Iterator[list[Piece]], characters: int, max_characters: int) -> Iterator[list[Piece]]:
    """Yield batches of about `characters` each, and about `max_characters` in total."""
    batch: list[Piece] = []
    size = total = 0
    for pieces in documents:
        batch += pieces
        size += sum(document_length(document) for _, document, _ in pieces)
        if size >= characters:
            yield batch
            batch, size, total = [], 0, total + size
            if total >= max_characters:
                return
    if batch:
        yield batch


def document_length(document: Document) -> int:
    """Return the length in characters; estimated, for ids."""
    return len(document.text) if document.ids is None else 4 * len(document.ids)
