"""Text files: each is one document; a large one comes in pieces, cut where no token spans."""

import codecs
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from smolforge.data.sources.types import LONGEST_LINE, FileText, SourcePart, SourceRow
from smolforge.errors import InvalidFileError

SUFFIXES = (".txt", ".md", ".rst", ".raw", ".text")
PIECE_BYTES = 16 << 20
LARGE_BYTES = 64 << 20
"""Files beyond this come in pieces."""
_SPACES = (
    rb"[\0- \x7f]",
    rb"\xc2[\x85\xa0]",
    rb"(?:\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)",
)
"""White space, and what is no better, in UTF-8, by its length."""
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
"""All bytes of a character of UTF-8 but its first."""
_LINE_END = re.compile(
    rb"\n(?:%b(?=...)|(?= [!-/:-~]))" % b"".join(rb"(?<!%b\n)(?!%b)" % (space, space) for space in _SPACES), re.DOTALL
)
_LAST_LINE_END = re.compile(rb"[\r\n](?=\n[!-/:-~])")
"""A line end before the last of several: GPT-2's word pattern takes that apart, others do not."""


def is_large(part: SourcePart) -> bool:
    """Whether it is a text that comes in pieces."""
    return part.kind == "text" and (part.size or 0) > LARGE_BYTES


def count_characters(path: Path) -> int:
    """Count the characters of a UTF-8 file in blocks. Raises InvalidFileError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(
                len(block.translate(None, _CONTINUATION_BYTES)) for block in iter(partial(file.read, PIECE_BYTES), b"")
            )
    except OSError as error:
        raise InvalidFileError(f"{path} cannot be read: {error.strerror}") from None


def rows(part: SourcePart, skip: int = 0) -> Iterator[SourceRow]:
    """The text of a file, in one or more pieces."""
    path = Path(part.location)
    if not is_large(part):
        yield from [SourceRow(FileText(read_text(path)), path.name, str(path))][skip:]
        return
    start = 0
    for number, (piece, ends) in enumerate(pieces(path)):
        if number >= skip:
            text = decode_utf8(piece, path, start)
            yield SourceRow(FileText(text.removeprefix("\ufeff") if start == 0 else text), path.name, str(path), ends)
        start += len(piece)


def pieces(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Some megabytes at a time, each but the last up to a line end where the ids of the pieces are those of the whole:
    where all word patterns cut, or else where GPT-2's does (`split_at_lines` of the tokenizer says why).
    """
    with path.open("rb") as file:
        buffer = b""
        while block := file.read(PIECE_BYTES):
            buffer += block
            if cut := last_match_end(_LINE_END, buffer) or last_match_end(_LAST_LINE_END, buffer):
                yield buffer[:cut], False
                buffer = buffer[cut:]
            elif len(buffer) > LONGEST_LINE:
                raise InvalidFileError(
                    f"{path} has more than {LONGEST_LINE >> 20} MiB without a line end where it could be cut; "
                    "a text needs lines: break it, or write it as documents into a .jsonl file"
                )
        yield buffer, True


def last_match_end(pattern: re.Pattern[bytes], text: bytes) -> int:
    """Return the end of the last match in the newest bytes of a text; 0 for none."""
    return max((match.end() for match in pattern.finditer(text, max(0, len(text) - PIECE_BYTES))), default=0)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, its line ends kept as they are.

    Raises InvalidFileError where it is none or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidFileError(f"{path} cannot be read: {error.strerror}") from None
    return decode_utf8(content, path, 0).removeprefix("\ufeff")


def decode_utf8(content: bytes, path: Path, start: int) -> str:
    """Decode bytes that start at byte `start` of a file."""
    if b"\0" in content:
        raise InvalidFileError(f"{path} is not text: it has a zero byte at {start + content.index(0)}")
    try:
        return codecs.decode(content, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFileError(
            f"{path} is not UTF-8 text: byte {start + error.start} is {content[error.start]:#04x}"
        ) from None
