"""A run's folder: everything a run writes down about itself.

recipe.toml       the resolved recipe             environment.json  the machine of each start
metrics.jsonl     one object a step               samples.jsonl     text samples
incidents.jsonl   numbers that went wrong, and what was done
run.log           starts, saves, warnings, errors checkpoints/      see checkpoint
"""

import fcntl
import json
import logging
import math
import os
import socket
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from smolforge import commit
from smolforge.errors import InvalidFile, SettingError, Stopped

log = logging.getLogger("smolforge")
RECIPE, ENVIRONMENT, METRICS, SAMPLES, INCIDENTS, LOG, LOCK = (
    "recipe.toml",
    "environment.json",
    "metrics.jsonl",
    "samples.jsonl",
    "incidents.jsonl",
    "run.log",
    ".lock",
)
PACKAGES = ("smolforge", "torch", "numpy", "tokenizers", "safetensors")


class RunFolder:
    """One run on disk; `open` locks it for the one process that writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journals = {name: Journal(path / name) for name in (METRICS, SAMPLES, INCIDENTS)}

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["RunFolder"]:
        """Raises SettingError when another process has it, or when it is a folder of something else."""
        run = cls(path)
        if path.exists() and not (path.is_dir() and (run.exists or not any(path.iterdir()))):
            raise SettingError(f"{path} exists and is not a run folder; give --run another name")
        commit.make_folder(path)
        with (path / LOCK).open("a+") as lock:
            left = run._take(lock)
            try:
                with run._logging():
                    if left:
                        log.warning("process %s left %s without a word; its run is taken over", left, path)
                    yield run
            finally:
                lock.truncate(0)

    def _take(self, lock: TextIO) -> str:
        """Lock the folder; returns who had it and never gave it back, if somebody did."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise SettingError(
                f"{self.path} is being trained by process {lock.read().strip()}; wait, or stop it"
            ) from None
        lock.seek(0)
        left = lock.read().strip()
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return left

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RECIPE).is_file() or (self.path / LOCK).is_file()

    def stored_recipe(self) -> Path | None:
        path = self.path / RECIPE
        return path if path.is_file() else None

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole."""
        commit.replace(self.path / name, text)

    def append(self, name: str, record: dict[str, Any]) -> None:
        self.journals[name].append(record)

    def record_incident(self, incident: dict[str, Any]) -> None:
        """Write an incident down so that nothing takes it back."""
        self.append(INCIDENTS, incident)
        with suppress(OSError):  # the next checkpoint has it too
            commit.sync(self.path / INCIDENTS)

    def incidents(self) -> list[dict[str, Any]]:
        """What went wrong so far, oldest first."""
        path = self.path / INCIDENTS
        return whole_records(path) if path.is_file() else []

    def flush(self) -> None:
        """Write what a full disk refused so far. Raises MissingResource where it still does."""
        for journal in self.journals.values():
            try:
                journal.flush()
            except OSError as error:
                raise commit.unwritten(journal.path, error, len(journal.waiting)) from error

    def sync(self) -> None:
        """Make what was written so far survive a power cut. Raises MissingResource where the disk fails."""
        for name in self.journals:
            path = self.path / name
            try:
                if path.is_file():
                    commit.sync(path)
            except OSError as error:
                raise commit.unwritten(path, error, 0) from error

    def rewind(self, step: int, known: list[dict[str, Any]]) -> None:
        """Drop what metrics and samples say of steps after this one: they will be run again.

        What follows a broken line, which only a power cut leaves, is dropped as well. Of incidents all are kept;
        those `known` from the checkpoint take their place where they are more.
        """
        if len(known) > len(self.incidents()):
            self.write(INCIDENTS, "".join(map(as_line, known)))
        for name in self.journals:
            path = self.path / name
            if path.is_file():
                kept = [record for record in whole_records(path) if name == INCIDENTS or record["step"] <= step]
                self.write(name, "".join(as_line(record) for record in kept))
                if name == METRICS and [record["step"] for record in kept] != list(range(1, step + 1)):
                    log.warning("%s does not have every step up to %d", path, step)
            self.journals[name] = Journal(path)

    def record_environment(self, step: int, machine: dict[str, Any]) -> None:
        """Add this start to environment.json, and warn where it cannot repeat the last one to the bit."""
        path = self.path / ENVIRONMENT
        starts = json.loads(path.read_text("utf-8")) if path.is_file() else []
        now = {**machine, "packages": versions(), "commit": revision()}
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
        handler.handleError = lambda record: None  # a full disk is said once, not for every line of the log
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


def as_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, which has no word for what is not a number: null stands for it."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line cut short by a crash is left out."""
    records = whole_records(path)
    if len(records) < path.read_bytes().count(b"\n"):
        raise InvalidFile(f"{path}, line {len(records) + 1} is not a JSON object")
    return records


def whole_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file up to the first line that is none."""
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            records.append({**json.loads(line)})
        except (ValueError, TypeError):
            break
    return records


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: metadata.version(name) for name in PACKAGES}


def revision() -> str | None:
    """The commit smolforge runs from, where it runs from a checkout."""
    here = Path(__file__).parent
    if not (here.parents[1] / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # git itself is not here
        return None
    return found.stdout.strip() or None
