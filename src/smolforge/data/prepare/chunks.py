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
from smolforge.data.prepare.tokenize_documents import EncodedDocument
from smolforge.tokenizer import Tokenizer

CHUNK_VERSION = 3
"""Chunks of another version are not resumed."""
ROW_DTYPE = np.dtype(
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
METADATA_FILE, BANDS_FILE = "facts.json", "bands.npy"


class DocumentKey(NamedTuple):
    """What a duplicate of a document is recognized by: its digest and, if asked for, its MinHash bands."""

    digest: bytes
    bands: np.ndarray | None = None


def load_metadata(chunk: Path) -> dict[str, Any]:
    return json.loads((chunk / METADATA_FILE).read_text("utf-8"))


def load_rows(chunk: Path) -> np.ndarray:
    return np.load(chunk / "rows.npy")


def load_bands(chunk: Path) -> np.ndarray:
    """Return the bands (bands, documents), memory-mapped."""
    return np.load(chunk / BANDS_FILE, mmap_mode="r")


class ChunkWriter:
    """The files of one chunk while it is written."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, format_name: str) -> None:
        self.folder, self.dtype = folder, f"<u{token_bytes(tokenizer)}"
        self.ids: BinaryIO = (folder / "ids").open("wb")
        self.learned: BinaryIO | None = (folder / "learned").open("wb") if format_name != "text" else None
        self.rows: list[tuple[Any, ...]] = []
        self.bands: list[np.ndarray] = []

    def add(self, split: str, encoded: EncodedDocument, key: DocumentKey | None) -> None:
        self.ids.write(np.asarray(encoded.ids, self.dtype).tobytes())
        if self.learned is not None:
            self.learned.write(np.asarray(encoded.learned, "?").tobytes())
        digest = np.frombuffer(key.digest if key else bytes(16), "<u8")
        sizes = (len(encoded.ids), encoded.text_bytes, encoded.learned_bytes)
        self.rows.append((*sizes, SPLITS.index(split), key is not None, encoded.ends, tuple(digest)))
        if key and key.bands is not None:
            self.bands.append(key.bands)

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.ids.close()
        if self.learned is not None:
            self.learned.close()
        np.save(self.folder / "rows.npy", np.array(self.rows, ROW_DTYPE))
        if self.bands:
            np.save(self.folder / BANDS_FILE, np.stack(self.bands, 1))


def token_bytes(tokenizer: Tokenizer) -> int:
    return 2 if len(tokenizer) <= 1 << 16 else 4
