"""Events to Weights & Biases: one run there for one here, whatever stops it in between.

Its own variables count before us: WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID, WANDB_DIR, WANDB_MODE and the rest.
"""

from typing import Any

import wandb

from smolforge.config import Report
from smolforge.tracking import Ended, Event, Saved, Started, identity
from smolforge.tracking.rows import GLOBAL_STEP, Rows

FILES = "wandb"
MEMORY_SECONDS = 60
"""It writes its own log of a run every 15 seconds."""


class WandB:
    """One run of W&B, for one start of ours."""

    def __init__(self, run: Any, report: Report, rows: Rows) -> None:
        self.run, self.report, self.rows = run, report, rows
        self.last: Saved | None = None

    def __call__(self, event: Event) -> None:
        self.rows(event)
        match event:
            case Saved():
                self.last = event
                if self.report.log_model == "checkpoint":
                    self.give(event)
            case Ended():
                if self.report.log_model == "end" and self.last is not None:
                    self.give(self.last)
                self.run.summary["ended"] = f"{event.state}: {event.reason}" if event.reason else event.state
                self.run.finish(exit_code=0 if event.state in ("finished", "stopped") else 1)
            case _:
                pass

    def give(self, saved: Saved) -> None:
        """A checkpoint as an artifact, everything a run goes on with included; W&B copies it and sends it by itself."""
        artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"step": saved.step})
        artifact.add_dir(str(saved.folder))
        self.run.log_artifact(artifact, aliases=["latest", f"step-{saved.step}"])


def unwritten(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The end of it, which W&B may have had in memory alone when a process was killed. Twice does no harm."""
    seconds, count = 0.0, 0
    while seconds < MEMORY_SECONDS and count < len(history):
        count += 1
        seconds += sum(value or 0 for name, value in history[-count].items() if name.startswith("seconds_"))
    return history[len(history) - count :]


def begin(started: Started) -> WandB:
    """Go on with the run of before, or begin one and tell it what was done so far."""
    theirs = wandb.setup().settings
    said = theirs.model_fields_set  # by variables and files of W&B
    offline_before = any((started.folder / FILES).glob("offline-run-*"))
    run = wandb.init(
        project=theirs.project or started.recipe.report.project,
        id=theirs.run_id or identity(started.folder),
        name=theirs.run_name or started.folder.resolve().name,
        dir=None if "root_dir" in said else str(started.folder),
        config={"recipe": started.recipe.model_dump(mode="json"), "machine": started.environment},
        resume="allow",
        allow_val_change=True,  # where to stop, above all
        settings=wandb.Settings(console=theirs.console if "console" in said else "off"),  # a live view is no log
    )
    run.define_metric("*", step_metric=GLOBAL_STEP)
    known = run.step - 1 if run.resumed else -1
    rows = Rows(
        run.log,
        known,
        started.again,
        table=lambda columns, data: wandb.Table([*columns], [*data]),
        histogram=lambda pair: wandb.Histogram(np_histogram=pair),
    )
    for metrics in unwritten(started.history()) if offline_before else started.history():
        rows.step(metrics)
    return WandB(run, started.recipe.report, rows)
