"""A run's folder: everything a run writes down about itself.

recipe.toml       the resolved recipe             environment.json  the machine of each start
metrics.jsonl     one object a step               samples.jsonl     text samples
run.log           starts, saves, warnings, errors checkpoints/      see checkpoint
"""

import fcntl
import json
import logging
import os
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFile, SettingError, Stopped

log = logging.getLogger("smolforge")
RECIPE, ENVIRONMENT, METRICS, SAMPLES, LOG = (
    "recipe.toml",
    "environment.json",
    "metrics.jsonl",
    "samples.jsonl",
    "run.log",
)
PACKAGES = ("smolforge", "torch", "numpy", "tokenizers", "safetensors")


class RunFolder:
    """One run on disk; `open` locks it for the one process that writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["RunFolder"]:
        """Raises SettingError when another process has it, or when it is a folder of something else."""
        run = cls(path)
        if path.exists() and not (path.is_dir() and (run.exists or not any(path.iterdir()))):
            raise SettingError(f"{path} exists and is not a run folder; give --run another name")
        path.mkdir(parents=True, exist_ok=True)
        with (path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise SettingError(
                    f"{path} is being trained by process {lock.read().strip()}; wait, or stop it"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            with run._logging():
                yield run

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RECIPE).is_file() or (self.path / ".lock").is_file()

    def stored_recipe(self) -> Path | None:
        path = self.path / RECIPE
        return path if path.is_file() else None

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole."""
        temporary = self.path / f".tmp-{name}"
        temporary.write_text(text, "utf-8")
        temporary.replace(self.path / name)

    def append(self, name: str, record: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what metrics and samples say of steps after this one: they will be run again."""
        for name in (METRICS, SAMPLES):
            if (self.path / name).is_file():
                kept = [record for record in read_records(self.path / name) if record["step"] <= step]
                self.write(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))

    def record_environment(self, step: int, machine: dict[str, Any]) -> None:
        """Add this start to environment.json, and warn where it cannot repeat the last one to the bit."""
        path = self.path / ENVIRONMENT
        starts = json.loads(path.read_text("utf-8")) if path.is_file() else []
        now = {**machine, "packages": versions(), "commit": commit()}
        if starts:
            before = starts[-1]
            changed = [key for key in now if key != "commit" and before.get(key) != now[key]]
            if changed:
                log.warning(
                    "%s changed since the last start: the run goes on to rounding, not to the bit", ", ".join(changed)
                )
        starts.append({"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **now})
        self.write(ENVIRONMENT, json.dumps(starts, indent=2) + "\n")

    @contextmanager
    def _logging(self) -> Iterator[None]:
        handler = logging.FileHandler(self.path / LOG, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        except Stopped as stop:
            log.info("%s", stop)
            raise
        except BaseException:
            record = logging.LogRecord("smolforge", logging.ERROR, "", 0, traceback.format_exc(), None, None)
            handler.handle(record)  # for the file alone: people get one sentence
            raise
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            handler.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line cut short by a crash is left out."""
    lines = path.read_text("utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append({**json.loads(line)})
        except (ValueError, TypeError):
            if number < len(lines):
                raise InvalidFile(f"{path}, line {number} is not a JSON object") from None
    return records


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: metadata.version(name) for name in PACKAGES}


def commit() -> str | None:
    """The commit smolforge runs from, where it runs from a checkout."""
    here = Path(__file__).parent
    if not (here.parents[1] / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # git itself is not here
        return None
    return found.stdout.strip() or None
