"""A recipe and a folder -> a finished run."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from smolforge.config import Recipe, custom_classes
from smolforge.config.base import validate_settings
from smolforge.config.load import find_recipe, import_recipe_classes, model_settings, read_recipe
from smolforge.config.model import PARTS
from smolforge.errors import ConfigError
from smolforge.runs.context import ProgressListener
from smolforge.runs.dataset import count_rows
from smolforge.runs.mirror import SETTING, find_mirror, mirror_path, restore_newer
from smolforge.runs.resolve import check_ranks, merge_resume_overrides, resolve_recipe
from smolforge.runs.run import Run, run_resolved
from smolforge.training.distributed import World, rank_group
from smolforge.training.run_folder import RECIPE
from smolforge.training.signals import stop_signals

PRESET = "model.preset"
CLASS_SETTINGS = {"optim.name", *(f"model.{part}" for part in PARTS)}
"""Settings that may name a class of a person's own."""
ALONE = World()


def train(
    recipe: str | Path,
    run: str | Path,
    data: str | list[str] | None = None,
    *,
    steps: int | None = None,
    fresh: bool = False,
    world: World = ALONE,
    **overrides: Any,
) -> Run:
    """Train what a recipe says in the folder `run`, or resume exactly where that run is.

    `recipe` is a file or the name of a shipped one, `data` its text, `steps` where to stop; any other setting
    is an override by its dotted name: `train("nano", "runs/a", **{"optim.learning_rate": 1e-3})`. One of several
    processes that train together says which in `world`: `smolforge.training.distributed.world_from_env(os.environ)`.

    Raises ConfigError, InvalidFileError or MissingResourceError with one sentence, Stopped when a signal ended the run
    with everything saved, TrainingDivergedError when its metrics went wrong too often, LostRankError when another rank
    is gone, and FailedOnRankZeroError when rank 0 raised one of these.
    """
    settings: dict[str, Any] = dict(overrides)
    if data is not None:
        settings["data.sources"] = [data] if isinstance(data, str) else data
    if steps is not None:
        settings["train.steps"] = steps
    return resume_or_start(recipe, run, settings, fresh=fresh, world=world)


def resume_or_start(
    recipe: str | Path,
    run: str | Path,
    overrides: Mapping[str, Any],
    *,
    fresh: bool = False,
    listener: ProgressListener | None = None,
    world: World = ALONE,
    profile_steps: int | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Run:
    """Do what `train` does, with the overrides in one mapping, a listener, and steps to profile into run/profile.

    `environment` is added to environment.json: what else may explain how fast the run goes.
    """
    # Preparing, measuring and downloading come before the run has handlers of its own.
    with stop_signals(), rank_group(world) as ranks:
        resolve = partial(
            load_or_resolve, recipe, Path(run), overrides, fresh=fresh, ranks=ranks.size, listener=listener
        )
        tree = ranks.on_rank_zero(lambda: resolve().model_dump())
        resolved = import_recipe_classes(validate_settings(Recipe, tree), recipe)
        return run_resolved(
            resolved, Path(run), listener=listener, ranks=ranks, profile_steps=profile_steps, environment=environment
        )


def load_or_resolve(
    recipe: str | Path,
    run: Path,
    overrides: Mapping[str, Any],
    *,
    fresh: bool,
    ranks: int,
    listener: ProgressListener | None = None,
) -> Recipe:
    """Return what a start on this many ranks will do, by the recipe or by the run that exists, here or in its mirror.

    A newer checkpoint of the mirror is copied into the run's folder.
    """
    path, listener = mirror_path(recipe, run, overrides), listener or ProgressListener()
    mirrored = find_mirror(path, run) if path else None
    overrides = overrides if path is None else {**overrides, SETTING: str(path)}
    exists = (run / RECIPE).is_file()
    stored = read_recipe(run / RECIPE) if exists else mirrored.recipe if mirrored else None
    if stored is None:
        count = partial(count_rows, folder=run, listener=listener)
        requested = import_recipe_classes(read_recipe(recipe, overrides), recipe)
        resolved = resolve_recipe(requested, overrides.keys(), model_settings(recipe), ranks=ranks, count_rows=count)
    elif fresh:
        holder, flag = (run, "--run") if exists else (path, f"--{SETTING}")
        raise ConfigError(f"{holder} holds a run already, and --fresh refuses to resume it; give {flag} another name")
    else:
        in_file = import_recipe_classes(read_recipe(recipe), recipe)
        names = (str(overrides[name]) for name in CLASS_SETTINGS & overrides.keys())
        custom_classes.import_classes((name for name in names if ":" in name), [find_recipe(recipe).parent])
        resolved = merge_resume_overrides(stored, in_file, expand_preset(recipe, overrides))
        for name in resolved.custom_classes:
            custom_classes.check_imported("a class of this run", name)
    check_ranks(resolved, ranks)
    if mirrored is not None:
        restore_newer(mirrored, run, listener.on_restored)
    return resolved


def expand_preset(recipe: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides in which a preset's name is replaced by its settings, to be compared with a run's."""
    if PRESET not in overrides:
        return dict(overrides)
    shape = read_recipe(recipe, overrides).model.model_dump()
    dotted = {f"model.{name}": value for name, value in shape.items()}
    return {name: value for name, value in overrides.items() if name != PRESET} | dotted
