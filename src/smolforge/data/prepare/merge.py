"""The chunks of all tasks to the shards of a corpus, in the order of the sources.

chunks  ->  (the same or near one before it: left out)  ->  as much as there is room for  ->  {train,held_out}/00000.ds

Token ids to shards in datatrove's format.
"""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smolforge.data.corpus import HELD_OUT, SPLITS, TRAIN
from smolforge.data.prepare.chunks import facts_of, rows_of, token_bytes
from smolforge.data.prepare.dedup import NEAR, NEW, REPEATED, standings
from smolforge.data.prepare.token_budget import Rooms
from smolforge.data.prepare.tokenize_documents import FORMS, Encoded
from smolforge.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 28


class ShardWriter:
    """Writes one split in datatrove's format, a new shard where a document ends behind SHARD_TOKENS. Of conversations
    `.ds.loss` has a byte a token, which says whether it is learned.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, token_bytes: int) -> None:
        self.folder, self.tokenizer, self.token_bytes = folder, tokenizer, token_bytes
        self.size = {"documents": 0, "tokens": 0, "bytes": 0}
        self.digest, self.loss_digest = hashlib.sha256(), hashlib.sha256()
        self.numbers = itertools.count()
        self.file: BinaryIO | None = None
        self.loss_file: BinaryIO | None = None
        self.path = folder
        self.tokens = 0
        self.ends: list[np.ndarray] = []
        folder.mkdir(parents=True)

    def add(self, document: Encoded) -> None:
        """Append a document, and begin another shard where this one is full."""
        learned = None if document.learned is None else np.asarray(document.learned, "?")
        ids, ends = np.asarray(document.ids), np.array([document.ends])
        self.add_all(ids, np.array([len(ids)]), ends, learned)
        self.count(bytes=document.text_bytes)
        if learned is not None:
            self.count(learned_bytes=document.learned_bytes)

    def add_all(self, ids: np.ndarray, lengths: np.ndarray, ends: np.ndarray, learned: np.ndarray | None) -> None:
        """Append the ids of documents, or pieces of them, of these lengths; `ends` says which end one."""
        stops = np.cumsum(lengths)
        begun = 0
        while begun < len(lengths):
            if self.file is None:
                self._open(learned is not None)
            start = int(stops[begun - 1]) if begun else 0
            full = max(begun, int(np.searchsorted(stops, start + SHARD_TOKENS - self.tokens)))
            whole = np.flatnonzero(ends[full:])  # the document that fills the shard is in it with all its pieces
            until = full + 1 + int(whole[0]) if len(whole) else len(lengths)
            stop = int(stops[until - 1])
            ended = stops[begun:until][ends[begun:until]] - start + self.tokens
            self._write(ids[start:stop], learned[start:stop] if learned is not None else None, ended)
            begun = until
            if self.tokens >= SHARD_TOKENS and ends[until - 1]:
                self.close()

    def count(self, **counts: int) -> None:
        for key, count in counts.items():
            self.size[key] = self.size.get(key, 0) + count

    def _open(self, with_loss: bool) -> None:
        self.path = self.folder / f"{next(self.numbers):05d}.ds"
        self.file, self.ends, self.tokens = self.path.open("wb"), [], 0
        if with_loss:
            self.loss_file = self.path.with_suffix(".ds.loss").open("wb")

    def _write(self, ids: np.ndarray, learned: np.ndarray | None, ends: np.ndarray) -> None:
        assert self.file is not None
        content = np.ascontiguousarray(ids, f"<u{self.token_bytes}").data
        self.file.write(content)
        self.digest.update(content)
        self.tokens += len(ids)
        self.ends.append(ends)
        self.count(documents=len(ends), tokens=len(ids))
        if learned is not None:
            assert self.loss_file is not None
            said = np.ascontiguousarray(learned, "?").tobytes()
            self.loss_file.write(said)
            self.loss_digest.update(said)
            self.count(learned_tokens=int(learned.sum()))

    def close(self) -> None:
        if self.file is None:
            return
        self.file.close()
        self.file = None
        if self.loss_file is not None:
            self.loss_file.close()
            self.loss_file = None
        self.path.with_suffix(".ds.index").write_bytes(np.concatenate(self.ends).astype("<u8").tobytes())
        name = f"{self.tokenizer.fingerprint}|{self.token_bytes}"
        self.path.with_suffix(".ds.metadata").write_text(f"{name}\n{self.tokens}\n{self.tokens:,} T\n", "utf-8")


log = logging.getLogger("smolforge")


def assemble(
    folder: Path, chunks: Sequence[Path], tokenizer: Tokenizer, form: str, rooms: Rooms, sources: Sequence[str]
) -> tuple[dict[str, Any], Counter[str]]:
    """Write the shards; `sources` names each chunk's. Returns what corpus.json says of them, and what was left out."""
    size = token_bytes(tokenizer)
    writers = {split: ShardWriter(folder / split, tokenizer, size) for split in SPLITS}
    dropped: Counter[str] = Counter(repeated=0)
    lost: Counter[int] = Counter()
    of_sources: Counter[str] = Counter(dict.fromkeys(sources, 0))
    rooms = rooms.copy()
    for chunk, standing, source in zip(chunks, standings(chunks), sources, strict=True):
        before = writers[TRAIN].size["tokens"]
        rows, facts = rows_of(chunk), facts_of(chunk)
        dropped.update(facts["dropped"])
        dropped["repeated"] += int((rows["first"] & (standing == REPEATED)).sum())
        if near := int((rows["first"] & (standing == NEAR)).sum()):
            dropped["near_duplicates"] += near
        lost.update({int(byte): count for byte, count in facts["lost"].items()})
        read = Read(chunk, rows, standing == NEW, size, form)
        if rooms.limits[0] is None:
            read.all_into(writers)
        else:
            read.some_into(writers, tokenizer, rooms)
        of_sources[source] += writers[TRAIN].size["tokens"] - before
    for writer in writers.values():
        writer.close()
    if lost:
        named = ", ".join(f"{byte:02x}" for byte in sorted(lost))
        log.warning("%d bytes of the text (%s) have no symbol in this tokenizer and are left out", lost.total(), named)
    digests = [writer.digest.hexdigest() for writer in writers.values()]
    if form != "text":
        digests += [writer.loss_digest.hexdigest() for writer in writers.values()]
    return {
        "format": form,
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "token_bytes": size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "lost_bytes": {f"{byte:02x}": count for byte, count in sorted(lost.items())},
        "splits": {split: writer.size for split, writer in writers.items()},
        "train_tokens_of_sources": dict(of_sources),
    }, dropped


