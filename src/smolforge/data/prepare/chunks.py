"""What a chunk of a part is on disk, PART/00000/.

ids, learned  the token ids of its documents one after the other, and of conversations whether each is learned
rows.npy      how long each document is, or each piece of one, where it goes, and a digest of it
bands.npy     of each document what those share that are nearly the same, where that is asked for
facts.json    how many rows were read, so that the next process goes on behind them; written last
"""

import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from smolforge.data.corpus import SPLITS
from smolforge.data.prepare.tokenize_documents import Encoded
from smolforge.tokenizer import Tokenizer

EDITION = 3
"""Chunks of another are not gone on with."""
ROWS = np.dtype(
    [
        ("length", "<i8"),
        ("text_bytes", "<i8"),
        ("learned_bytes", "<i8"),
        ("split", "u1"),
        ("first", "?"),  # of a document, and its digest
        ("ends", "?"),
        ("digest", "<u8", (2,)),
    ]
)
FACTS, BANDS = "facts.json", "bands.npy"


class Mark(NamedTuple):
    """What a document is known again by."""

    digest: bytes
    bands: np.ndarray | None = None


def facts_of(chunk: Path) -> dict[str, Any]:
    return json.loads((chunk / FACTS).read_text("utf-8"))


def rows_of(chunk: Path) -> np.ndarray:
    return np.load(chunk / "rows.npy")


def bands_in(chunk: Path) -> np.ndarray:
    """(bands, documents), on disk until it is read."""
    return np.load(chunk / BANDS, mmap_mode="r")


class Chunk:
    """The files of one chunk while it is written."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, form: str) -> None:
        self.folder, self.kind = folder, f"<u{token_bytes(tokenizer)}"
        self.ids: BinaryIO = (folder / "ids").open("wb")
        self.learned: BinaryIO | None = (folder / "learned").open("wb") if form != "text" else None
        self.rows: list[tuple[Any, ...]] = []
        self.bands: list[np.ndarray] = []

    def add(self, split: str, each: Encoded, begins: Mark | None) -> None:
        self.ids.write(np.asarray(each.ids, self.kind).tobytes())
        if self.learned is not None:
            self.learned.write(np.asarray(each.learned, "?").tobytes())
        digest = np.frombuffer(begins.digest if begins else bytes(16), "<u8")
        sizes = (len(each.ids), each.text_bytes, each.learned_bytes)
        self.rows.append((*sizes, SPLITS.index(split), begins is not None, each.ends, tuple(digest)))
        if begins and begins.bands is not None:
            self.bands.append(begins.bands)

    def __enter__(self) -> "Chunk":
        return self

    def __exit__(self, *_: object) -> None:
        self.ids.close()
        if self.learned is not None:
            self.learned.close()
        np.save(self.folder / "rows.npy", np.array(self.rows, ROWS))
        if self.bands:
            np.save(self.folder / BANDS, np.stack(self.bands, 1))


def token_bytes(tokenizer: Tokenizer) -> int:
    return 2 if len(tokenizer) <= 1 << 16 else 4
