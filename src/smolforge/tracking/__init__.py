"""Whoever hears of a run beside its own files: TensorBoard, W&B, Trackio.

events ->  Trackers  ->  one adapter each, made when the run starts
             one that fails is said once and left out; training never stops for it

What is told of a run while it goes: one stream of events, whoever listens.

    Started -> [ Watched, Sampled, Incident, Stepped, Saved ... ] -> Ended
       ^                                             |
       +------------------ Rewound <-----------------+

Of one step, Stepped is the last but for Saved; its metrics are the line that metrics.jsonl has.
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
from smolforge.errors import InvalidFile, MissingResource
from smolforge.training.run_folder import TRACKING


@dataclass(frozen=True)
class Started:
    """A run begins, or goes on, after `step`; what was told of later steps does not count any more."""

    folder: Path
    recipe: Recipe
    environment: dict[str, Any]
    """The machine, as environment.json has it."""
    step: int
    again: int
    """Steps that rewinds before had to do again."""
    history: Callable[[], list[dict[str, Any]]]
    """The lines of metrics.jsonl up to `step`."""


@dataclass(frozen=True)
class Rewound:
    """Numbers went wrong: the run goes on after `step`, and did `again` steps again so far."""

    step: int
    again: int


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
    """How the values of some tensors are spread, by name."""

    step: int
    histograms: Mapping[str, Histogram]


@dataclass(frozen=True)
class Incident:
    """Numbers went wrong; `record` is the line that incidents.jsonl has."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk, whole."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Ended:
    """The process leaves the run: `state` is how, as environment.json has it, `reason` why."""

    state: str
    reason: str


Event = Started | Rewound | Stepped | Sampled | Watched | Incident | Saved | Ended


log = logging.getLogger("smolforge")

Tracker = Callable[[Event], None]
Maker = Callable[[Started], Tracker]


class Trackers:
    """Passes events on to those that were asked for."""

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self.makers, self.listening = makers, dict[str, Tracker]()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for name, make in self.makers.items():
                with self._left_out_if_it_fails(name):
                    self.listening[name] = make(event)
        for name, tracker in list(self.listening.items()):
            with self._left_out_if_it_fails(name):
                tracker(event)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.listening.pop(name, None)
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            log.warning("%s hears no more of this run: %s. Training goes on; metrics.jsonl has all", name, reason)

    def end(self, state: str, reason: str) -> None:
        """Tell them, and let them go."""
        self(Ended(state, reason))
        self.listening.clear()


def trackers(names: tuple[str, ...] | None) -> Trackers:
    """Those of `report.to`. Raises MissingResource for one that is not installed."""
    for name in names or ():
        if find_spec(name) is None:
            raise MissingResource(f"report.to has {name}, which is not installed: pip install 'smolforge[{name}]'")
    return Trackers({name: import_maker(name) for name in dict.fromkeys(names or ())})


def import_maker(name: str) -> Maker:
    """The adapter's module, loaded when the run starts: each brings in a large library."""
    return lambda started: import_module(f"smolforge.tracking.{name}").begin(started)


def identity(folder: Path) -> str:
    """The id of a run where others keep it, made once and kept in its folder. Raises InvalidFile where it is lost."""
    path = folder / TRACKING
    if not path.is_file():
        atomic.replace(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    try:
        return json.loads(path.read_text("utf-8"))["id"]
    except (ValueError, TypeError, KeyError):
        raise InvalidFile(f"{path} has no id; without that file the run gets a new one") from None
