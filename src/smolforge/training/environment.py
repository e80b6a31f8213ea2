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
from smolforge.errors import InvalidFile

log = logging.getLogger("smolforge")
ENVIRONMENT = "environment.json"
PACKAGES = ("smolforge", "torch", "numpy", "tokenizers", "safetensors")
MAY_DIFFER = ("commit", "seen")
"""What changes no weight."""


def starts(folder: Path) -> list[dict[str, Any]]:
    """All starts of a run, oldest first. Raises InvalidFile where the file is damaged."""
    path = folder / ENVIRONMENT
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else []
    except ValueError as error:
        raise InvalidFile(f"{path} is not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(start, dict) for start in found):
        raise InvalidFile(f"{path} is not a list of starts")
    return found


def record_start(folder: Path, step: int, machine: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """Add this start, and warn where it cannot repeat the last one to the bit.

    `machine` is what decides that; `seen` is whatever else may explain how fast it went. Returns what was added.
    """
    before = starts(folder)
    now = {**machine, "packages": versions(), "commit": revision(), "seen": seen}
    if before:
        changed = [key for key in now if key not in MAY_DIFFER and before[-1].get(key) != now[key]]
        if changed:
            log.warning(
                "%s changed since the last start: the run goes on to rounding, not to the bit", ", ".join(changed)
            )
    added = {"step": step, "time": clock_time(), **now}
    _write(folder, [*before, added])
    return added


def record_end(folder: Path, state: str, reason: str) -> None:
    """Say of the last start how it ended. Raises OSError where the disk has no room for it."""
    *before, last = starts(folder)
    _write(folder, [*before, {**last, "ended": {"time": clock_time(), "state": state, "reason": reason}}])


def _write(folder: Path, all_starts: list[dict[str, Any]]) -> None:
    atomic.replace(folder / ENVIRONMENT, json.dumps(all_starts, indent=2) + "\n")


def clock_time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    """Of a package; ours may run as source that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def revision() -> str | None:
    """The commit smolforge runs from, where it runs from a checkout."""
    here = Path(__file__).parent
    if not (here.parents[2] / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # git itself is not here
        return None
    return found.stdout.strip() or None
