"""A run's folder, read back: what it measured, what happened to it, and what it is doing now.

Nothing is written and nothing is waited for, so a run may be trained meanwhile. Keys of metrics.jsonl that a run does
not have are columns of NaN.

What runs read of each source of their mixtures: tokens, their share, epochs, and the loss held out of each.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from smolforge.config import Recipe
from smolforge.config.load import read_recipe
from smolforge.data.mixture import FILE
from smolforge.errors import InvalidFile
from smolforge.training.environment import ENVIRONMENT, starts
from smolforge.training.run_folder import INCIDENTS, METRICS, RECIPE, SAMPLES, RunFolder, read_records
from smolforge.training.step_timer import Part

State = Literal["running", "finished", "stopped", "diverged", "failed", "killed", "not begun"]
Record = dict[str, Any]
PARTS = (*get_args(Part), "between")
"""What a step's seconds are spent on, and what lies between two steps: measuring, sampling, saving."""
RECENT = 20
"""Steps a present speed is the median of, where the run has none of its own."""


@dataclass(frozen=True)
class History:
    """One run as its folder tells it."""

    path: Path
    name: str
    """What to call it among others."""
    recipe: Recipe = field(repr=False)
    metrics: list[Record] = field(repr=False)
    samples: list[Record] = field(repr=False)
    incidents: list[Record] = field(repr=False)
    starts: list[Record] = field(repr=False)
    state: State
    why: str
    """Why it is in this state, in one sentence."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def steps(self) -> int:
        """Optimizer steps it was asked for."""
        return self.recipe.train.steps

    def newest(self, key: str) -> float | None:
        """The latest number under a key; None where there never was one."""
        values = self.column(key)
        known = values[np.isfinite(values)]
        return float(known[-1]) if len(known) else None

    @property
    def tokens_per_second(self) -> float | None:
        """The present speed: a running median."""
        running = self.metrics[-1].get("tokens_per_second_median") if self.metrics else None
        if isinstance(running, int | float):
            return float(running)
        recent = self.column("tokens_per_second")[-RECENT:]
        known = recent[np.isfinite(recent)]
        return float(np.median(known)) if len(known) else None

    @cached_property
    def at(self) -> Int[np.ndarray, " n"]:
        """The step of each record."""
        return np.array([record["step"] for record in self.metrics], dtype=np.int64)

    def column(self, key: str) -> Float[np.ndarray, " n"]:
        """What each step says under a key; NaN where it says no number."""
        return np.array([_number(record.get(key)) for record in self.metrics], dtype=np.float64)

    @cached_property
    def tokens(self) -> Float[np.ndarray, " n"]:
        """Tokens learned from, up to and including each step."""
        said = self.column("tokens")
        return np.where(np.isfinite(said), said, self.at * float(self.recipe.train.batch_tokens))

    @cached_property
    def parts(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Seconds each step spent on each of PARTS, for those the run knows."""
        columns = {part: self.column(f"seconds_{part}") for part in PARTS}
        return {part: values for part, values in columns.items() if np.isfinite(values).any()}

    @cached_property
    def seconds(self) -> Float[np.ndarray, " n"]:
        """Wall-clock seconds of training up to and including each step; pauses between starts are none."""
        with np.errstate(divide="ignore"):
            of_step = self.recipe.train.batch_tokens / self.column("tokens_per_second")
        if self.parts:
            known = np.stack(list(self.parts.values()))
            of_step = np.where(np.isfinite(known).any(axis=0), np.nansum(known, axis=0), of_step)
        return np.cumsum(np.where(np.isfinite(of_step), of_step, 0.0))

    @property
    def resumes(self) -> list[int]:
        """Steps after which it was started again, and went on."""
        return [step for start in self.starts[1:] if 0 < (step := start["step"]) < self.step]

    @property
    def rewinds(self) -> list[int]:
        """Steps it was taken back to."""
        taken = [incident for incident in self.incidents if incident["kind"] == "rewind"]
        return [to if isinstance(to := each.get("to"), int) else each["step"] for each in taken]

    @property
    def left_out(self) -> list[int]:
        """Steps whose update was left out."""
        return [record["step"] for record in self.metrics if record.get("left_out")]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else np.nan


