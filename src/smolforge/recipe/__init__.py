"""A recipe and a folder -> a finished run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolforge.errors import SettingError
from smolforge.recipe.read import model_settings, read_recipe
from smolforge.recipe.run import Run, run_settled
from smolforge.recipe.settle import resumed, settle
from smolforge.recipe.workshop import Observer
from smolforge.runs import RECIPE

PRESET = "model.preset"


def train(
    recipe: str | Path,
    run: str | Path,
    data: str | list[str] | None = None,
    steps: int | None = None,
    fresh: bool = False,
    **overrides: Any,
) -> Run:
    """Train what a recipe says in the folder `run`, or go on exactly where that run stands.

    `recipe` is a file or the name of a shipped one, `data` its text, `steps` where to stop; any other setting
    is an override by its dotted name: `train("nano", "runs/a", **{"optim.learning_rate": 1e-3})`. Raises
    SettingError, InvalidFile or MissingResource with one sentence, Stopped when a signal ended the run
    with everything saved, and Diverged when its numbers went wrong too often.
    """
    given: dict[str, Any] = dict(overrides)
    if data is not None:
        given["data.sources"] = [data] if isinstance(data, str) else data
    if steps is not None:
        given["train.steps"] = steps
    return resume_or_start(recipe, run, given, fresh)


def resume_or_start(
    recipe: str | Path,
    run: str | Path,
    overrides: Mapping[str, Any],
    fresh: bool = False,
    observer: Observer | None = None,
) -> Run:
    """`train` with its overrides in one mapping, and somebody watching."""
    stored = Path(run) / RECIPE
    if stored.is_file():
        if fresh:
            raise SettingError(f"{run} holds a run already, and --fresh refuses to resume it; give --run another name")
        settled = resumed(read_recipe(stored), read_recipe(recipe), spelled_out(recipe, overrides))
    else:
        settled = settle(read_recipe(recipe, overrides), overrides.keys(), model_settings(recipe))
    return run_settled(settled, Path(run), observer)


def spelled_out(recipe: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in which the name of a shape is replaced by what it says, so that it can be held to a run's."""
    if PRESET not in overrides:
        return dict(overrides)
    shape = read_recipe(recipe, overrides).model.model_dump()
    given = {f"model.{name}": value for name, value in shape.items()}
    return {name: value for name, value in overrides.items() if name != PRESET} | given
