"""Send events to Trackio: on this machine, or in the Space of TRACKIO_SPACE_ID."""

import sys
from contextlib import redirect_stdout

import trackio

from smolforge.tracking import Ended, Event, Started, tracking_id
from smolforge.tracking.rows import StepRows


class Trackio:
    """One run of Trackio, for one start of ours."""

    def __init__(self, rows: StepRows) -> None:
        self.rows = rows

    def __call__(self, event: Event) -> None:
        self.rows(event)
        if isinstance(event, Ended):
            with redirect_stdout(sys.stderr):  # standard output is for results
                trackio.finish()


def create_tracker(started: Started) -> Trackio:
    """Resume the run of this name, or start one, and log the steps that it lacks."""
    with redirect_stdout(sys.stderr):
        run = trackio.init(
            project=started.recipe.report.project,
            name=f"{started.folder.resolve().name}-{tracking_id(started.folder)}",
            config={"recipe": started.recipe.model_dump(mode="json"), "machine": started.environment},
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    last_logged = run._next_step - 1  # it says nowhere else how far it heard
    rows = StepRows(
        run.log,
        last_logged,
        started.repeated_steps,
        table=trackio.Table,
        histogram=lambda pair: trackio.Histogram(np_histogram=pair),
    )
    for metrics in started.history():
        rows.step(metrics)
    return Trackio(rows)