def read(folder: Path, name: str | None = None) -> History:
    """The run in a folder. Raises InvalidFile, or SettingError for its recipe, in one sentence, where it is broken."""
    if not (folder / RECIPE).is_file():
        raise InvalidFile(f"{folder} has no {RECIPE}: no training began in it")
    holder = RunFolder(folder).holder()  # first: what ends after this has said so by the time the rest is read
    recipe = read_recipe(folder / RECIPE)
    metrics = _records(folder / METRICS, step=int)
    begun = _starts(folder)
    state, why = _state(holder, begun, metrics[-1]["step"] if metrics else 0, recipe.train.steps)
    return History(
        path=folder,
        name=name or folder.resolve().name,
        recipe=recipe,
        metrics=metrics,
        samples=_records(folder / SAMPLES, step=int, prompt=str, text=str),
        incidents=_records(folder / INCIDENTS, step=int, kind=str),
        starts=begun,
        state=state,
        why=why,
    )


def _records(path: Path, **needed: type) -> list[Record]:
    """The lines of a journal, each with what it cannot do without; none where there is no such file."""
    records = read_records(path) if path.is_file() else []
    _check(path, records, "line", needed)
    return records


def _starts(folder: Path) -> list[Record]:
    found = starts(folder)
    _check(folder / ENVIRONMENT, found, "start", {"step": int})
    return found


def _check(path: Path, records: Sequence[Record], each: str, needed: dict[str, type]) -> None:
    for number, record in enumerate(records, 1):
        for key, kind in needed.items():
            if not isinstance(record.get(key), kind):
                raise InvalidFile(f"{path}, {each} {number} has no {key} that is {_A[kind]}")


_A = {int: "a whole number", str: "a text"}


def _state(holder: str | None, begun: list[Record], step: int, steps: int) -> tuple[State, str]:
    """What a run is doing, and the sentence that says why."""
    done = f"after step {step:,} of {steps:,}" if step else "before its first step"
    if holder is not None:
        return "running", f"process {holder or '(it does not say which)'} trains it"
    if not begun and not step:
        return "not begun", "nothing was trained yet"
    match begun[-1] if begun else {}:
        case {"ended": {"state": "finished"}}:
            return "finished", f"all {steps:,} steps are done"
        case {"ended": {"state": "stopped" | "diverged" | "failed" as state, **rest}}:
            return state, str(rest.get("reason") or f"it ended {done} and gave no reason")
        case {"ended": what}:
            raise InvalidFile(
                f"{ENVIRONMENT} says that the run ended as {what!r:.60}, which this version does not know"
            )
        case {"seen": _}:
            return "killed", f"its process was gone {done} without a word: killed, out of memory, or a power cut"
    if step >= steps:
        return "finished", f"all {steps:,} steps are done"
    return "stopped", f"it ended {done}, by a version that did not write down why"


PREFIX = "tokens_from_"
"""Of the keys in metrics.jsonl."""


class Read(NamedTuple):
    """What a run learned from one source, up to its newest step."""

    source: str
    tokens: int
    share: float
    epochs: float | None
    """How often it went through what is prepared; None where that is not known any more."""
    validation_loss: float | None


def read_source_totals(run: History) -> list[Read]:
    """Of each source; none where a run has no mixture."""
    newest = run.metrics[-1] if run.metrics else {}
    tokens = {key.removeprefix(PREFIX): int(said) for key, said in newest.items() if key.startswith(PREFIX)}
    whole, sizes = sum(tokens.values()), _sizes(run)
    return [
        Read(
            name,
            count,
            count / whole if whole else 0.0,
            count / (sizes[name] - 1) if sizes.get(name, 0) > 1 else None,
            run.newest(f"validation_loss_{name}"),
        )
        for name, count in tokens.items()
    ]


def _sizes(run: History) -> dict[str, int]:
    """Training tokens of each source, as the run has written them down."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads((run.path / FILE).read_text("utf-8"))["sources"]
        return {name: int(each["tokens"]) for name, each in said.items()}
    return {}


def by_name(runs: Sequence[History]) -> dict[str, list[Read]]:
    """Of each run that has a mixture."""
    return {run.name: found for run in runs if (found := read_source_totals(run))}
