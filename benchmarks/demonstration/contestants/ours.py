"""smolforge, by its Python interface: the same command starts and goes on."""

from pathlib import Path
from typing import Any

from shared_setup import ENDLESS, settings
from watch import Steps, named


def overrides(setup: Path, seed: int) -> dict[str, Any]:
    given = settings(setup)
    return {
        "init_from": str(setup / "model"),
        "data.sources": [str(setup / "prepared" / "smolforge")],
        "seed": seed,
        "model.preset": given["preset"],
        "optim.name": "adamw",
        "optim.learning_rate": given["learning_rate"],
        "optim.betas": given["betas"],
        "optim.eps": given["eps"],
        "optim.weight_decay": given["weight_decay"],
        "optim.max_grad_norm": given["max_grad_norm"],
        "optim.schedule.warmup_steps": given["warmup_steps"],
        "optim.schedule.decay": "none",
        "optim.schedule.final_learning_rate": given["learning_rate"],
        "train.steps": ENDLESS,
        "train.sequence_length": given["sequence_length"],
        "train.batch_tokens": given["rows"] * given["sequence_length"],
        "train.dtype": given["dtype"],
        "train.compile": False,
        "train.checkpoint_every": given["save_every"],
        "train.keep_last": ENDLESS,
        "train.evaluate_every": None,
        "train.sample_every": None,
        "report.to": None,
    }


def prepare(setup: Path) -> None:
    from smolforge.config import Data
    from smolforge.data.prepare import build
    from smolforge.tokenizer import Tokenizer

    data = Data(sources=(str(setup / "text"),), held_out=0)
    build.prepare(data, setup / "prepared" / "smolforge", Tokenizer.load(setup / "tokenizer"))


def train(setup: Path, out: Path, seed: int) -> None:
    from smolforge.data import batches
    from smolforge.runs import resume_or_start
    from smolforge.runs.context import ProgressListener

    rows: dict[int, list[str]] = {}
    plain = batches.TokenWindows.batch

    def batch(self: Any, step: int, *given: Any) -> Any:
        made = plain(self, step, *given)
        rows[step + 1] = named(made.input_ids)
        return made

    batches.TokenWindows.batch = batch
    write = Steps(out)

    class Watching(ProgressListener):
        def on_step(self, metrics: dict[str, Any]) -> None:
            write(metrics["step"], rows.pop(metrics["step"]))

    resume_or_start("nano", out / "run", overrides(setup, seed), listener=Watching())


def checkpoints(out: Path) -> dict[int, Path]:
    """Weights by step."""
    found = (out / "run" / "checkpoints").glob("step-*/model.safetensors")
    return {int(file.parent.name.removeprefix("step-")): file for file in found}


resumes_from = checkpoints


def export(file: Path, out: Path) -> None:
    """Weights under Hugging Face's names."""
    out.write_bytes(file.read_bytes())
