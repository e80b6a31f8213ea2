"""JSON lines, plain or packed by gzip or zstandard."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from smolforge.data.sources.types import LONGEST_LINE, MANY_BYTES, SourcePart, SourceRow
from smolforge.errors import InvalidFileError, MissingResourceError, install_command

SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = tuple(f"{suffix}{packing}" for suffix in SUFFIXES for packing in (".gz", ".zst"))
PART_BYTES = 64 << 20
BLOCK_BYTES = 16 << 10
"""Packed bytes to unpack at a time; zeros may become thousands of times as much."""


def borders(path: Path) -> list[tuple[int, int | None]]:
    """Where the parts of a file begin and end: a large one that is not packed has many."""
    size = path.stat().st_size
    if size <= MANY_BYTES or path.name.endswith(COMPRESSED_SUFFIXES):
        return [(0, None)]
    return [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


def rows(part: SourcePart, skip: int = 0) -> Iterator[SourceRow]:
    """The rows whose lines begin in the part."""
    path = Path(part.location)
    for number, (position, line) in enumerate(read_lines(path, part.start, part.stop)):
        if number >= skip:
            label = f"line {position}" if part.stop is None else f"the line at byte {position}"
            location = f"{path}, {label}"
            yield SourceRow(parse_json(line, location), f"{path.name}:{position}", location)


def read_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, each with its number from 1, or, of a part of a file, with the byte it begins at."""
    with open_decompressed(path) as file:
        if start:
            file.seek(start - 1)
            read_line(file, path)
        offset, number = file.tell() if stop is not None else 0, 0
        while (stop is None or offset < stop) and (line := read_line(file, path)):
            number += 1
            if line.strip():
                yield (number if stop is None else offset), line
            offset += len(line)


def read_line(file: Any, path: Path) -> bytes:
    line = file.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise InvalidFileError(
            f"{path} has a line of more than {LONGEST_LINE >> 20} MiB, which is no document that could be read; "
            "a .jsonl file has one document in each line"
        )
    return line


def parse_json(line: bytes, location: str) -> Any:
    """Parse the JSON of a line."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise InvalidFileError(
            f"{location} is not UTF-8 text: byte {error.start} of it is {line[error.start]:#04x}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{location} is not JSON: {error}") from None


@contextmanager
def open_decompressed(path: Path) -> Iterator[Any]:
    """Open a file for reading, decompressed. Raises InvalidFileError where it is broken."""
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path) as file:
                yield file
        elif path.name.endswith(".zst"):
            with path.open("rb") as packed, io.BufferedReader(ZstdReader(packed, path), 1 << 20) as file:
                yield file
        else:
            with path.open("rb") as file:
                yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidFileError(
            f"{path} is broken and cannot be unpacked ({error}); it may have been cut short, so get it again"
        ) from None


class ZstdReader(io.RawIOBase):
    """Reads the frames of a zstandard file. Unlike the library's reader it notices a missing end."""

    def __init__(self, packed: BinaryIO, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingResourceError(f"{path} needs zstandard; {install_command('data')} brings it") from None
        self.compressed, self.library = packed, zstandard
        self.frame: Any = None
        self.decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self.decompressed and (block := self._block()):
            if self.frame is None:
                self.frame = self.library.ZstdDecompressor().decompressobj()
            try:
                self.decompressed = self.frame.decompress(block)
            except self.library.ZstdError as error:
                raise EOFError(error) from None
        count = min(len(buffer), len(self.decompressed))
        buffer[:count], self.decompressed = self.decompressed[:count], self.decompressed[count:]
        return count

    def _block(self) -> bytes:
        """What is still packed; where a frame has ended, another begins."""
        ended = self.frame is None or self.frame.eof
        leftover = self.frame.unused_data if self.frame is not None and ended else b""
        if ended:
            self.frame = None
        block = leftover or self.compressed.read(BLOCK_BYTES)
        if not block and not ended:
            raise EOFError("its end is missing")
        return block
