"""What all kinds of sources are read as.

a source  ->  its parts, in order, each readable by itself  ->  rows: columns, or the text of a file  ->  documents
"""

from typing import Any, NamedTuple

import numpy as np

MANY_BYTES = 256 << 20
"""Records beyond this, and whatever is packed or streamed, are read once: a hash decides what is held out."""
LONGEST_LINE = 128 << 20
"""Bytes without a line end that are taken for text; it has to be held in memory many times over."""


class SourcePart(NamedTuple):
    """A run of a source's rows: a file, or what lies between two places of it."""

    kind: str
    source: str
    location: str
    start: int = 0
    stop: int | None = None
    stamp: tuple[int, ...] = ()
    """What tells whether it changed."""
    size: int | None = None
    """Bytes of text in it, or nearly, where that is known beforehand."""


class SourceRow(NamedTuple):
    """Columns, the text of a file, or its ids."""

    record: Any
    name: str
    """Of what the held-out split keeps together, where no key says so."""
    location: str
    """For a sentence about it."""
    ends: bool = True
    """Whether the document ends with it; a large text comes in pieces."""


class FileText(str):
    """A text that stands in a file by itself, not in a column."""


class TokenIds(NamedTuple):
    """A document that is tokenized already, with the token that ends it."""

    ids: np.ndarray


class SourceSize(NamedTuple):
    """What a source holds, as far as it is known without reading it."""

    rows: int | None
    text_bytes: int | None
    download_bytes: int | None = None

    def __str__(self) -> str:
        parts = [
            f"{count:,} {unit}" if unit == "rows" else f"{count / 1e9:,.2f} GB {unit}"
            for count, unit in ((self.rows, "rows"), (self.text_bytes, "of data"), (self.download_bytes, "to download"))
            if count is not None
        ]
        return ", ".join(parts) or "unknown"
