"""What a contestant writes down of each step, in any environment: one line, on the file at once."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE = "steps.jsonl"


class Steps:
    """Lines {step, time, rows} in OUT/steps.jsonl; of a step repeated after a kill there are several."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = os.open(out / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, step: int, rows: list[str]) -> None:
        os.write(self.file, (json.dumps({"step": step, "time": time.time(), "rows": rows}) + "\n").encode())


def named(rows: Iterable[Any]) -> list[str]:
    """A short name of each row of ids, the same wherever the same row is read."""
    return [hashlib.sha256(",".join(map(str, row.tolist())).encode()).hexdigest()[:12] for row in rows]


def read(out: Path) -> list[dict[str, Any]]:
    """All lines that are whole."""
    found = []
    for line in (out / FILE).read_text().splitlines() if (out / FILE).is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # the kill came while it was written
            continue
    return found
