"""Text files: each is one document; a large one comes in pieces, cut where no token spans."""

import codecs
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from smolforge.data.sources.types import LONGEST_LINE, Part, Row, Text
from smolforge.errors import InvalidFile

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
_INSIDE = bytes(range(0x80, 0xC0))
"""All bytes of a character of UTF-8 but its first."""
_LINE_END = re.compile(
    rb"\n(?:%b(?=...)|(?= [!-/:-~]))" % b"".join(rb"(?<!%b\n)(?!%b)" % (space, space) for space in _SPACES),
    re.DOTALL,
)
_LAST_OF_SEVERAL = re.compile(rb"[\r\n](?=\n[!-/:-~])")
"""A line end before the last of several: GPT-2's word pattern takes that apart, others do not."""


def is_large(part: Part) -> bool:
    """Whether it is a text that comes in pieces."""
    return part.kind == "text" and (part.size or 0) > LARGE_BYTES


def characters(path: Path) -> int:
    """Of a UTF-8 file, counted without holding it. Raises InvalidFile where it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(len(block.translate(None, _INSIDE)) for block in iter(partial(file.read, PIECE_BYTES), b""))
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror}") from None


def rows(part: Part, skip: int = 0) -> Iterator[Row]:
    """The text of a file, in one or more pieces."""
    path = Path(part.place)
    if not is_large(part):
        yield from [Row(Text(read_text(path)), path.name, str(path))][skip:]
        return
    start = 0
    for number, (piece, ends) in enumerate(pieces(path)):
        if number >= skip:
            text = decoded(piece, path, start)
            yield Row(Text(text.removeprefix("\ufeff") if start == 0 else text), path.name, str(path), ends)
        start += len(piece)


def pieces(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Some megabytes at a time, each but the last up to a line end where the ids of the pieces are those of the whole:
    where all word patterns cut, or else where GPT-2's does (`split_at_lines` of the tokenizer says why).
    """
    with path.open("rb") as file:
        rest = b""
        while block := file.read(PIECE_BYTES):
            rest += block
            if cut := last(_LINE_END, rest) or last(_LAST_OF_SEVERAL, rest):
                yield rest[:cut], False
                rest = rest[cut:]
            elif len(rest) > LONGEST_LINE:
                raise InvalidFile(
                    f"{path} has more than {LONGEST_LINE >> 20} MiB without a line end where it could be cut; "
                    "a text needs lines: break it, or write it as documents into a .jsonl file"
                )
        yield rest, True


def last(pattern: re.Pattern[bytes], text: bytes) -> int:
    """The end of the last match in the newest bytes of a text; 0 for none."""
    return max((found.end() for found in pattern.finditer(text, max(0, len(text) - PIECE_BYTES))), default=0)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, its line ends kept as they are. Raises InvalidFile where it is none or cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror}") from None
    return decoded(content, path, 0).removeprefix("\ufeff")


def decoded(content: bytes, path: Path, start: int) -> str:
    """The text of bytes that begin at `start` of a file."""
    if b"\0" in content:
        raise InvalidFile(f"{path} is not text: it has a zero byte at {start + content.index(0)}")
    try:
        return codecs.decode(content, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFile(
            f"{path} is not UTF-8 text: byte {start + error.start} is {content[error.start]:#04x}"
        ) from None
