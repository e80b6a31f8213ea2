"""The mirror of a run (train.mirror): what a start restores from it, and the thread that copies checkpoints to it.

start  -> whose mirror is it? -> restore its newest checkpoint, where the run's folder has none as new
saved  -> offer -> [thread: copy the newest that was offered; what was overtaken is left out]
finish -> wait for the copy of the last one, as long as bytes move

Training, saving and pruning never wait for it. A mirror that fails is a warning, and tried again with each checkpoint.
"""

import json
import logging
import secrets
import shutil
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.checkpoint import training_state
from smolforge.config import Recipe, Train
from smolforge.config.base import NONE
from smolforge.config.load import read_recipe, to_recipe
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.runs.async_checkpoint import BackgroundTask
from smolforge.runs.mirror_folder import CHECKPOINTS, COPIED, JOURNALS, MIRROR, MirrorFolder
from smolforge.training import run_folder
from smolforge.training.run_folder import RECIPE, RunFolder
from smolforge.training.signals import StopRequest

log = logging.getLogger("smolforge")
SETTING = "train.mirror"
STALL_SECONDS = 120.0
"""How long a mirror may stand still before nobody waits for it any more."""
STALL_SECONDS_WHEN_STOPPED = 20.0
"""The same once a signal said that there is little time."""
POLL_SECONDS = 0.1
Report = Callable[[int, int], None]
"""Called with a step that is being copied, and the bytes that were read and written so far."""
FAILURES = (OSError, ConfigError, InvalidFileError, MissingResourceError)


# Start


def mirror_path(recipe: str | Path, run: Path, overrides: Mapping[str, Any]) -> Path | None:
    """Return the mirror that a start asks for: by an override, or the run's stored recipe, or the recipe's file.

    Raises ConfigError for one inside the run's folder, or around it.
    """
    stored = run / RECIPE
    value = overrides.get(SETTING, read_recipe(stored if stored.is_file() else recipe, {}).train.mirror)
    if value is None or value == NONE:
        return None
    path, folder = Path(value).expanduser().absolute(), run.absolute()
    if path.is_relative_to(folder) or folder.is_relative_to(path):
        raise ConfigError(f"{SETTING} is {path}, and the run is in {folder}; neither may be inside the other")
    return path


@dataclass(frozen=True)
class Mirrored:
    """A mirror that was reached."""

    folder: MirrorFolder
    run_id: str | None
    """Of the run that is mirrored, if one is."""
    recipe: Recipe | None
    """Of that run."""


def find_mirror(path: Path, run: Path) -> Mirrored | None:
    """Return the mirror at a path; None where a run of this folder goes on without it.

    Raises ConfigError for the mirror of another run, and MissingResourceError where a run would begin again since its
    mirror cannot be reached.
    """
    folder, identity, exists = MirrorFolder(path), read_identity(run), (run / RECIPE).is_file()
    known, mirrored = identity.get("path") == str(path), list[Mirrored]()

    def attach() -> None:
        run_id = folder.attach(identity.get("run", "" if exists else None), known=known)
        journals = folder.newest_journals()
        recipe = to_recipe(tomllib.loads((journals / RECIPE).read_text("utf-8"))) if journals else None
        mirrored.append(Mirrored(folder, run_id, recipe))

    try:
        run_patiently(attach, folder)
    except (OSError, InvalidFileError, MissingResourceError) as error:
        if exists and training_state.list_checkpoints(run):
            log.warning("the mirror %s cannot be reached (%s); the run goes on without it", path, reason_of(error))
            return None
        raise MissingResourceError(
            f"the mirror {path} cannot be reached ({reason_of(error)}), and a run that is there would begin again; "
            f"mount its disk, create {path.parent}, or choose another --{SETTING}"
        ) from error
    return mirrored[0]


