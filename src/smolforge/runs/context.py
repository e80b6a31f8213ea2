"""What all parts of a run share: its recipe, folder, data, trackers and ranks, and who listens to its progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smolforge.checkpoint import training_state
from smolforge.config import Recipe
from smolforge.data.mixture import PreparedData
from smolforge.evaluation.tasks import Task
from smolforge.runs.async_checkpoint import BackgroundTask
from smolforge.runs.estimate import RunEstimate
from smolforge.runs.mirror import Mirror
from smolforge.tracking import Incident, Saved, Trackers
from smolforge.training.distributed import RankGroup
from smolforge.training.loop import TrainState
from smolforge.training.run_folder import RunFolder
from smolforge.training.signals import StopRequest


class ProgressListener:
    """Receives what a run reports while it goes; a class that inherits from it ignores what it does not define."""

    def on_plan(self, recipe: Recipe, estimate: RunEstimate, start: TrainState) -> None:
        """The recipe is resolved, and the run is about to start after a step."""

    def on_prepare(self, counts: dict[str, int], source: str = "") -> None:
        """So many documents, bytes and tokens are prepared, of one source of a mixture."""

    def on_reference(self, pairs: int, total: int) -> None:
        """The reference model of DPO has read so many pairs."""

    def on_restored(self, step: int, mirror: Path) -> None:
        """A checkpoint was copied back from the run's mirror."""

    def on_mirror(self, step: int, bytes_moved: int) -> None:
        """The run waits until its last step is in its mirror."""

    def on_step(self, metrics: dict[str, Any]) -> None:
        """A step is done."""

    def on_sample(self, text: str) -> None:
        """A text was drawn."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What all attempts of one start of a run share, as one of its ranks has it."""

    recipe: Recipe
    files: RunFolder
    """Written and locked by rank 0 alone."""
    dataset: PreparedData
    tasks: Sequence[Task]
    """Scored beside the validation split, on rank 0."""
    base_fingerprint: str | None
    """Of the model that LoRA or DPO needs as long as the run goes."""
    reference_dir: Path | None
    """Where the reference model's log-probabilities of the pairs are, or will be."""
    corpus_check: BackgroundTask
    """The check of the corpus' hashes, done by rank 0."""
    listener: ProgressListener
    trackers: Trackers
    stop: StopRequest
    ranks: RankGroup
    device: torch.device
    mirror: Mirror | None = None
    """On rank 0, where the recipe names one."""
    profile_steps: int | None = None
    """Steps to profile, on rank 0."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """What else may explain how fast the run goes, for environment.json."""

    def record_incident(self, incident: dict[str, Any]) -> None:
        """Write to disk that metrics went wrong, and report it to the trackers."""
        self.files.record_incident(incident)
        self.trackers(Incident(incident))

    def report_saved(self, step: int) -> None:
        """Report to the trackers and the mirror that a checkpoint is on disk."""
        if self.mirror is not None:
            self.mirror.offer(step)
        self.trackers(Saved(step, training_state.checkpoint_dir(self.files.path, step)))
