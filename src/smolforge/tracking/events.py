"""What is told of a run while it goes: one stream of events, whoever listens.

    Started -> [ Watched, Sampled, Incident, Stepped, Saved ... ] -> Ended
       ^                                             |
       +------------------ Rewound <-----------------+

Of one step, Stepped is the last but for Saved; its metrics are the line that metrics.jsonl has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smolforge.config import Recipe


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
