"""Where a run resumes: at the latest valid checkpoint, or before the metrics that went wrong."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from smolforge import atomic
from smolforge.checkpoint import training_state
from smolforge.config import Recipe
from smolforge.data.mixture import PreparedData
from smolforge.errors import InvalidFileError, MissingResourceError, TrainingDivergedError
from smolforge.models.decoder import LanguageModel
from smolforge.runs.context import RunContext
from smolforge.runs.estimate import disk_bytes
from smolforge.runs.initial_model import check_base
from smolforge.runs.reference_logprobs import check_same_reference
from smolforge.runs.resolve import check_resume_step, fixed_settings
from smolforge.training import guard, optim
from smolforge.training.loop import TrainState
from smolforge.training.run_folder import INCIDENTS, RECIPE

log = logging.getLogger("smolforge")


def find_resume_point(context: RunContext) -> tuple[str | None, dict[str, Any]]:
    """Return the latest valid checkpoint, or None, and its metadata (state.json).

    Raises InvalidFileError for a checkpoint of another corpus or recipe.
    """
    newest = newest_checkpoint(context.files.path)
    metadata = training_state.read_metadata(newest) if newest else {}
    if newest:
        check_same_run(newest, metadata, context.dataset, recipe=context.recipe)
        check_base(context.recipe, context.base_fingerprint, newest, metadata=metadata)
        check_same_reference(context.reference_dir, newest, metadata)
    check_resume_step(context.recipe, metadata.get("step", 0))
    return (str(newest) if newest else None), metadata


def newest_checkpoint(folder: Path, before: float = math.inf) -> Path | None:
    """Return the latest valid checkpoint before a step. Raises InvalidFileError where all checkpoints are corrupted."""
    newest = training_state.latest_valid(folder, log.warning, step_filter=lambda step: step < before)
    if newest is None and any(
        training_state.step_from_dir(checkpoint) < before for checkpoint in training_state.list_checkpoints(folder)
    ):
        raise InvalidFileError(f"no checkpoint of {folder} is sound; delete its checkpoints to begin again")
    return newest


def check_same_run(checkpoint: Path, metadata: dict[str, Any], dataset: PreparedData, *, recipe: Recipe) -> None:
    """Raise InvalidFileError for a checkpoint of another corpus or recipe."""
    if metadata["corpus"] != dataset.fingerprint:
        raise InvalidFileError(
            f"{checkpoint} was trained on another corpus than {dataset.folder}; bring that one back, or start anew"
        )
    current, saved = fixed_settings(recipe), metadata.get("recipe", {})
    for name in current.keys() & saved.keys():
        if current[name] != saved[name]:
            raise InvalidFileError(
                f"{RECIPE} has {name} {current[name]!r}, but {checkpoint} was made with {saved[name]!r}; "
                f"put that back into {RECIPE}"
            )


def restore(checkpoint: Path, model: LanguageModel, optimizers: list[torch.optim.Optimizer]) -> TrainState:
    """Load weights, optimizer and random states into place. Raises InvalidFileError where they do not fit the model."""
    tensors, metadata = training_state.load_checkpoint(checkpoint, model)
    optim.load_state_tensors(optimizers, model, tensors)
    optim.swap_ema(optimizers)  # saved as the model, where there is one
    log.info("resumed from %s", checkpoint)
    return TrainState(metadata["step"], metadata["tokens"])


def check_disk(recipe: Recipe, folder: Path) -> None:
    """Raise MissingResourceError where the disk cannot hold the checkpoints of the run."""
    existing = sum(
        path.stat().st_size
        for checkpoint in training_state.list_checkpoints(folder)
        for path in checkpoint.rglob("*")
        if path.is_file()
    )
    needed, free = disk_bytes(recipe) - existing, atomic.free_bytes(folder)
    if needed > free:
        raise MissingResourceError(
            f"the checkpoints of this run need {needed:,} more bytes and {folder} has {free:,} free; "
            "make room, or choose another disk"
        )


def rewind_run(context: RunContext, decisions: guard.Decisions, rewind: guard.Rewind) -> None:
    """Record where the run continues after its metrics went wrong, and quarantine later checkpoints.

    Raises TrainingDivergedError when that was done often enough.
    """
    recipe, files = context.recipe, context.files
    checkpoint = find_rewind_point(files.path, recipe.train.checkpoint_every, rewind.first)
    to = training_state.step_from_dir(checkpoint) if checkpoint else 0
    incident = {"step": rewind.step, "reason": rewind.reason}
    if decisions.rewinds >= recipe.guard.max_rewinds:
        context.record_incident({"kind": "stop", **incident})
        restart = f"with --init-from {checkpoint}" if checkpoint else "from the beginning"
        raise TrainingDivergedError(
            f"the run ends at step {rewind.step}: {rewind.reason}. It was taken back {decisions.rewinds} times before "
            f"({files.path / INCIDENTS}). A lower --optim.learning-rate needs another --run, {restart}; "
            f"--guard.max-rewinds {decisions.rewinds + 3} goes on with this one"
        )
    next_batch = decisions.next_batch(rewind.step - 1) + 1
    # first: a checkpoint of what is taken back must not meet the decision
    training_state.quarantine_later(files.path, to)
    context.record_incident({"kind": "rewind", **incident, "to": to, "next_batch": next_batch})
    skipped = next_batch - decisions.next_batch(to)
    log.warning("step %d: %s; back to step %d, %d batches are skipped", rewind.step, rewind.reason, to, skipped)


def find_rewind_point(folder: Path, every: int | None, first_bad: int) -> Path | None:
    """Return the latest valid checkpoint that an uninterrupted run has too; None for the start of the run."""
    if every is None:
        return None
    checkpoint = training_state.latest_valid(
        folder, log.warning, step_filter=lambda step: step % every == 0 and step < first_bad
    )
    if checkpoint is None and first_bad > every:  # the interval was another before, or they are damaged
        return newest_checkpoint(folder, before=first_bad)
    return checkpoint
