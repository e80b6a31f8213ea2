"""`smolforge train`."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smolforge.errors import ConfigError
from smolforge.training.signals import stop_signals


def train(
    recipe: str,
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    run: Path,
    fresh: bool = False,
    profile: int | None = None,
    json_: bool = False,
) -> None:
    """Train a recipe, or resume exactly what is in its run folder.

    Every setting of a recipe is a flag: --train.steps 500, --data.sources my.txt, --optim.learning-rate 1e-3,
    --tokenizer FOLDER, --budget 5m, --init-from MODEL. `smolforge inspect RECIPE` lists them with their values.
    RECIPE is a file, or the name of one that comes along; nano is the small one. Ctrl-C saves and ends; the same
    command goes on.

    Several processes train one run together when torchrun or srun starts them: docs/clusters.md.

        smolforge train nano --run runs/mine --data.sources my.txt --budget 5m

    Parameters
    ----------
    recipe
        A recipe file, or the name of one that comes with smolforge.
    run
        The folder of the run; the same command again resumes it.
    fresh
        Refuse to resume.
    profile
        Profile so many steps, after one: run/profile gets a trace, and a summary of where the time goes.
    json_
        Print the final metrics as one JSON object.
    """
    with stop_signals():  # also while the imports take their seconds
        from smolforge.cli.overrides import overrides_from_env, parse_overrides

        overrides = overrides_from_env(os.environ) | parse_overrides(settings)
        if profile is not None:
            if profile < 1:
                raise ConfigError(f"--profile is {profile}; it should be a number of steps above 0")
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks of its own affairs

        from smolforge.cli.run_display import Display
        from smolforge.device.environment import describe_environment
        from smolforge.runs import resume_or_start
        from smolforge.training.distributed import world_from_env
    world = world_from_env(os.environ)
    if world.rank > 0:  # rank 0 speaks for all
        logging.getLogger("smolforge").setLevel(logging.ERROR)
    with Display(quiet=json_ or world.rank > 0, plain=world.size > 1) as display:
        result = resume_or_start(
            recipe, run, overrides,
            fresh=fresh, listener=display, world=world,
            profile_steps=profile, environment=describe_environment(os.environ),
        )  # fmt: skip
    if json_ and world.rank == 0:
        print(json.dumps(result.metrics))
    elif world.rank == 0:
        display.print_line(f"finished: {result.folder} is at step {result.metrics['step']:,}")
        prompt = "" if result.recipe.data.format != "text" else ' --prompt "Once upon a time"'
        display.print_line(f"talk to it: smolforge generate {result.folder}{prompt}")
