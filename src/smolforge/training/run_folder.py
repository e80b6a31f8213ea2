"""A run's folder: everything a run writes down about itself.

recipe.toml       the resolved recipe             environment.json  each start: its machine, and how it ended
metrics.jsonl     one object a step               samples.jsonl     text samples
incidents.jsonl   numbers that went wrong, and what was done
run.log           starts, saves, warnings, errors checkpoints/      see checkpoint
tracking.json     its id where trackers keep it   tensorboard/      what TensorBoard shows

Lines of JSON that a run appends as it goes, and reads back.
"""

import fcntl
import itertools
import json
import logging
import math
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.errors import Diverged, InvalidFile, MissingResource, SettingError, Stopped
from smolforge.training.environment import record_end, record_start

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


log = logging.getLogger("smolforge")
RECIPE, METRICS, SAMPLES, INCIDENTS, LOG, LOCK, TRACKING, TENSORBOARD = (
    "recipe.toml",
    "metrics.jsonl",
    "samples.jsonl",
    "incidents.jsonl",
    "run.log",
    ".lock",
    "tracking.json",
    "tensorboard",
)
FINISHED, STOPPED, DIVERGED, FAILED = "finished", "stopped", "diverged", "failed"


class RunFolder:
    """One run on disk; `open` locks it for the one process that writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journals = {name: Journal(path / name) for name in (METRICS, SAMPLES, INCIDENTS)}
        self.started = False

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["RunFolder"]:
        """Raises SettingError when another process has it, or when it is a folder of something else."""
        run = cls(path)
        if path.exists() and not (path.is_dir() and (run.exists or not any(path.iterdir()))):
            raise SettingError(f"{path} exists and is not a run folder; give --run another name")
        atomic.make_folder(path)
        with (path / LOCK).open("ab+", buffering=0) as lock:
            left = run._take(lock)
            atomic.sync(path)  # a log without a lock would be a folder of something else
            try:
                with run._logging():
                    if left:
                        log.warning("process %s left %s without a word; its run is taken over", left, path)
                    yield run
            finally:
                lock.truncate(0)

    def _take(self, lock: RawIOBase) -> str:
        """Lock the folder; returns who had it and never gave it back, if somebody did."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = (lock.read() or b"").decode(errors="replace").strip()
            raise SettingError(f"{self.path} is being trained by process {holder}; wait, or stop it") from None
        lock.seek(0)
        left = (lock.read() or b"").decode(errors="replace").strip()
        lock.truncate(0)
        with suppress(OSError):  # a full disk keeps nobody from the lock, only from saying whose it is
            lock.write(f"{os.getpid()} on {socket.gethostname()}".encode())
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
        atomic.replace(self.path / name, text)

    def append(self, name: str, record: dict[str, Any]) -> None:
        self.journals[name].append(record)

    def record_incident(self, incident: dict[str, Any]) -> None:
        """Write an incident down so that nothing takes it back; what a full disk refuses, the next checkpoint has."""
        self.append(INCIDENTS, incident)
        with suppress(OSError):
            atomic.sync(self.path / INCIDENTS)
            atomic.sync(self.path)

    def incidents(self) -> list[dict[str, Any]]:
        """What went wrong so far, oldest first."""
        return self.journals[INCIDENTS].records()

    def flush(self) -> None:
        """Write what a full disk refused so far. Raises MissingResource where it still does."""
        for journal in self.journals.values():
            try:
                journal.flush()
            except OSError as error:
                raise atomic.unwritten(journal.path, error, len(journal.waiting)) from error

    def sync(self) -> None:
        """Make what was written so far survive a power cut. Raises MissingResource where the disk fails."""
        try:
            events = sorted((self.path / TENSORBOARD).glob("events.*"))[-1:]
            for path in [*(journal.path for journal in self.journals.values()), *events]:
                if path.is_file():
                    atomic.sync(path)
            atomic.sync(self.path)
        except OSError as error:
            raise atomic.unwritten(self.path, error, 0) from error

    def rewind(self, step: int, known: list[dict[str, Any]]) -> None:
        """Drop what metrics and samples say of steps after this one: they will be run again.

        What follows a broken line, which only a power cut leaves, is dropped as well. Of incidents all are kept;
        those `known` from the checkpoint are added where they are more.
        """

        def before(record: dict[str, Any]) -> bool:
            return record.get("step", math.inf) <= step

        self.journals[SAMPLES].cut(before)
        steps = [record["step"] for record in self.journals[METRICS].cut(before)]
        for incident in known[len(self.journals[INCIDENTS].cut(lambda _: True)) :]:
            self.record_incident(incident)
        if steps and steps != list(range(1, step + 1)):
            log.warning("%s does not have every step up to %d", self.path / METRICS, step)

    def record_start(self, step: int, machine: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
        """Write down where and with what the run starts; when it ends, how is added. See `environment.record_start`."""
        added = record_start(self.path, step, machine, seen)
        self.started = True
        return added

    def holder(self) -> str | None:
        """Which process trains into it now, if one does: `1234 on host`."""
        try:
            with (self.path / LOCK).open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return lock.read().decode(errors="replace").strip()
        except OSError:
            pass  # never locked, or not ours to read
        return None

    def _ended(self, error: BaseException | None) -> None:
        if self.started:
            with suppress(MissingResource):  # a full disk has been said
                record_end(self.path, *how_it_ended(error))

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
            self._ended(None)
        except Stopped as stop:
            self._ended(stop)
            log.info("%s", stop)
            raise
        except BaseException as error:
            self._ended(error)
            record = logging.LogRecord("smolforge", logging.ERROR, "", 0, traceback.format_exc(), None, None)
            handler.handle(record)  # for the file alone: people get one sentence
            raise
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            with suppress(OSError):  # what a full disk refused comes up once more
                handler.close()


def how_it_ended(error: BaseException | None) -> tuple[str, str]:
    """The state that what left a run leaves it in, and why."""
    match error:
        case None:
            return FINISHED, ""
        case Stopped():
            state = STOPPED
        case Diverged():
            state = DIVERGED
        case _:
            state = FAILED
    return state, str(error) or type(error).__name__
