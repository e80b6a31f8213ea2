"""Checkpoints of a run while it trains: snapshot now, write in the background.

save   -> wait for the write before -> copy into memory -> [thread: sync the metrics, write, commit, prune]
poll   -> at every step: did the write fail? then warn, and try again a minute later
finish -> wait; what still fails now is the run's failure
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from smolforge import atomic
from smolforge.checkpoint import training_state
from smolforge.checkpoint.training_state import Snapshot, StagingBuffer
from smolforge.config import Train
from smolforge.errors import MissingResourceError
from smolforge.training.loop import TrainState
from smolforge.training.run_folder import RunFolder

log = logging.getLogger("smolforge")
RETRY_SECONDS = 60
ABANDON_SECONDS = 10
POLL_SECONDS = 0.1

Metrics = Mapping[str, Any]
TakeSnapshot = Callable[[TrainState, Metrics, StagingBuffer | None], Snapshot]


class BackgroundTask:
    """Runs `work` in a daemon thread: a process that ends does not wait for it."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self.work = work
        self.error: BaseException | None = None
        self.ended = threading.Event()  # an interrupted Thread.join marks the thread as ended, before Python 3.13
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def result(self) -> None:
        """Wait for the end. Raises what the work raised."""
        self.ended.wait()
        if self.error is not None:
            raise self.error


class AsyncCheckpointer:
    """Writes the checkpoints of one run, never two at a time."""

    def __init__(
        self,
        settings: Train,
        files: RunFolder,
        take_snapshot: TakeSnapshot,
        *,
        corpus_check: BackgroundTask,
        urgent: Callable[[], bool],
        on_saved: Callable[[int], None] = lambda step: None,
        in_use: Callable[[], Path | None] = lambda: None,
    ) -> None:
        """Checkpoints are written once `corpus_check` has passed, or when `urgent` says that there is no time for it.

        `on_saved` is called with the step of each checkpoint that is on disk. The one that `in_use` returns is not
        deleted.
        """
        self.settings, self.files, self.take_snapshot = settings, files, take_snapshot
        self.corpus_check, self.urgent, self.on_saved, self.in_use = corpus_check, urgent, on_saved, in_use
        self.staging = StagingBuffer() if settings.checkpoint_in_background else None
        self.pending: BackgroundTask | None = None
        self.failure: MissingResourceError | None = None
        self.retry_at = math.inf
        self.last_step = -1
        """Of the last checkpoint that was started."""
        self.abandoned = threading.Event()

    def save(self, state: TrainState, metrics: Metrics) -> None:
        """Start the checkpoint of this moment, unless it was started before."""
        if state.step == self.last_step:
            return
        if self.pending is not None and not self.pending.ended.is_set():
            log.info("the checkpoint before is still being written; training waits for it")
        self.wait()
        self._start(state, metrics)
        if self.staging is None:  # the snapshot holds only until the next step
            self.wait()

    def poll(self) -> bool:
        """Return whether a write that failed should be tried again now.

        Raises InvalidFileError where the corpus turned out to be corrupted.
        """
        if self.corpus_check.ended.is_set():
            self.corpus_check.result()
        if self.pending is not None and self.pending.ended.is_set():
            self.wait()
        return time.monotonic() >= self.retry_at

    def wait(self) -> None:
        """Wait for the pending write. A disk that fails is a warning and tried again; anything else is raised."""
        try:
            self._wait()
        except MissingResourceError as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            log.warning("NOT SAVED: %s. Training goes on and tries again in %d s", error, RETRY_SECONDS)

    def finish(self, state: TrainState, metrics: Metrics) -> None:
        """Wait until the last step is on disk, and try once more where that failed. Raises MissingResourceError."""
        try:
            self._wait()
        except MissingResourceError as error:
            log.warning("NOT SAVED: %s. It is tried once more", error)
        if self.failure is not None or not training_state.checkpoint_dir(self.files.path, state.step).exists():
            self._start(state, metrics)
            self._wait()

    def __enter__(self) -> "AsyncCheckpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the pending write end. After a second Ctrl-C, abandon it as a killed process would."""
        if kind is KeyboardInterrupt:
            self.abandoned.set()
        if self.pending is not None:
            self.pending.ended.wait(ABANDON_SECONDS if kind is KeyboardInterrupt else None)
            if self.pending.error is not None and kind is not KeyboardInterrupt:
                log.warning("NOT SAVED: %s", self.pending.error)

    def _start(self, state: TrainState, metrics: Metrics) -> None:
        self.last_step = state.step
        try:
            self.files.flush()
        except MissingResourceError as error:
            self.pending = BackgroundTask(partial(_raise, error), "checkpoint")
            return
        snapshot = self.take_snapshot(state, metrics, self.staging)
        self.pending = BackgroundTask(partial(self._write, snapshot), "checkpoint")

    def _wait(self) -> None:
        """Raises what the pending write raised."""
        if self.pending is None:
            return
        self.pending.ended.wait()
        task, self.pending = self.pending, None
        self.failure, self.retry_at = None, math.inf
        try:
            task.result()
        except MissingResourceError as error:
            self.failure = error
            raise
        self.on_saved(self.last_step)

    def _write(self, snapshot: Snapshot) -> None:
        """Do the thread's work."""
        while not self.corpus_check.ended.wait(POLL_SECONDS) and not self.urgent():
            self._raise_if_abandoned()
        if self.corpus_check.ended.is_set():
            self.corpus_check.result()
        self.files.sync()  # a checkpoint never has a step whose metrics are lost
        folder = training_state.checkpoint_dir(self.files.path, snapshot.metadata["step"])
        if folder.exists():  # an earlier try failed after all but the last fsync
            atomic.fsync_path(folder.parent)
        else:
            training_state.save_checkpoint(folder, snapshot, self._raise_if_abandoned)
            log.info("saved %s", folder.name)
        try:
            keep_last, keep_best = self.settings.keep_last, self.settings.keep_best
            training_state.prune_checkpoints(self.files.path, keep_last, keep_best, in_use=self.in_use())
        except OSError as error:
            log.warning("older checkpoints could not be deleted: %s", error)

    def _raise_if_abandoned(self) -> None:
        if self.abandoned.is_set():
            raise KeyboardInterrupt


def _raise(error: Exception) -> None:
    raise error
