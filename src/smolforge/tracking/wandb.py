"""Send events to Weights & Biases: one W&B run for one run here, however often it is resumed.

W&B's own variables take precedence: WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID, WANDB_DIR, WANDB_MODE and the rest.
"""

from typing import Any

import wandb

from smolforge.config import Report
from smolforge.tracking import Ended, Event, Saved, Started, tracking_id
from smolforge.tracking.rows import GLOBAL_STEP, StepRows

FILES = "wandb"
MEMORY_SECONDS = 60
"""It writes its own log of a run every 15 seconds."""


class WandB:
    """One run of W&B, for one start of ours."""

    def __init__(self, run: Any, report: Report, rows: StepRows) -> None:
        self.run, self.report, self.rows = run, report, rows
        self.last: Saved | None = None

    def __call__(self, event: Event) -> None:
        self.rows(event)
        match event:
            case Saved():
                self.last = event
                if self.report.log_model == "checkpoint":
                    self.log_checkpoint(event)
            case Ended():
                if self.report.log_model == "end" and self.last is not None:
                    self.log_checkpoint(self.last)
                self.run.summary["ended"] = f"{event.state}: {event.reason}" if event.reason else event.state
                self.run.finish(exit_code=0 if event.state in ("finished", "stopped") else 1)
            case _:
                pass

    def log_checkpoint(self, saved: Saved) -> None:
        """Log a checkpoint as an artifact, with the training state; W&B copies it and uploads it in the background."""
        artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"step": saved.step})
        artifact.add_dir(str(saved.folder))
        self.run.log_artifact(artifact, aliases=["latest", f"step-{saved.step}"])


def unsynced_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last rows, which W&B may have had only in memory at a kill. Logging a row twice does no harm."""
    seconds, count = 0.0, 0
    while seconds < MEMORY_SECONDS and count < len(history):
        count += 1
        seconds += sum(value or 0 for name, value in history[-count].items() if name.startswith("seconds_"))
    return history[len(history) - count :]


def create_tracker(started: Started) -> WandB:
    """Resume the W&B run, or start one, and log the steps that it lacks."""
    wandb_settings = wandb.setup().settings
    user_set = wandb_settings.model_fields_set  # by variables and files of W&B
    offline_before = any((started.folder / FILES).glob("offline-run-*"))
    run = wandb.init(
        project=wandb_settings.project or started.recipe.report.project,
        id=wandb_settings.run_id or tracking_id(started.folder),
        name=wandb_settings.run_name or started.folder.resolve().name,
        dir=None if "root_dir" in user_set else str(started.folder),
        config={"recipe": started.recipe.model_dump(mode="json"), "machine": started.environment},
        resume="allow",
        allow_val_change=True,  # where to stop, above all
        # a live view is no log
        settings=wandb.Settings(console=wandb_settings.console if "console" in user_set else "off"),
    )
    run.define_metric("*", step_metric=GLOBAL_STEP)
    last_logged = run.step - 1 if run.resumed else -1
    rows = StepRows(
        run.log,
        last_logged,
        started.repeated_steps,
        table=lambda columns, data: wandb.Table([*columns], [*data]),
        histogram=lambda pair: wandb.Histogram(np_histogram=pair),
    )
    for metrics in unsynced_rows(started.history()) if offline_before else started.history():
        rows.step(metrics)
    return WandB(run, started.recipe.report, rows)
