"""Multiple choice for each finished run, asked of its last checkpoint and kept: OUT/tasks/RUN.json.

A study that goes on asks no run twice; of a study whose runs have all been asked, no task is looked for.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from smolforge import commit
from smolforge.checkpoint.resolve import load
from smolforge.device import pick_device
from smolforge.errors import SettingError
from smolforge.evaluation.multiple_choice import score, summary
from smolforge.evaluation.tasks import Task, find

Scores = dict[str, dict[str, Any]]
"""By task, as `evaluate` gives them: acc, acc_norm, acc_chars, their standard errors, n, source."""


class Exam:
    """What every run is asked; `words` are names and files, those beside the study's file first."""

    def __init__(self, words: Sequence[str], beside: Path, out: Path) -> None:
        self.words, self.beside, self.folder = tuple(words), beside, out / "tasks"
        self.names = [Path(word).stem for word in words]
        if len(set(self.names)) < len(self.names):
            raise SettingError(f"study.tasks has two that are called the same: {', '.join(words)}")

    @cached_property
    def tasks(self) -> list[Task]:
        """Raises SettingError, InvalidFile or MissingResource for what is no task, or cannot be had."""
        return [find(str(near) if (near := self.beside / word).is_file() else word) for word in self.words]

    def prepare(self, runs: Sequence[str]) -> None:
        """Find the tasks, before the first run, where one of these is still to be asked."""
        if any(self.known(run) is None for run in runs):
            assert len(self.tasks) == len(self.words)

    def known(self, run: str) -> Scores | None:
        """What a run was found to score; None where it was not asked."""
        try:
            stored = json.loads((self.folder / f"{run}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(stored, Mapping) and all(isinstance(stored.get(name), dict) for name in self.names)
        return {name: stored[name] for name in self.names} if whole else None

    def of(self, run: str, folder: Path, device: str) -> Scores:
        """Its scores, asked in fp32 as `evaluate` does. Raises InvalidFile for an item longer than its context."""
        if not self.words:
            return {}
        if (before := self.known(run)) is not None:
            return before
        model = load(folder, device=str(pick_device(device)))
        found = {task.name: summary(score(model, task.items)) | {"source": task.source} for task in self.tasks}
        commit.make_folder(self.folder)
        commit.replace(self.folder / f"{run}.json", json.dumps(found, indent=2) + "\n")
        return found
