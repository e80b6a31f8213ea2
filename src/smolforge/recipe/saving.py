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

from smolforge.checkpoint import state
from smolforge.config import Train
from smolforge.errors import MissingResource
from smolforge.runs import RunFolder

log = logging.getLogger("smolforge")
RETRY_SECONDS = 60
ABANDON_SECONDS = 2

Take = Callable[[state.Staging | None], state.Snapshot]


class Background:
    """One piece of work in a thread of its own, for which no process waits when it ends."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self.work = work
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def result(self) -> None:
        """Wait for the end. Raises what the work raised."""
        self.thread.join()
        if self.error is not None:
            raise self.error


class Saving:
    """Writes the checkpoints of one run, never two at a time."""

    def __init__(self, settings: Train, files: RunFolder, reading: Background) -> None:
        """`reading` is the check of the corpus: nothing learned from it is saved before it has passed."""
        self.settings, self.files, self.reading = settings, files, reading
        self.staging = state.Staging() if settings.checkpoint_in_background else None
        self.writing: Background | None = None
        self.failure: MissingResource | None = None
        self.retry_at = math.inf
        self.abandoned = threading.Event()

    def save(self, take: Take) -> None:
        """Begin the checkpoint of this moment."""
        if self.writing is not None and not self.writing.done:
            log.info("the checkpoint before is still being written; training waits for it")
        self.settle()
        try:
            self.files.flush()
        except MissingResource as error:
            self._failed(error)
            return
        moment = take(self.staging)
        self.writing = Background(lambda: self._write(moment), "checkpoint")
        if self.staging is None:  # the moment passes with the next step
            self.settle()

    def look(self) -> bool:
        """Hear how the last write ended; whether one that failed should be tried again now.

        Raises InvalidFile where the corpus turned out to be damaged.
        """
        if self.reading.done:
            self.reading.result()
        if self.writing is not None and self.writing.done:
            self.settle()
        return time.monotonic() >= self.retry_at

    def settle(self) -> None:
        """Wait for the write under way. What the disk did is said aloud and tried again, anything else is raised."""
        if self.writing is None:
            return
        self.writing.thread.join()
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except MissingResource as error:
            self._failed(error)
        else:
            self.failure, self.retry_at = None, math.inf

    def _failed(self, error: MissingResource) -> None:
        self.failure, self.retry_at = error, time.monotonic() + RETRY_SECONDS
        log.warning("NOT SAVED: %s. Training goes on and tries again in %d s", error, RETRY_SECONDS)

    def finish(self, step: int, take: Take) -> None:
        """Wait until the last step is saved, and try once more where that failed. Raises MissingResource."""
        self.settle()
        if not state.folder_of(self.files.path, step).exists():
            self.save(take)
            self.settle()
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let a write under way end; where a person is in a hurry, leave it as a killed process would."""
        if self.writing is not None:
            if kind is KeyboardInterrupt:
                self.abandoned.set()
            self.writing.thread.join(ABANDON_SECONDS if kind is KeyboardInterrupt else None)

    def _write(self, moment: state.Snapshot) -> None:
        self.reading.result()
        self.files.sync()  # a checkpoint never has a step whose metrics are lost
        folder = state.folder_of(self.files.path, moment.facts["step"])
        if not folder.exists():
            state.save(folder, moment, self._going_on)
            log.info("saved %s", folder.name)
        try:
            state.retain(self.files.path, self.settings.keep_last, self.settings.keep_best)
        except OSError as error:
            log.warning("older checkpoints could not be deleted: %s", error)

    def _going_on(self) -> None:
        if self.abandoned.is_set():
            raise KeyboardInterrupt