def restore_newer(mirrored: Mirrored, run: Path, report: Callable[[int, Path], None]) -> None:
    """Copy the newest valid checkpoint of a mirror into a run's folder that has none as new.

    `report` is called with its step and where it came from.
    """
    folder, run_id = mirrored.folder, mirrored.run_id
    if run_id is None:
        return
    with RunFolder.open(run) as files:
        newest = training_state.latest_valid(run, lambda _: None)
        after = training_state.step_from_dir(newest) if newest else 0
        restored: list[int | None] = []
        try:
            run_patiently(lambda: restored.append(folder.restore(run, after, files.incidents())), folder)
        except (OSError, InvalidFileError, MissingResourceError) as error:
            reason = f"nothing could be restored from the mirror {folder.path}: {reason_of(error)}"
            if newest is None and isinstance(error, InvalidFileError):
                raise
            if newest is None:
                raise MissingResourceError(reason) from error
            log.warning(reason)
            return
        write_identity(files, run_id, folder.path)
        if restored[0] is not None:
            log.info("restored step %d from %s", restored[0], folder.path)
            report(restored[0], folder.path)


def run_patiently(work: Callable[[], object], folder: MirrorFolder) -> None:
    """Do work with a mirror in a thread. Raises what it raises, and MissingResourceError where the mirror hangs."""
    task = BackgroundTask(work, "mirror")
    if not moves_until_end(task, folder, lambda: STALL_SECONDS):
        raise MissingResourceError(f"{folder.path} has not answered for {STALL_SECONDS:g} s")
    task.result()


def moves_until_end(task: BackgroundTask, folder: MirrorFolder, patience: Callable[[], float]) -> bool:
    """Wait for work with a mirror. Returns False once no byte was read or written for `patience()` seconds."""
    moved, since = folder.bytes_moved, time.monotonic()
    while not task.ended.wait(POLL_SECONDS):
        if folder.bytes_moved != moved:
            moved, since = folder.bytes_moved, time.monotonic()
        if time.monotonic() - since > patience():
            return False
    return True


def read_identity(run: Path) -> dict[str, str]:
    """Return a run's id and the path of its mirror, as far as they are known."""
    try:
        return {**json.loads((run / MIRROR).read_text("utf-8"))}
    except (OSError, ValueError, TypeError):
        return {}


def write_identity(files: RunFolder, run_id: str, path: Path | None = None) -> None:
    """Write a run's id, and the path of its mirror once that is known to be one."""
    identity = {"run": run_id} | ({"path": str(path)} if path else {})
    if identity != read_identity(files.path):
        files.write(MIRROR, json.dumps(identity) + "\n")


# While the run goes on


