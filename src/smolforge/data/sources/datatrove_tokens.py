"""Token files that datatrove wrote, taken as they are: the ids, and where each document ends.

The tokenizer is held to what the files tell of theirs: bytes an id, its largest id, and which id ends a document; its
name, where that leads to a tokenizer.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from smolforge.data.sources.types import Ids, Part, Row
from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import Tokenizer

SUFFIX = ".ds"
PART_TOKENS = 32 << 20


def borders(path: Path) -> list[tuple[int, int]]:
    """The first document of each part, and the first of the next. Raises InvalidFile where index and ids disagree."""
    ends, size = ends_of(path), bytes_an_id(path)
    if path.stat().st_size != int(ends[-1] if len(ends) else 0) * size:
        raise InvalidFile(f"{path} is damaged: it has not as many tokens as {path.name}.index says")
    firsts = [0, *np.flatnonzero(np.diff(ends // PART_TOKENS)) + 1, len(ends)]
    return [(int(start), int(stop)) for start, stop in pairwise(firsts) if start < stop]


def rows(part: Part, skip: int = 0) -> Iterator[Row]:
    path = Path(part.place)
    ends, ids = ends_of(path), np.memmap(path, f"<u{bytes_an_id(path)}", "r")
    for number in range(part.start + skip, part.stop or 0):
        start = int(ends[number - 1]) if number else 0
        yield Row(Ids(np.asarray(ids[start : ends[number]])), f"{path.name}:{number}", f"{path}, document {number}")


def ends_of(path: Path) -> np.ndarray:
    index = path.with_name(f"{path.name}.index")
    if not index.is_file():
        raise InvalidFile(f"{path} has no {index.name} beside it, which says where its documents end")
    return np.fromfile(index, "<u8").astype(np.int64)


def bytes_an_id(path: Path) -> int:
    """As `.ds.metadata` says; 2, datatrove's default, where there is none."""
    _, _, size = named(path).rpartition("|")
    return int(size) if size in ("2", "4") else 2


def named(path: Path) -> str:
    """The first line of the metadata: the tokenizer's name or path, and bytes an id."""
    metadata = path.with_name(f"{path.name}.metadata")
    return metadata.read_text("utf-8").partition("\n")[0] if metadata.is_file() else ""


def check_tokenizer(path: Path, tokenizer: Tokenizer | None) -> None:
    """Raises SettingError where there is none, or the files were made with another."""
    if tokenizer is None:
        raise SettingError(f"{path} holds tokens; --tokenizer names the tokenizer that made them")
    name = named(path).rpartition("|")[0]
    theirs = Tokenizer.load(name).fingerprint if name and Path(name).exists() else None
    if theirs is not None and theirs != tokenizer.fingerprint:
        raise SettingError(f"{path} was made with another tokenizer ({name}); --tokenizer names it")
    ids = np.memmap(path, f"<u{bytes_an_id(path)}", "r")
    last = ids[ends_of(path)[:1000] - 1]
    if (last != tokenizer.eos_id).any():
        raise SettingError(
            f"{path} was made with another tokenizer: its documents end with id {int(last[0])}, and this one's end of "
            f"text is {tokenizer.eos_id}"
        )
