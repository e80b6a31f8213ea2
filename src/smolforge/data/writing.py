"""Token ids to shards in datatrove's format."""

import hashlib
import itertools
from pathlib import Path
from typing import BinaryIO

import numpy as np

from smolforge.data.encoding import Encoded
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