class Mirror:
    """Copies the checkpoints of one run to its mirror, one at a time, in a thread that nothing else waits for."""

    def __init__(self, path: Path, files: RunFolder, settings: Train) -> None:
        self.folder, self.files, self.settings = MirrorFolder(path), files, settings
        identity = read_identity(files.path)
        self.run_id = identity.get("run") or secrets.token_hex(16)
        self.known = identity.get("path") == str(path)
        """Whether the mirror was there before: if it is gone, its disk is."""
        self.attached = False
        """Whether this process has reached it."""
        self.lock = threading.Lock()
        """Held while the next three are read or set, never while a file is."""
        self.wanted: int | None = None
        """The step that was offered last."""
        self.tried: int | None = None
        self.task: BackgroundTask | None = None
        self.copying: Path | None = None
        """The checkpoint that is being copied, which must not be deleted."""
        self.step: int | None = None
        """The last step that this process has copied, or seen there whole."""
        self.failure = ""
        """Why the last try failed."""

    def offer(self, step: int) -> BackgroundTask:
        """Let the thread copy the checkpoint of a step, which is on disk; of step 0, the journals alone."""
        with self.lock:
            if self.task is not None and self.task.ended.is_set():
                self.task.result()  # a fault of ours, which is no mirror's
            self.wanted, self.tried = step, None
            if self.task is None:
                self.task = BackgroundTask(self._copy_offered, "mirror")
            return self.task

    def finish(self, step: int, stop: StopRequest, report: Report) -> None:
        """Wait until a step is in the mirror: as long as bytes move, and until Ctrl-C. What fails is tried once more.

        Raises MissingResourceError where it is not in the mirror then.
        """
        task = self.task or self.offer(step)
        reason = self._wait(task, step, stop, report=report)
        if self.step != step and not reason:
            reason = self._wait(self.offer(step), step, stop, report=report)
        if self.step != step:
            present = f"has step {self.step:,}" if self.step else "has none of this start's steps"
            raise MissingResourceError(
                f"step {step:,} is saved in {self.files.path}, but its mirror {self.folder.path} {present} "
                f"({reason or self.failure}); the same command again completes it"
            )

    def _wait(self, task: BackgroundTask, step: int, stop: StopRequest, *, report: Report) -> str:
        """Wait for the thread. Returns why it is not waited for any more, or an empty text."""
        before = stop.received

        def patience() -> float:
            if before is None and stop.received is signal.SIGINT:
                raise KeyboardInterrupt  # later ones are raised by the handler
            report(step, self.folder.bytes_moved)
            return STALL_SECONDS_WHEN_STOPPED if stop.is_set() else STALL_SECONDS

        try:
            if moves_until_end(task, self.folder, patience):
                task.result()
                return ""
        except KeyboardInterrupt:
            return "the copy was interrupted"
        return f"it has not answered for {patience():g} s"

    def _copy_offered(self) -> None:
        """Do the thread's work."""
        while True:
            with self.lock:
                if self.wanted is None or self.tried == self.wanted:
                    self.task = None
                    return
                self.tried = step = self.wanted
            self.copying = training_state.checkpoint_dir(self.files.path, step)
            try:
                self._copy(step)
            except FAILURES as error:
                if not step or self.copying.exists():  # and was not rolled back in the meantime
                    self._on_failure(step, reason_of(error))
            else:
                self._on_success(step)
            self.copying = None

    def _on_failure(self, step: int, reason: str) -> None:
        if not self.failure:
            log.warning(
                "NOT MIRRORED: step %d is not in %s: %s. Training goes on, and tries again with each checkpoint",
                step, self.folder.path, reason,
            )  # fmt: skip
        self.failure = reason

    def _on_success(self, step: int) -> None:
        if self.failure:
            log.warning("the mirror %s works again; it has step %d", self.folder.path, step)
        self.failure, self.step = "", step
        log.info("mirrored step %d to %s", step, self.folder.path)

    def _copy(self, step: int) -> None:
        """Copy the journals, which must have every step of a checkpoint, then the checkpoint, and delete older ones."""
        self.folder.attach(self.run_id, known=self.known)
        if not self.attached:
            self.folder.remove_unfinished()
            write_identity(self.files, self.run_id, self.folder.path if self.known else None)
            self.attached = True
        journals = self._collect_journals(step)
        self.folder.put(journals, JOURNALS)
        if not self.known:
            write_identity(self.files, self.run_id, self.folder.path)
            self.known = True
        if step:
            self.folder.put(training_state.checkpoint_dir(self.files.path, step), CHECKPOINTS)
        self.folder.publish(journals)
        shutil.rmtree(journals.parent)
        try:
            settings, incidents = self.settings, self.files.incidents()
            self.folder.prune(settings.keep_last, settings.keep_best, incidents=incidents)
        except OSError as error:
            log.info("older checkpoints of the mirror could not be deleted: %s", error)

    def _collect_journals(self, step: int) -> Path:
        """Write a folder with the run's recipe and journals as they are now, and a manifest that names the run."""
        folder = self.files.path / ".mirrored" / training_state.checkpoint_dir(self.files.path, step).name

        def fill(temporary: Path) -> None:
            for path in (self.files.path / name for name in COPIED):
                if path.is_file():
                    content = path.read_bytes()
                    whole = content[: content.rfind(b"\n") + 1] if path.name in run_folder.JOURNALS else content
                    (temporary / path.name).write_bytes(whole)

        shutil.rmtree(folder.parent, ignore_errors=True)
        atomic.write_dir_atomic(folder, fill, {"run": self.run_id, "step": step})
        return folder


def reason_of(error: Exception) -> str:
    """Return an error in words, with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return str(error)
