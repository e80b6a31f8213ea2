"""Where text comes from: files here, data sets on the Hub, a store of objects, tokens that are ready.

"notes/", "*.parquet", "org/name:config"  ->  parts, in order  ->  rows, each once
"""

import glob
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from smolforge.config import Data
from smolforge.data.sources import datatrove_tokens, hub, jsonl, parquet, text
from smolforge.data.sources.types import MANY_BYTES, Ids, Part, Row, Size, Text
from smolforge.errors import InvalidFile

__all__ = ["Ids", "Part", "Row", "Size", "Text", "files", "is_counted", "kind_of", "parts", "rows", "size", "stamp"]

PYTHON_DOCS = "python-docs"
RECORDS = (*jsonl.SUFFIXES, *jsonl.PACKED, parquet.SUFFIX)
KNOWN = (*text.SUFFIXES, *RECORDS, datatrove_tokens.SUFFIX)


def files(source: str) -> list[Path]:
    """The files a source names: itself, those below a directory, or those a glob matches."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (Path's own raises where there is no such user)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if is_text(file, path))
        if not found:
            raise InvalidFile(f"there is no text in {source}: no file below it ends in {', '.join(KNOWN)}")
        return found
    found = sorted(
        Path(name)
        for name in glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if Path(name).is_file()
    )
    if not found:
        raise InvalidFile(f"there is no file, directory or match for the data source {source!r}")
    return found


def is_text(file: Path, below: Path) -> bool:
    """Whether a file of a directory is meant by it: what is hidden is not, nor a corpus that was made inside."""
    if not file.name.endswith(KNOWN) or not file.is_file():
        return False
    inner = file.relative_to(below)
    hidden = any(part.startswith(".") for part in inner.parts)
    return not hidden and not any((below / each / "corpus.json").is_file() for each in list(inner.parents)[:-1])


def on_hub(source: str) -> bool:
    """Whether it is the id of a data set: one that is no path here, and names no file."""
    if source == PYTHON_DOCS or hub.name_of(source) is None or source.endswith(KNOWN):
        return False
    return not Path(source).exists()


def kind_of(path: Path) -> str:
    """What a file holds, by its name; what has another is text."""
    if path.name.endswith((*jsonl.SUFFIXES, *jsonl.PACKED)):
        return "lines"
    return {parquet.SUFFIX: "parquet", datatrove_tokens.SUFFIX: "tokens"}.get(path.suffix, "text")


def parts(source: str, data: Data) -> list[Part]:
    """All of a source, in order. Raises as `files` and `rows`."""
    if source == PYTHON_DOCS and data.format == "text":
        return [Part(PYTHON_DOCS, source, "")]
    if on_hub(source):
        return hub.parts(source, data)
    found = files(source) if source != PYTHON_DOCS else []
    if data.format != "text":
        found = [path for path in found if path.name.endswith(RECORDS)]
        if not found:
            what = "conversations" if data.format == "chat" else "pairs"
            raise InvalidFile(
                f"there are no {what} in {source}: data.format is {data.format}, which reads files that end in "
                f"{' or '.join(jsonl.SUFFIXES)}, packed or not, and {parquet.SUFFIX}; --data.sources names them"
            )
    return [part for path in found for part in parts_of(path, source)]


def parts_of(path: Path, source: str) -> Iterator[Part]:
    """Of one file."""
    stat = path.stat()
    whole = partial(Part, kind_of(path), source, str(path), stamp=(stat.st_size, stat.st_mtime_ns))
    match kind_of(path):
        case "lines":
            known = None if path.name.endswith(jsonl.PACKED) else stat.st_size
            for start, stop in jsonl.borders(path):
                yield whole(start=start, stop=stop, size=known if stop is None else stop - start)
        case "parquet":
            for start, stop, size in parquet.borders(path):
                yield whole(start=start, stop=stop, size=size)
        case "tokens":
            for start, stop in datatrove_tokens.borders(path):
                yield whole(start=start, stop=stop)
        case _:
            yield whole(size=stat.st_size)


def rows(part: Part, data: Data, skip: int = 0) -> Iterator[Row]:
    """All but the first `skip` rows of a part.

    Raises InvalidFile, naming the place, for what is broken; MissingResource where something is needed to read it.
    """
    if part.kind == "hub":
        return hub.rows(part, data, skip)
    return rows_of_file(part, data, skip)


def rows_of_file(part: Part, data: Data, skip: int) -> Iterator[Row]:
    """Of a part that is here. Raises InvalidFile where it no longer is, or may not be read."""
    try:
        match part.kind:
            case "text":
                yield from text.rows(part, skip)
            case "lines":
                yield from jsonl.rows(part, skip)
            case "parquet":
                yield from parquet.rows(part, data, skip)
            case "tokens":
                yield from datatrove_tokens.rows(part, skip)
            case kind:
                raise AssertionError(kind)
    except OSError as error:
        raise InvalidFile(f"{part.place} cannot be read: {error.strerror or error}") from None


def is_counted(source: str, found: list[Part]) -> bool:
    """Whether a source is read once beforehand, so that exactly the share to hold out is held out.

    Not what would take long: much text, what is packed or streamed; there a hash decides.
    """
    kinds = {part.kind for part in found}
    in_lines = sum(part.size or 0 for part in found if part.kind == "lines")
    plain = not any(part.kind == "lines" and part.size is None for part in found)
    return kinds <= {"text", "lines", PYTHON_DOCS} and plain and in_lines <= MANY_BYTES


def size(source: str, data: Data) -> Size:
    """What a source holds, told before it is read."""
    if on_hub(source):
        return hub.size(source, data)
    sizes = [part.size for part in parts(source, data)]
    return Size(None, None if None in sizes else sum(each or 0 for each in sizes))


def stamp(source: str) -> list[int | str]:
    """Number, bytes and latest change of a source's files, or a data set's commit: whether they are still the same."""
    if on_hub(source):
        return [hub.commit(source)]
    found = [path.stat() for path in files(source)] if source != PYTHON_DOCS else []
    return [len(found), sum(stat.st_size for stat in found), max((stat.st_mtime_ns for stat in found), default=0)]
