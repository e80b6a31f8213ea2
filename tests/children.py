"""What tests have done in processes of their own. Light: each such process begins by reading this file."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from smolforge import cli
from smolforge.device import peak_flops
from smolforge.runs import estimate, resume_or_start, train
from smolforge.runs.context import ProgressListener
from smolforge.testing.processes import die
from smolforge.training.distributed import World


def begin_at_once() -> None:
    """One thread, and no half second of multiplications to say how fast this machine is."""
    torch.set_num_threads(1)
    estimate.matmul_flops_per_second = peak_flops.matmul_flops_per_second = lambda device, dtype: 1e11


class KilledAt(ProgressListener):
    """An observer that does not survive a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step:
            die()


def train_until(step: int | None, recipe: Path, run: Path, overrides: dict[str, Any]) -> None:
    """Train until a step, before whose checkpoint the process is killed; or to the end.

    A W&B service of the process that waits would keep the killed run for itself.
    """
    os.environ.pop("WANDB_SERVICE", None)
    begin_at_once()
    resume_or_start(recipe, run, overrides, listener=KilledAt(step))


def train_amid_faults_until(step: int, recipe: Path, run: Path) -> None:
    """The same with text from a Hub that fails, where nothing waits before it asks again."""
    import datasets

    from smolforge.data.sources import hub

    for name in ("READ_RETRY_INTERVAL", "READ_SERVER_UNAVAILABLE_RETRY_INTERVAL"):
        setattr(datasets.config, f"STREAMING_{name}", 0)
    hub.RETRY_SECONDS = (0.0, 0.0, 0.0)
    train_until(step, recipe, run, {})


def of_a_rank(rank: int, port: int, recipe: Path, run: Path) -> None:
    """One of two, which was told nothing by the process that started it."""
    begin_at_once()
    train(recipe, run, world=World(rank, 2, rank, f"localhost:{port}"))


def without_permission(lab: Path) -> None:
    """Every verb that reads a run, where its module could be imported."""
    os.chdir(lab)
    sys.path.insert(0, str(lab))
    checkpoint = next((lab / "run" / "checkpoints").iterdir())
    for words in (["inspect", lab / "run"], ["generate", checkpoint, "--prompt", "a"], ["verify", lab / "run"]):
        assert cli.run(list(map(str, words))) in (1, 3), words
    other = ["train", lab / "recipe.toml", "--run", lab / "run", "--train.steps", "5"]
    assert cli.run(list(map(str, other))) == 3
    assert "lab" not in sys.modules
    assert cli.run([*map(str, other), "--model.attention", "lab:Sliding"]) == 0
    assert "lab" in sys.modules
