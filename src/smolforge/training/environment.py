"""Each start of a run in environment.json: the machine, the versions, and how it ended.

A list, oldest first. A start whose process was killed never says how it ended.
"""

import json
import logging
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.errors import InvalidFileError

log = logging.getLogger("smolforge")
ENVIRONMENT = "environment.json"
PACKAGES = ("smolforge", "torch", "numpy", "tokenizers", "safetensors")
MAY_DIFFER = ("commit", "seen")
"""What changes no weight."""


def starts(folder: Path) -> list[dict[str, Any]]:
    """Return all starts of a run, oldest first. Raises InvalidFileError where the file is corrupted."""
    path = folder / ENVIRONMENT
    try:
        entries = json.loads(path.read_text("utf-8")) if path.is_file() else []
    except ValueError as error:
        raise InvalidFileError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(start, dict) for start in entries):
        raise InvalidFileError(f"{path} is not a list of starts")
    return entries


def record_start(folder: Path, step: int, machine: dict[str, Any], *, environment: dict[str, Any]) -> dict[str, Any]:
    """Add this start, and warn where it cannot repeat the last one bit-for-bit.

    `machine` decides that; `environment` may explain how fast it was. Returns the entry.
    """
    before = starts(folder)
    current = {**machine, "packages": versions(), "commit": revision(), "seen": environment}
    if before:
        changed = [key for key in current if key not in MAY_DIFFER and before[-1].get(key) != current[key]]
        if changed:
            log.warning(
                "%s changed since the last start: the run goes on to rounding, not to the bit", ", ".join(changed)
            )
    entry = {"step": step, "time": clock_time(), **current}
    _write(folder, [*before, entry])
    return entry


def record_end(folder: Path, state: str, reason: str) -> None:
    """Record how the last start ended. Raises OSError where the disk is full."""
    *before, last = starts(folder)
    _write(folder, [*before, {**last, "ended": {"time": clock_time(), "state": state, "reason": reason}}])


def _write(folder: Path, all_starts: list[dict[str, Any]]) -> None:
    atomic.write_text_atomic(folder / ENVIRONMENT, json.dumps(all_starts, indent=2) + "\n")


def clock_time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result."""
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    """Return a package's version; ours may run as source that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def revision() -> str | None:
    """Return the commit smolforge runs from, where it runs from a checkout."""
    here = Path(__file__).parent
    if not (here.parents[2] / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # git itself is not here
        return None
    return result.stdout.strip() or None
