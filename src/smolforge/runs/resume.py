"""Where a run stands: the newest sound checkpoint, and where it goes back to when its numbers went wrong."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from smolforge import atomic
from smolforge.checkpoint import training_state
from smolforge.config import Recipe
from smolforge.data.mixture import Prepared
from smolforge.errors import Diverged, InvalidFile, MissingResource
from smolforge.models.decoder import LanguageModel
from smolforge.runs.callbacks import Start
from smolforge.runs.estimate import disk_bytes
from smolforge.runs.initial_model import check_base
from smolforge.runs.reference_logprobs import check_same_reference
from smolforge.runs.resolve import check_going_on, fixed_settings
from smolforge.training import guard, optim
from smolforge.training.loop import State
from smolforge.training.run_folder import INCIDENTS, RECIPE

log = logging.getLogger("smolforge")


def standing(start: Start) -> tuple[str | None, dict[str, Any]]:
    """The newest sound checkpoint, if there is one, and what its state.json says.

    Raises InvalidFile for a checkpoint made from another corpus or by another recipe.
    """
    newest = newest_checkpoint(start.files.path)
    facts = training_state.read_facts(newest) if newest else {}
    if newest:
        check_same_run(newest, facts, start.text, start.recipe)
        check_base(start.recipe, start.base, newest, facts)
        check_same_reference(start.reference, newest, facts)
    check_going_on(start.recipe, facts.get("step", 0))
    return (str(newest) if newest else None), facts


def newest_checkpoint(folder: Path, before: float = math.inf) -> Path | None:
    """Where to go on from. Raises InvalidFile where there are checkpoints and all are damaged."""
    newest = training_state.newest_sound(folder, log.warning, wanted=lambda step: step < before)
    if newest is None and any(training_state.step_of(each) < before for each in training_state.all_of(folder)):
        raise InvalidFile(f"no checkpoint of {folder} is sound; delete its checkpoints to begin again")
    return newest


def check_same_run(checkpoint: Path, facts: dict[str, Any], text: Prepared, recipe: Recipe) -> None:
    """Raises InvalidFile for a checkpoint made from another corpus or by another recipe."""
    if facts["corpus"] != text.fingerprint:
        raise InvalidFile(
            f"{checkpoint} was trained on another corpus than {text.folder}; bring that one back, or start anew"
        )
    now, then = fixed_settings(recipe), facts.get("recipe", {})
    for name in now.keys() & then.keys():
        if now[name] != then[name]:
            raise InvalidFile(
                f"{RECIPE} has {name} {now[name]!r}, but {checkpoint} was made with {then[name]!r}; "
                f"put that back into {RECIPE}"
            )


def restore(checkpoint: Path, model: LanguageModel, optimizers: list[torch.optim.Optimizer]) -> State:
    """Weights, moments, random states, and place. Raises InvalidFile where they do not fit the model."""
    tensors, facts = training_state.load(checkpoint, model)
    optim.load_state_tensors(optimizers, model, tensors)
    optim.swap_average(optimizers)  # saved as the model, where there is one
    log.info("resumed from %s", checkpoint)
    return State(facts["step"], facts["tokens"])


def check_disk(recipe: Recipe, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold."""
    have = sum(
        path.stat().st_size for kept in training_state.all_of(folder) for path in kept.rglob("*") if path.is_file()
    )
    needed, free = disk_bytes(recipe) - have, atomic.free_bytes(folder)
    if needed > free:
        raise MissingResource(
            f"the checkpoints of this run need {needed:,} more bytes and {folder} has {free:,} free; "
            "make room, or choose another disk"
        )


def take_back(start: Start, decisions: guard.Decisions, wrong: guard.Rewind) -> None:
    """Write down where the run goes on after numbers went wrong. Raises Diverged when that was done often enough."""
    recipe, files = start.recipe, start.files
    place = place_to_go_back_to(files.path, recipe.train.checkpoint_every, wrong.first)
    to = training_state.step_of(place) if place else 0
    incident = {"step": wrong.step, "reason": wrong.reason}
    if decisions.rewinds >= recipe.guard.max_rewinds:
        start.record({"kind": "stop", **incident})
        sound = f"with --init-from {place}" if place else "from the beginning"
        raise Diverged(
            f"the run ends at step {wrong.step}: {wrong.reason}. It was taken back {decisions.rewinds} times before "
            f"({files.path / INCIDENTS}). A lower --optim.learning-rate needs another --run, {sound}; "
            f"--guard.max-rewinds {decisions.rewinds + 3} goes on with this one"
        )
    next_batch = decisions.batch(wrong.step - 1) + 1
    training_state.set_aside(files.path, to)  # first: a checkpoint of what is taken back must not meet the decision
    start.record({"kind": "rewind", **incident, "to": to, "next_batch": next_batch})
    skipped = next_batch - decisions.batch(to)
    log.warning("step %d: %s; back to step %d, %d batches are skipped", wrong.step, wrong.reason, to, skipped)


def place_to_go_back_to(folder: Path, every: int | None, first_bad: int) -> Path | None:
    """The newest sound checkpoint that a run without stops has too, if there is one; None is the beginning."""
    if every is None:
        return None
    found = training_state.newest_sound(folder, log.warning, wanted=lambda step: step % every == 0 and step < first_bad)
    if found is None and first_bad > every:  # the interval was another before, or they are damaged
        return newest_checkpoint(folder, before=first_bad)
    return found
