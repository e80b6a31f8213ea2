"""Events to Trackio, as Hugging Face's tools keep them: on this machine, or in the Space of TRACKIO_SPACE_ID."""

import sys
from contextlib import redirect_stdout

import trackio

from smolforge.tracking import Ended, Event, Started, identity
from smolforge.tracking.rows import Rows


class Trackio:
    """One run of Trackio, for one start of ours."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, event: Event) -> None:
        self.rows(event)
        if isinstance(event, Ended):
            with redirect_stdout(sys.stderr):  # standard output is for results
                trackio.finish()


def begin(started: Started) -> Trackio:
    """Go on with the run of before, which it knows by its name, or begin one and tell it what was done so far."""
    with redirect_stdout(sys.stderr):
        run = trackio.init(
            project=started.recipe.report.project,
            name=f"{started.folder.resolve().name}-{identity(started.folder)}",
            config={"recipe": started.recipe.model_dump(mode="json"), "machine": started.environment},
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    known = run._next_step - 1  # it says nowhere else how far it heard
    rows = Rows(
        run.log,
        known,
        started.again,
        table=trackio.Table,
        histogram=lambda pair: trackio.Histogram(np_histogram=pair),
    )
    for metrics in started.history():
        rows.step(metrics)
    return Trackio(rows)
