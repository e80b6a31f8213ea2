"""Write the chunks of all jobs as the shards of a corpus, in datatrove's format and in the order of the sources.

chunks  ->  repeated documents and near duplicates dropped  ->  cut at the token limit  ->  {train,held_out}/00000.ds
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
from smolforge.data.prepare.chunks import load_metadata, load_rows, token_bytes
from smolforge.data.prepare.dedup import NEAR, NEW, REPEATED, document_status
from smolforge.data.prepare.token_budget import TokenBudget
from smolforge.data.prepare.tokenize_documents import DATA_FORMATS, EncodedDocument
from smolforge.tokenizer import Tokenizer

log = logging.getLogger("smolforge")
SHARD_TOKENS = 1 << 28
"""Tokens after which a new shard is started."""


def assemble(
    folder: Path,
    chunks: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    format_name: str,
    budget: TokenBudget,
    sources: Sequence[str],
) -> tuple[dict[str, Any], Counter[str]]:
    """Write the shards; `sources` names each chunk's. Return the metadata for corpus.json, and what was dropped."""
    size = token_bytes(tokenizer)
    writers = {split: ShardWriter(folder / split, tokenizer, size) for split in SPLITS}
    dropped: Counter[str] = Counter(repeated=0)
    lost: Counter[int] = Counter()
    train_tokens: Counter[str] = Counter(dict.fromkeys(sources, 0))
    budget = budget.copy()
    for chunk, status, source in zip(chunks, document_status(chunks), sources, strict=True):
        before = writers[TRAIN].size["tokens"]
        rows, metadata = load_rows(chunk), load_metadata(chunk)
        dropped.update(metadata["dropped"])
        dropped["repeated"] += int((rows["first"] & (status == REPEATED)).sum())
        if num_near := int((rows["first"] & (status == NEAR)).sum()):
            dropped["near_duplicates"] += num_near
        lost.update({int(byte): count for byte, count in metadata["lost"].items()})
        content = ChunkContent(chunk, rows, status == NEW, size=size, format_name=format_name)
        if budget.limits[0] is None:
            content.write_all(writers)
        else:
            content.write_within_budget(writers, tokenizer, budget)
        train_tokens[source] += writers[TRAIN].size["tokens"] - before
    for writer in writers.values():
        writer.close()
    if lost:
        byte_list = ", ".join(f"{byte:02x}" for byte in sorted(lost))
        log.warning(
            "%d bytes of the text (%s) have no symbol in this tokenizer and are left out", lost.total(), byte_list
        )
    digests = [writer.digest.hexdigest() for writer in writers.values()]
    if format_name != "text":
        digests += [writer.loss_digest.hexdigest() for writer in writers.values()]
    return {
        "format": format_name,
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "token_bytes": size,
        "eos_id": tokenizer.eos_id,
        **({"bos_id": tokenizer.bos_ids[0]} if tokenizer.bos_ids and format_name == "text" else {}),
        "tokenizer": tokenizer.fingerprint,
        "lost_bytes": {f"{byte:02x}": count for byte, count in sorted(lost.items())},
        "splits": {split: writer.size for split, writer in writers.items()},
        "train_tokens_of_sources": dict(train_tokens),
    }, dropped


class ShardWriter:
    """Writes one split in datatrove's format, a new shard where a document ends after SHARD_TOKENS. Of conversations
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

    def add(self, document: EncodedDocument) -> None:
        """Append a document, and begin another shard where this one is full."""
        learned = None if document.learned is None else np.asarray(document.learned, "?")
        ids, ends = np.asarray(document.ids), np.array([document.ends])
        self.add_all(ids, np.array([len(ids)]), ends, learned=learned)
        self.count(bytes=document.text_bytes)
        if learned is not None:
            self.count(learned_bytes=document.learned_bytes)

    def add_all(self, ids: np.ndarray, lengths: np.ndarray, ends: np.ndarray, *, learned: np.ndarray | None) -> None:
        """Append the ids of documents, or pieces of them, of these lengths; `ends` says which end one."""
        stops = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            if self.file is None:
                self._open(learned is not None)
            start = int(stops[first - 1]) if first else 0
            filling = max(first, int(np.searchsorted(stops, start + SHARD_TOKENS - self.tokens)))
            # the document that fills the shard is in it with all its pieces
            document_ends = np.flatnonzero(ends[filling:])
            end = filling + 1 + int(document_ends[0]) if len(document_ends) else len(lengths)
            stop = int(stops[end - 1])
            new_ends = stops[first:end][ends[first:end]] - start + self.tokens
            self._write(ids[start:stop], learned[start:stop] if learned is not None else None, new_ends)
            first = end
            if self.tokens >= SHARD_TOKENS and ends[end - 1]:
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
            loss_mask = np.ascontiguousarray(learned, "?").tobytes()
            self.loss_file.write(loss_mask)
            self.loss_digest.update(loss_mask)
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
        self.path.with_suffix(".ds.metadata").write_text(
            f"{name}\n{self.tokens}\n{self.tokens:,} T\n", "utf-8", newline="\n"
        )


class ChunkContent:
    """One chunk in memory, and which of its rows are kept."""

    def __init__(self, chunk: Path, rows: np.ndarray, keep: np.ndarray, *, size: int, format_name: str) -> None:
        self.rows, self.keep, self.format_name = rows, keep, format_name
        self.ids = np.fromfile(chunk / "ids", f"<u{size}")
        self.learned = np.fromfile(chunk / "learned", "?") if format_name != "text" else None

    def write_all(self, writers: dict[str, ShardWriter]) -> None:
        for number, split in enumerate(SPLITS):
            of_split = self.keep & (self.rows["split"] == number)
            if not of_split.any():
                continue
            tokens, rows = np.repeat(of_split, self.rows["length"]), self.rows[of_split]
            learned = self.learned[tokens] if self.learned is not None else None
            writers[split].add_all(self.ids[tokens], rows["length"], rows["ends"], learned=learned)
            writers[split].count(bytes=int(rows["text_bytes"].sum()))
            if learned is not None:
                writers[split].count(learned_bytes=int(rows["learned_bytes"].sum()))

    def write_within_budget(self, writers: dict[str, ShardWriter], tokenizer: Tokenizer, budget: TokenBudget) -> None:
        """Write document by document, up to the first that does not fit into the budget."""
        fitting = DATA_FORMATS[self.format_name].truncate
        for split, document in self.documents():
            parts = fitting(tokenizer, document, budget.remaining(split))
            if not parts:
                budget.close(split)
            for part in parts:
                budget.take(split, len(part.ids))
                writers[split].add(part)

    def documents(self) -> Iterable[tuple[str, list[EncodedDocument]]]:
        """Yield the documents with their split; the two conversations of a pair are one."""
        stops = np.cumsum(self.rows["length"])
        parts: list[EncodedDocument] = []
        previous_split = None
        for number in np.flatnonzero(self.keep):
            row = self.rows[number]
            span = slice(int(stops[number] - row["length"]), int(stops[number]))
            learned = self.learned[span].tolist() if self.learned is not None else None
            sizes = int(row["text_bytes"]), b"", learned, int(row["learned_bytes"])
            part = EncodedDocument(self.ids[span].tolist(), *sizes, bool(row["ends"]))
            split = SPLITS[row["split"]]
            if parts and (row["first"] or split != previous_split or self.format_name == "text"):
                yield previous_split or HELD_OUT, parts
                parts = []
            parts, previous_split = [*parts, part], split
        if parts:
            yield previous_split or HELD_OUT, parts
