"""A run's folder: everything a run writes about itself.

recipe.toml       the resolved recipe             environment.json  each start: its machine, and how it ended
metrics.jsonl     one object per step             samples.jsonl     text samples
incidents.jsonl   metrics that went wrong, and what was done
run.log           starts, saves, warnings, errors checkpoints/      see checkpoint
tracking.json     its id in trackers              tensorboard/      TensorBoard's events

The .jsonl files are journals: they grow by whole lines and are read back on resume.
"""

import itertools
import json
import logging
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from smolforge import atomic
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, Stopped, TrainingDivergedError
from smolforge.operating_system import max_path_length
from smolforge.training.environment import record_end, record_start

log = logging.getLogger("smolforge")
RECIPE, LOG, LOCK, TRACKING, TENSORBOARD = "recipe.toml", "run.log", ".lock", "tracking.json", "tensorboard"
METRICS, SAMPLES, INCIDENTS = JOURNALS = "metrics.jsonl", "samples.jsonl", "incidents.jsonl"
LONGEST_NAME = "checkpoints/.tmp-removed-step-00000000/training/optimizer.safetensors"
"""Of all that a run writes."""
FINISHED, STOPPED, DIVERGED, FAILED = "finished", "stopped", "diverged", "failed"


class Journal:
    """A .jsonl file that grows by whole lines. What a full disk refuses waits, and is written with the next line."""

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
        """Write what waits. Raises OSError where that fails; the next try first removes half a line."""
        if not self.waiting:
            return
        with self.path.open("ab") as file:
            if file.tell() != self.bytes:
                file.truncate(self.bytes)
            file.write(self.waiting)
        self.bytes += len(self.waiting)
        self.waiting = b""

    def records(self) -> list[dict[str, Any]]:
        """Return all complete records, waiting ones included."""
        return whole_records(self._content())

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Remove everything from the first record that is broken or not to `keep`; this needs no disk space.

        Returns the records that are left.
        """
        content = self._content()
        records = list(itertools.takewhile(keep, whole_records(content)))
        kept_bytes = sum(len(line) + 1 for line, _ in zip(content.split(b"\n"), records, strict=False))
        self.waiting = content[self.bytes : kept_bytes]
        if kept_bytes < self.bytes:
            with self.path.open("rb+") as file:
                file.truncate(kept_bytes)
            self.bytes = kept_bytes
        return records

    def _content(self) -> bytes:
        written = self.path.read_bytes()[: self.bytes] if self.bytes else b""
        return written + self.waiting


def as_line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON; a number that is not finite becomes null."""
    return json.dumps(to_jsonable_python(record, inf_nan_mode="null"), ensure_ascii=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file, without a last line cut short by a crash.

    Raises InvalidFileError for another line that is not an object.
    """
    content = path.read_bytes()
    records = whole_records(content)
    if len(records) < content.count(b"\n"):
        raise InvalidFileError(f"{path}, line {len(records) + 1} is not a JSON object")
    return records


def whole_records(content: bytes) -> list[dict[str, Any]]:
    """Return the objects of lines of JSON, up to the first line that is not one."""
    records = []
    for line in content.split(b"\n")[:-1]:
        try:
            records.append({**json.loads(line)})
        except (ValueError, TypeError):
            break
    return records


class RunFolder:
    """One run on disk; `open` locks it for the one process that writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journals = {name: Journal(path / name) for name in JOURNALS}
        self.started = False

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["RunFolder"]:
        """Lock the folder. Raises ConfigError when another process has it, or when it is not a run's."""
        run = cls(path)
        if path.exists() and not (path.is_dir() and (run.exists or not any(path.iterdir()))):
            raise ConfigError(f"{path} exists and is not a run folder; give --run another name")
        length, limit = len(str((path / LONGEST_NAME).absolute())), max_path_length()
        if length > limit:
            raise ConfigError(
                f"{path} is too long: a file of this run would have a path of {length:,} characters, and {limit:,} are "
                "allowed here; choose a shorter --run"
            )
        atomic.make_dir_durable(path)
        refusal = "{} is being trained by process {}; wait, or stop it".format
        with atomic.lock_file(path / LOCK, partial(refusal, path)) as left:
            atomic.fsync_path(path)  # a log without a lock would be a folder of something else
            with run._logging():
                if left:
                    log.warning("process %s left %s without a word; its run is taken over", left, path)
                yield run

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / RECIPE).is_file() or (self.path / LOCK).is_file()

    def stored_recipe(self) -> Path | None:
        path = self.path / RECIPE
        return path if path.is_file() else None

    def write(self, name: str, text: str) -> None:
        """Replace a file atomically."""
        atomic.write_text_atomic(self.path / name, text)

    def append(self, name: str, record: dict[str, Any]) -> None:
        self.journals[name].append(record)

    def record_incident(self, incident: dict[str, Any]) -> None:
        """Write an incident to disk for good; what a full disk refuses, the next checkpoint has."""
        self.append(INCIDENTS, incident)
        with suppress(OSError):
            atomic.fsync_path(self.path / INCIDENTS)
            atomic.fsync_path(self.path)

    def incidents(self) -> list[dict[str, Any]]:
        """Return the incidents so far, oldest first."""
        return self.journals[INCIDENTS].records()

    def flush(self) -> None:
        """Write what a full disk refused so far. Raises MissingResourceError where it still does."""
        for journal in self.journals.values():
            try:
                journal.flush()
            except OSError as error:
                raise atomic.write_error(journal.path, error, len(journal.waiting)) from error

    def sync(self) -> None:
        """Make what was written so far survive a power cut. Raises MissingResourceError where the disk fails."""
        try:
            events = sorted((self.path / TENSORBOARD).glob("events.*"))[-1:]
            for path in [*(journal.path for journal in self.journals.values()), *events]:
                if path.is_file():
                    atomic.fsync_path(path)
            atomic.fsync_path(self.path)
        except OSError as error:
            raise atomic.write_error(self.path, error, 0) from error

    def rewind(self, step: int, incidents: list[dict[str, Any]]) -> None:
        """Remove metrics and samples of steps after this one: they will be run again.

        What follows a broken line, which only a power cut leaves, is removed as well. All incidents are kept; those of
        the checkpoint, `incidents`, are added where they are more.
        """

        def before(record: dict[str, Any]) -> bool:
            return record.get("step", math.inf) <= step

        self.journals[SAMPLES].cut(before)
        steps = [record["step"] for record in self.journals[METRICS].cut(before)]
        for incident in incidents[len(self.journals[INCIDENTS].cut(lambda _: True)) :]:
            self.record_incident(incident)
        if steps and steps != list(range(1, step + 1)):
            log.warning("%s does not have every step up to %d", self.path / METRICS, step)

    def record_start(self, step: int, machine: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
        """Record the step and machine of this start; how it ends is added later. See `environment.record_start`."""
        entry = record_start(self.path, step, machine, environment=environment)
        self.started = True
        return entry

    def lock_holder(self) -> str | None:
        """Return the process that trains into the folder now, if one does: `1234 on host`."""
        return atomic.lock_holder(self.path / LOCK)

    def _ended(self, error: BaseException | None) -> None:
        if self.started:
            with suppress(MissingResourceError):  # a full disk has been said
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
    """Return the state in which an error, or None, leaves a run, and the reason."""
    match error:
        case None:
            return FINISHED, ""
        case Stopped():
            state = STOPPED
        case TrainingDivergedError():
            state = DIVERGED
        case _:
            state = FAILED
    return state, str(error) or type(error).__name__
