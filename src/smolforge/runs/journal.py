"""Lines of JSON that a run appends as it goes, and reads back."""

import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFile

log = logging.getLogger("smolforge")


class Journal:
    """A .jsonl file that grows by whole lines. What a full disk refuses waits, and goes out with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = path.stat().st_size if path.is_file() else 0
        self.waiting = b""

    def append(self, record: dict[str, Any]) -> None:
        full = bool(self.waiting)
        self.waiting += as_line(record).encode()
        try:
            self.flush()
        except OSError as error:
            if not full:
                log.warning("%s could not be written (%s); what belongs there is kept", self.path, error.strerror)

    def flush(self) -> None:
        """Write what waits. Raises OSError where that fails; half a line is then taken back by the next try."""
        if not self.waiting:
            return
        with self.path.open("ab") as file:
            if file.tell() != self.bytes:
                file.truncate(self.bytes)
            file.write(self.waiting)
        self.bytes += len(self.waiting)
        self.waiting = b""

    def records(self) -> list[dict[str, Any]]:
        """All whole records, those that wait included."""
        return whole_records(self._content())

    def cut(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Take back everything from the first record that is broken or not wanted; that needs no room on the disk.

        Returns what is left.
        """
        content = self._content()
        records = list(itertools.takewhile(wanted, whole_records(content)))
        kept = sum(len(line) + 1 for line, _ in zip(content.split(b"\n"), records, strict=False))
        self.waiting = content[self.bytes : kept]
        if kept < self.bytes:
            with self.path.open("rb+") as file:
                file.truncate(kept)
            self.bytes = kept
        return records

    def _content(self) -> bytes:
        written = self.path.read_bytes()[: self.bytes] if self.bytes else b""
        return written + self.waiting


def as_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, which has no word for what is not a number: null stands for it."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line cut short by a crash is left out. Raises InvalidFile for another."""
    content = path.read_bytes()
    records = whole_records(content)
    if len(records) < content.count(b"\n"):
        raise InvalidFile(f"{path}, line {len(records) + 1} is not a JSON object")
    return records


def whole_records(content: bytes) -> list[dict[str, Any]]:
    """The objects of lines of JSON, up to the first line that is none."""
    records = []
    for line in content.split(b"\n")[:-1]:
        try:
            records.append({**json.loads(line)})
        except (ValueError, TypeError):
            break
    return records
