"""Report a run to experiment trackers: TensorBoard, W&B, Trackio.

    Started -> [ Watched, Sampled, Incident, Stepped, Saved ... ] -> Ended
       ^                                             |
       +------------------ Rewound <-----------------+

A run emits these events, and `Trackers` passes them on to one adapter per tracker, created when the run starts. If an
adapter fails, one warning names it and it is dropped; training never stops for it. Stepped is the last event of a step
except Saved; its metrics are the line in metrics.jsonl.
"""

import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smolforge import atomic
from smolforge.config import Recipe
from smolforge.errors import InvalidFileError, MissingResourceError, install_command
from smolforge.training.run_folder import TRACKING

log = logging.getLogger("smolforge")


@dataclass(frozen=True)
class Started:
    """A run starts, or resumes, after `step`; events of later steps are void."""

    folder: Path
    recipe: Recipe
    environment: dict[str, Any]
    """The machine, as environment.json has it."""
    step: int
    repeated_steps: int
    """Steps that earlier rewinds repeated."""
    history: Callable[[], list[dict[str, Any]]]
    """The lines of metrics.jsonl up to `step`."""


@dataclass(frozen=True)
class Rewound:
    """Numbers went wrong: the run continues after `step`, and has repeated `again` steps so far."""

    step: int
    repeated_steps: int


@dataclass(frozen=True)
class Stepped:
    """One step is done."""

    metrics: dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """A text was drawn, the `number`th of this step."""

    step: int
    number: int
    prompt: str
    text: str


class Histogram(NamedTuple):
    """How many values lie between the edges, of which there is one more than counts."""

    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class Watched:
    """Histograms of some tensors, by name."""

    step: int
    histograms: Mapping[str, Histogram]


@dataclass(frozen=True)
class Incident:
    """Numbers went wrong; `record` is the line that incidents.jsonl has."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk, complete."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Ended:
    """The process ends: `state` is how, as in environment.json, `reason` why."""

    state: str
    reason: str


Event = Started | Rewound | Stepped | Sampled | Watched | Incident | Saved | Ended


Tracker = Callable[[Event], None]
TrackerFactory = Callable[[Started], Tracker]


class Trackers:
    """The trackers of a run; each event goes to all of them."""

    def __init__(self, factories: Mapping[str, TrackerFactory]) -> None:
        self.factories, self.active = factories, dict[str, Tracker]()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for name, factory in self.factories.items():
                with self._drop_on_error(name):
                    self.active[name] = factory(event)
        for name, tracker in list(self.active.items()):
            with self._drop_on_error(name):
                tracker(event)

    @contextmanager
    def _drop_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.active.pop(name, None)
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            log.warning("%s hears no more of this run: %s. Training goes on; metrics.jsonl has all", name, reason)

    def end(self, state: str, reason: str) -> None:
        """Report the end of the run, and drop all trackers."""
        self(Ended(state, reason))
        self.active.clear()


def trackers(names: tuple[str, ...] | None) -> Trackers:
    """Return the trackers of `report.to`. Raises MissingResourceError for one that is not installed."""
    for name in names or ():
        if find_spec(name) is None:
            raise MissingResourceError(f"report.to has {name}, which is not installed: {install_command(name)}")
    return Trackers({name: import_tracker(name) for name in dict.fromkeys(names or ())})


def import_tracker(name: str) -> TrackerFactory:
    """Return a factory that imports the adapter's module when the run starts: each imports a large library."""
    return lambda started: import_module(f"smolforge.tracking.{name}").create_tracker(started)


def tracking_id(folder: Path) -> str:
    """Return the id of a run in other services, stored in its folder. Raises InvalidFileError if the file has none."""
    path = folder / TRACKING
    if not path.is_file():
        atomic.write_text_atomic(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    try:
        return json.loads(path.read_text("utf-8"))["id"]
    except (ValueError, TypeError, KeyError):
        raise InvalidFileError(f"{path} has no id; without that file the run gets a new one") from None