class Read:
    """One chunk, and what of its rows is kept."""

    def __init__(self, chunk: Path, rows: np.ndarray, keep: np.ndarray, size: int, form: str) -> None:
        self.rows, self.keep, self.form = rows, keep, form
        self.ids = np.fromfile(chunk / "ids", f"<u{size}")
        self.learned = np.fromfile(chunk / "learned", "?") if form != "text" else None

    def all_into(self, writers: dict[str, ShardWriter]) -> None:
        for number, split in enumerate(SPLITS):
            of_split = self.keep & (self.rows["split"] == number)
            if not of_split.any():
                continue
            tokens, rows = np.repeat(of_split, self.rows["length"]), self.rows[of_split]
            learned = self.learned[tokens] if self.learned is not None else None
            writers[split].add_all(self.ids[tokens], rows["length"], rows["ends"], learned)
            writers[split].count(bytes=int(rows["text_bytes"].sum()))
            if learned is not None:
                writers[split].count(learned_bytes=int(rows["learned_bytes"].sum()))

    def some_into(self, writers: dict[str, ShardWriter], tokenizer: Tokenizer, rooms: Rooms) -> None:
        """Document by document, up to the first that does not fit."""
        fitting = FORMS[self.form].fitting
        for split, whole in self.documents():
            found = fitting(tokenizer, whole, rooms.left(split))
            if not found:
                rooms.close(split)
            for each in found:
                rooms.take(split, len(each.ids))
                writers[split].add(each)

    def documents(self) -> Iterable[tuple[str, list[Encoded]]]:
        """Documents of one split; the two conversations of a pair are one."""
        stops = np.cumsum(self.rows["length"])
        whole: list[Encoded] = []
        before = None
        for number in np.flatnonzero(self.keep):
            row = self.rows[number]
            span = slice(int(stops[number] - row["length"]), int(stops[number]))
            learned = self.learned[span].tolist() if self.learned is not None else None
            sizes = int(row["text_bytes"]), b"", learned, int(row["learned_bytes"])
            each = Encoded(self.ids[span].tolist(), *sizes, bool(row["ends"]))
            split = SPLITS[row["split"]]
            if whole and (row["first"] or split != before or self.form == "text"):
                yield before or HELD_OUT, whole
                whole = []
            whole, before = [*whole, each], split
        if whole:
            yield before or HELD_OUT, whole
