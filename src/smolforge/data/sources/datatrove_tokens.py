"""Token files that datatrove wrote, taken as they are: the ids, and where each document ends.

The tokenizer is compared with the files' own: bytes per id, its largest id, and which id ends a document; its
name, where that leads to a tokenizer.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from smolforge.data.sources.types import SourcePart, SourceRow, TokenIds
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer import Tokenizer

SUFFIX = ".ds"
PART_TOKENS = 32 << 20


def borders(path: Path) -> list[tuple[int, int]]:
    """The first document of each part, and the first of the next.

    Raises InvalidFileError where index and ids disagree.
    """
    ends, size = document_ends(path), bytes_per_id(path)
    if path.stat().st_size != int(ends[-1] if len(ends) else 0) * size:
        raise InvalidFileError(f"{path} is damaged: it has not as many tokens as {path.name}.index says")
    firsts = [0, *np.flatnonzero(np.diff(ends // PART_TOKENS)) + 1, len(ends)]
    return [(int(start), int(stop)) for start, stop in pairwise(firsts) if start < stop]


def rows(part: SourcePart, skip: int = 0) -> Iterator[SourceRow]:
    path = Path(part.location)
    ends, ids = document_ends(path), np.memmap(path, f"<u{bytes_per_id(path)}", "r")
    for number in range(part.start + skip, part.stop or 0):
        start = int(ends[number - 1]) if number else 0
        yield SourceRow(
            TokenIds(np.asarray(ids[start : ends[number]])), f"{path.name}:{number}", f"{path}, document {number}"
        )


def document_ends(path: Path) -> np.ndarray:
    index = path.with_name(f"{path.name}.index")
    if not index.is_file():
        raise InvalidFileError(f"{path} has no {index.name} beside it, which says where its documents end")
    return np.fromfile(index, "<u8").astype(np.int64)


def bytes_per_id(path: Path) -> int:
    """Return the bytes per id that `.ds.metadata` gives; 2, datatrove's default, without that file."""
    _, _, size = first_metadata_line(path).rpartition("|")
    return int(size) if size in ("2", "4") else 2


def first_metadata_line(path: Path) -> str:
    """Return the first line of the metadata: the tokenizer's name or path, and bytes per id."""
    metadata = path.with_name(f"{path.name}.metadata")
    return metadata.read_text("utf-8").partition("\n")[0] if metadata.is_file() else ""


def check_tokenizer(path: Path, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError where there is none, or the files were made with another."""
    if tokenizer is None:
        raise ConfigError(f"{path} holds tokens; --tokenizer names the tokenizer that made them")
    name = first_metadata_line(path).rpartition("|")[0]
    expected = Tokenizer.load(name).fingerprint if name and Path(name).exists() else None
    if expected is not None and expected != tokenizer.fingerprint:
        raise ConfigError(f"{path} was made with another tokenizer ({name}); --tokenizer names it")
    ids = np.memmap(path, f"<u{bytes_per_id(path)}", "r")
    last = ids[document_ends(path)[:1000] - 1]
    if (last != tokenizer.eos_id).any():
        raise ConfigError(
            f"{path} was made with another tokenizer: its documents end with id {int(last[0])}, and this one's end of "
            f"text is {tokenizer.eos_id}"
        )
