"""A recipe and a folder -> a finished run."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from smolforge.config import Recipe, custom_classes
from smolforge.config.base import validated
from smolforge.config.load import admitted, find, model_settings, read_recipe
from smolforge.config.model import PARTS
from smolforge.errors import SettingError
from smolforge.runs.callbacks import Observer, Silent
from smolforge.runs.dataset import count_rows
from smolforge.runs.resolve import check_shares, resumed, settle
from smolforge.runs.run import Run, run_settled
from smolforge.training.distributed import World, joined
from smolforge.training.run_folder import RECIPE
from smolforge.training.signals import stop_signals

PRESET = "model.preset"
OF_OWN = {"optim.name", *(f"model.{part}" for part in PARTS)}
"""Settings that may name a class of a person's own."""
ALONE = World()


def train(
    recipe: str | Path,
    run: str | Path,
    data: str | list[str] | None = None,
    steps: int | None = None,
    fresh: bool = False,
    world: World = ALONE,
    **overrides: Any,
) -> Run:
    """Train what a recipe says in the folder `run`, or go on exactly where that run stands.

    `recipe` is a file or the name of a shipped one, `data` its text, `steps` where to stop; any other setting
    is an override by its dotted name: `train("nano", "runs/a", **{"optim.learning_rate": 1e-3})`. One of several
    processes that train together says which in `world`: `smolforge.training.distributed.world_of(os.environ)`.

    Raises SettingError, InvalidFile or MissingResource with one sentence, Stopped when a signal ended the run
    with everything saved, Diverged when its numbers went wrong too often, LostRank when another rank is gone, and
    Elsewhere when rank 0 raised one of these.
    """
    given: dict[str, Any] = dict(overrides)
    if data is not None:
        given["data.sources"] = [data] if isinstance(data, str) else data
    if steps is not None:
        given["train.steps"] = steps
    return resume_or_start(recipe, run, given, fresh, world=world)


def resume_or_start(
    recipe: str | Path,
    run: str | Path,
    overrides: Mapping[str, Any],
    fresh: bool = False,
    observer: Observer | None = None,
    world: World = ALONE,
    profile: int | None = None,
    seen: Mapping[str, Any] | None = None,
) -> Run:
    """`train` with its overrides in one mapping, somebody watching, and so many steps profiled into run/profile.

    `seen` is what environment.json should say of the surroundings.
    """
    with stop_signals(), joined(world) as ranks:  # preparing, measuring and downloading come before the run has its own
        tree = ranks.tell(lambda: settled(recipe, Path(run), overrides, fresh, ranks.size, observer).model_dump())
        return run_settled(admitted(validated(Recipe, tree), recipe), Path(run), observer, ranks, profile, seen)


def settled(
    recipe: str | Path,
    run: Path,
    overrides: Mapping[str, Any],
    fresh: bool,
    ranks: int,
    observer: Observer | None = None,
) -> Recipe:
    """What a start on so many ranks will do, by the recipe or by the run that is there."""
    stored = run / RECIPE
    if not stored.is_file():
        counting = partial(count_rows, folder=run, observer=observer or Silent())
        asked = admitted(read_recipe(recipe, overrides), recipe)
        decided = settle(asked, overrides.keys(), model_settings(recipe), ranks, counting)
    elif fresh:
        raise SettingError(f"{run} holds a run already, and --fresh refuses to resume it; give --run another name")
    else:
        written = admitted(read_recipe(recipe), recipe)
        said = (str(overrides[name]) for name in OF_OWN & overrides.keys())
        custom_classes.admit((name for name in said if ":" in name), [find(recipe).parent])
        decided = resumed(read_recipe(stored), written, spelled_out(recipe, overrides))
        for name in decided.own_classes:
            custom_classes.refuse_unless_admitted("a class of this run", name)
    check_shares(decided, ranks)
    return decided


def spelled_out(recipe: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in which the name of a shape is replaced by what it says, so that it can be held to a run's."""
    if PRESET not in overrides:
        return dict(overrides)
    shape = read_recipe(recipe, overrides).model.model_dump()
    given = {f"model.{name}": value for name, value in shape.items()}
    return {name: value for name, value in overrides.items() if name != PRESET} | given
