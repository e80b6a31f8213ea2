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
from smolforge.data.sources.types import MANY_BYTES, FileText, SourcePart, SourceRow, SourceSize, TokenIds
from smolforge.errors import InvalidFileError

__all__ = [
    "FileText",
    "SourcePart",
    "SourceRow",
    "SourceSize",
    "TokenIds",
    "files",
    "is_counted",
    "kind_of",
    "parts",
    "rows",
    "size",
    "stamp",
]

PYTHON_DOCS = "python-docs"
RECORD_SUFFIXES = (*jsonl.SUFFIXES, *jsonl.COMPRESSED_SUFFIXES, parquet.SUFFIX)
SUFFIXES = (*text.SUFFIXES, *RECORD_SUFFIXES, datatrove_tokens.SUFFIX)


def files(source: str) -> list[Path]:
    """The files a source names: itself, those below a directory, or those a glob matches."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (Path's own raises where there is no such user)
    if path.is_file():
        return [path]
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if is_text(file, path))
        if not paths:
            raise InvalidFileError(f"there is no text in {source}: no file below it ends in {', '.join(SUFFIXES)}")
        return paths
    paths = sorted(
        Path(name)
        for name in glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if Path(name).is_file()
    )
    if not paths:
        raise InvalidFileError(f"there is no file, directory or match for the data source {source!r}")
    return paths


def is_text(file: Path, below: Path) -> bool:
    """Whether a file of a directory is meant by it: what is hidden is not, nor a corpus that was made inside."""
    if not file.name.endswith(SUFFIXES) or not file.is_file():
        return False
    inner = file.relative_to(below)
    hidden = any(part.startswith(".") for part in inner.parts)
    return not hidden and not any((below / folder / "corpus.json").is_file() for folder in list(inner.parents)[:-1])


def is_on_hub(source: str) -> bool:
    """Return whether a source is the id of a data set on the Hub: not a path here, nor the name of a file."""
    if source == PYTHON_DOCS or hub.parse_name(source) is None or source.endswith(SUFFIXES):
        return False
    return not Path(source).exists()


def kind_of(path: Path) -> str:
    """What a file holds, by its name; what has another is text."""
    if path.name.endswith((*jsonl.SUFFIXES, *jsonl.COMPRESSED_SUFFIXES)):
        return "lines"
    return {parquet.SUFFIX: "parquet", datatrove_tokens.SUFFIX: "tokens"}.get(path.suffix, "text")


def parts(source: str, data: Data) -> list[SourcePart]:
    """All of a source, in order. Raises as `files` and `rows`."""
    if source == PYTHON_DOCS and data.format == "text":
        return [SourcePart(PYTHON_DOCS, source, "")]
    if is_on_hub(source):
        return hub.parts(source, data)
    paths = files(source) if source != PYTHON_DOCS else []
    if data.format != "text":
        paths = [path for path in paths if path.name.endswith(RECORD_SUFFIXES)]
        if not paths:
            content = "conversations" if data.format == "chat" else "pairs"
            raise InvalidFileError(
                f"there are no {content} in {source}: data.format is {data.format}, which reads files that end in "
                f"{' or '.join(jsonl.SUFFIXES)}, packed or not, and {parquet.SUFFIX}; --data.sources names them"
            )
    return [part for path in paths for part in parts_of_file(path, source)]


def parts_of_file(path: Path, source: str) -> Iterator[SourcePart]:
    """Yield the parts of one file."""
    stat = path.stat()
    make_part = partial(SourcePart, kind_of(path), source, str(path), stamp=(stat.st_size, stat.st_mtime_ns))
    match kind_of(path):
        case "lines":
            known_size = None if path.name.endswith(jsonl.COMPRESSED_SUFFIXES) else stat.st_size
            for start, stop in jsonl.borders(path):
                yield make_part(start=start, stop=stop, size=known_size if stop is None else stop - start)
        case "parquet":
            for start, stop, size in parquet.borders(path):
                yield make_part(start=start, stop=stop, size=size)
        case "tokens":
            for start, stop in datatrove_tokens.borders(path):
                yield make_part(start=start, stop=stop)
        case _:
            yield make_part(size=stat.st_size)


def rows(part: SourcePart, data: Data, skip: int = 0) -> Iterator[SourceRow]:
    """All but the first `skip` rows of a part.

    Raises InvalidFileError, naming the place, for what is broken; MissingResourceError where something is needed to
    read it.
    """
    if part.kind == "hub":
        return hub.rows(part, data, skip)
    return rows_of_file(part, data, skip)


def rows_of_file(part: SourcePart, data: Data, skip: int) -> Iterator[SourceRow]:
    """Of a part that is here. Raises InvalidFileError where it no longer is, or may not be read."""
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
        raise InvalidFileError(f"{part.location} cannot be read: {error.strerror or error}") from None


def is_counted(source: str, source_parts: list[SourcePart]) -> bool:
    """Whether a source is read once beforehand, so that exactly the share to hold out is held out.

    Not what would take long: much text, what is packed or streamed; there a hash decides.
    """
    kinds = {part.kind for part in source_parts}
    in_lines = sum(part.size or 0 for part in source_parts if part.kind == "lines")
    plain = not any(part.kind == "lines" and part.size is None for part in source_parts)
    return kinds <= {"text", "lines", PYTHON_DOCS} and plain and in_lines <= MANY_BYTES


def size(source: str, data: Data) -> SourceSize:
    """Return how much a source holds, without reading it."""
    if is_on_hub(source):
        return hub.size(source, data)
    sizes = [part.size for part in parts(source, data)]
    return SourceSize(None, None if None in sizes else sum(part_size or 0 for part_size in sizes))


def stamp(source: str) -> list[int | str]:
    """Number, bytes and latest change of a source's files, or a data set's commit: whether they are still the same."""
    if is_on_hub(source):
        return [hub.resolve_commit(source)]
    stats = [path.stat() for path in files(source)] if source != PYTHON_DOCS else []
    return [len(stats), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]
