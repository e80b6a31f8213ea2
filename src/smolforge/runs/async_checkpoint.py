"""Checkpoints of a run as it goes: a copy of the moment now, its writing beside the training.

save -> wait for the write before -> copy into memory -> [thread: sync the metrics, write, commit, retain]
look -> at every step: did it fail? then say so, and try again a while later
finish -> wait; what still fails now is the run's failure
"""

import logging
import math
import threading
import time
from collections.abc import Callable

from smolforge import atomic
from smolforge.checkpoint import training_state
from smolforge.config import Train
from smolforge.errors import MissingResource
from smolforge.training.run_folder import RunFolder

log = logging.getLogger("smolforge")
RETRY_SECONDS = 60
ABANDON_SECONDS = 10
LOOK_SECONDS = 0.1

Take = Callable[[training_state.Staging | None], training_state.Snapshot]


class Background:
    """One piece of work in a thread of its own, which a process that ends does not wait for."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self.work = work
        self.error: BaseException | None = None
        self.ended = threading.Event()  # an interrupted Thread.join takes the thread for ended, before Python 3.13
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


class Saving:
    """Writes the checkpoints of one run, never two at a time."""

    def __init__(
        self,
        settings: Train,
        files: RunFolder,
        reading: Background,
        hurried: Callable[[], bool],
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`reading` is the check of the corpus: what was learned from it is saved when it has passed.

        `hurried` says that there is no time to wait for that; `saved` hears of each checkpoint that is safe.
        """
        self.settings, self.files, self.reading, self.hurried = settings, files, reading, hurried
        self.saved = saved
        self.staging = training_state.Staging() if settings.checkpoint_in_background else None
        self.writing: Background | None = None
        self.failure: MissingResource | None = None
        self.retry_at = math.inf
        self.tried = -1
        self.abandoned = threading.Event()

    def save(self, step: int, take: Take) -> None:
        """Begin the checkpoint of this moment, if that was not done already."""
        if step == self.tried:
            return
        if self.writing is not None and not self.writing.ended.is_set():
            log.info("the checkpoint before is still being written; training waits for it")
        self.settle()
        self._begin(step, take)
        if self.staging is None:  # the moment passes with the next step
            self.settle()

    def look(self) -> bool:
        """Hear how the last write ended; whether one that failed should be tried again now.

        Raises InvalidFile where the corpus turned out to be damaged.
        """
        if self.reading.ended.is_set():
            self.reading.result()
        if self.writing is not None and self.writing.ended.is_set():
            self.settle()
        return time.monotonic() >= self.retry_at

    def settle(self) -> None:
        """Wait for the write under way. What the disk did is said aloud and tried again, anything else is raised."""
        try:
            self._wait()
        except MissingResource as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            log.warning("NOT SAVED: %s. Training goes on and tries again in %d s", error, RETRY_SECONDS)

    def finish(self, step: int, take: Take) -> None:
        """Wait until the last step is saved, and try once more where that failed. Raises MissingResource."""
        try:
            self._wait()
        except MissingResource as error:
            log.warning("NOT SAVED: %s. It is tried once more", error)
        if self.failure is not None or not training_state.folder_of(self.files.path, step).exists():
            self._begin(step, take)
            self._wait()

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let a write under way end; where a person is in a hurry, leave it as a killed process would."""
        if kind is KeyboardInterrupt:
            self.abandoned.set()
        if self.writing is not None:
            self.writing.ended.wait(ABANDON_SECONDS if kind is KeyboardInterrupt else None)
            if self.writing.error is not None and kind is not KeyboardInterrupt:
                log.warning("NOT SAVED: %s", self.writing.error)

    def _begin(self, step: int, take: Take) -> None:
        self.tried = step
        try:
            self.files.flush()
        except MissingResource as error:
            failed = error
            self.writing = Background(lambda: _raise(failed), "checkpoint")
            return
        moment = take(self.staging)
        self.writing = Background(lambda: self._write(moment), "checkpoint")

    def _wait(self) -> None:
        """Raises what the write under way raised."""
        if self.writing is None:
            return
        self.writing.ended.wait()
        writing, self.writing = self.writing, None
        self.failure, self.retry_at = None, math.inf
        try:
            writing.result()
        except MissingResource as error:
            self.failure = error
            raise
        self.saved(self.tried)

    def _write(self, moment: training_state.Snapshot) -> None:
        """The thread's work."""
        while not self.reading.ended.wait(LOOK_SECONDS) and not self.hurried():
            self._going_on()
        if self.reading.ended.is_set():
            self.reading.result()
        self.files.sync()  # a checkpoint never has a step whose metrics are lost
        folder = training_state.folder_of(self.files.path, moment.facts["step"])
        if folder.exists():  # an earlier try failed when all but the last sync was done
            atomic.sync(folder.parent)
        else:
            training_state.save(folder, moment, self._going_on)
            log.info("saved %s", folder.name)
        try:
            training_state.retain(self.files.path, self.settings.keep_last, self.settings.keep_best)
        except OSError as error:
            log.warning("older checkpoints could not be deleted: %s", error)

    def _going_on(self) -> None:
        if self.abandoned.is_set():
            raise KeyboardInterrupt


def _raise(error: Exception) -> None:
    raise error
