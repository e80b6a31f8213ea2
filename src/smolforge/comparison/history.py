"""Find runs in the folders that the user names, and read each back: settings, metrics, samples, incidents, starts.

Nothing is written and nothing is waited for, so a run may be trained meanwhile. Keys that metrics.jsonl does not have
become columns of NaN. Of a mixture, the tokens, share, epochs and validation loss of each source are read too.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from smolforge.config import Recipe
from smolforge.config.load import read_recipe
from smolforge.data.mixture import MIXTURE_FILE
from smolforge.errors import ConfigError, InvalidFileError, did_you_mean
from smolforge.training.environment import ENVIRONMENT, starts
from smolforge.training.run_folder import INCIDENTS, LOCK, LOG, METRICS, RECIPE, SAMPLES, RunFolder, read_records
from smolforge.training.step_timer import Phase

State = Literal["running", "finished", "stopped", "diverged", "failed", "killed", "not begun"]
Record = Mapping[str, Any]
TIME_PARTS = (*get_args(Phase), "between")
"""What a step's seconds are spent on, and what lies between two steps: measuring, sampling, saving."""
RECENT_STEPS = 20
"""Steps a present speed is the median of, where the run has none of its own."""
_TYPE_NAMES = {int: "a whole number", str: "a text"}
SOURCE_TOKENS_PREFIX = "tokens_from_"
"""Of the keys in metrics.jsonl."""
MAX_DEPTH = 2
"""Levels below a folder at which runs are looked for."""


@dataclass(frozen=True)
class RunHistory:
    """One run as its folder tells it."""

    path: Path
    name: str
    """What to call it among others."""
    recipe: Recipe = field(repr=False)
    metrics: Sequence[Record] = field(repr=False)
    samples: Sequence[Record] = field(repr=False)
    incidents: Sequence[Record] = field(repr=False)
    starts: Sequence[Record] = field(repr=False)
    state: State
    reason: str
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
        values = self.finite(key)
        return float(values[-1]) if len(values) else None

    @property
    def tokens_per_second(self) -> float | None:
        """The present speed: a running median."""
        running = finite_number(self.metrics[-1], "tokens_per_second_median") if self.metrics else None
        recent = self.column("tokens_per_second")[-RECENT_STEPS:]
        known = recent[np.isfinite(recent)] if running is None else running
        return float(np.median(known)) if np.size(known) else None

    @cached_property
    def record_steps(self) -> Int[np.ndarray, " n"]:
        """The step of each record."""
        return np.array([record["step"] for record in self.metrics], dtype=np.int64)

    def column(self, key: str) -> Float[np.ndarray, " n"]:
        """What each step says under a key; NaN where it says no number."""
        return np.array([finite_number(record, key) for record in self.metrics], dtype=np.float64)

    def finite(self, key: str) -> Float[np.ndarray, " k"]:
        """The numbers under a key, without the gaps."""
        values = self.column(key)
        return values[np.isfinite(values)]

    @cached_property
    def tokens(self) -> Float[np.ndarray, " n"]:
        """Tokens learned from, up to and including each step."""
        tokens = self.column("tokens")
        return np.where(np.isfinite(tokens), tokens, self.record_steps * float(self.recipe.train.batch_tokens))

    @cached_property
    def phase_seconds(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Seconds each step spent on each of PARTS, for those the run knows."""
        columns = {phase: self.column(f"seconds_{phase}") for phase in TIME_PARTS}
        return {phase: values for phase, values in columns.items() if np.isfinite(values).any()}

    @cached_property
    def seconds(self) -> Float[np.ndarray, " n"]:
        """Wall-clock seconds of training up to and including each step; pauses between starts are none."""
        with np.errstate(divide="ignore"):
            step_seconds = self.recipe.train.batch_tokens / self.column("tokens_per_second")
        if self.phase_seconds:
            phase_seconds = np.stack(list(self.phase_seconds.values()))
            step_seconds = np.where(
                np.isfinite(phase_seconds).any(axis=0), np.nansum(phase_seconds, axis=0), step_seconds
            )
        return np.cumsum(np.where(np.isfinite(step_seconds), step_seconds, 0.0))

    @property
    def resumes(self) -> list[int]:
        """Steps after which it was started again, and went on."""
        return [step for start in self.starts[1:] if 0 < (step := start["step"]) < self.step]

    @property
    def rewinds(self) -> list[int]:
        """Steps it was taken back to."""
        rewinds = [incident for incident in self.incidents if incident["kind"] == "rewind"]
        return [step if isinstance(step := incident.get("to"), int) else incident["step"] for incident in rewinds]

    @property
    def skipped_steps(self) -> list[int]:
        """Steps whose update was left out."""
        return [record["step"] for record in self.metrics if record.get("left_out")]


def finite_number(record: Record, key: str) -> float | None:
    """A finite number, if there is one."""
    value = record.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def read_history(folder: Path, name: str | None = None) -> RunHistory:
    """Read the run in a folder.

    Raises InvalidFileError, or ConfigError for its recipe, in one sentence, where it is broken.
    """
    if not (folder / RECIPE).is_file():
        raise InvalidFileError(f"{folder} has no {RECIPE}: no training began in it")
    holder = RunFolder(folder).lock_holder()  # first: what ends after this has said so by the time the rest is read
    recipe = read_recipe(folder / RECIPE)
    metrics = _records(folder / METRICS, step=int)
    start_records = starts(folder)
    _check_records(folder / ENVIRONMENT, start_records, "start", required={"step": int})
    state, reason = _run_state(holder, start_records, metrics[-1]["step"] if metrics else 0, steps=recipe.train.steps)
    return RunHistory(
        path=folder,
        name=name or folder.resolve().name,
        recipe=recipe,
        metrics=metrics,
        samples=_records(folder / SAMPLES, step=int, prompt=str, text=str),
        incidents=_records(folder / INCIDENTS, step=int, kind=str),
        starts=start_records,
        state=state,
        reason=reason,
    )


def _records(path: Path, **required: type) -> Sequence[Record]:
    """The lines of a journal, each with what it cannot do without; none where there is no such file."""
    records = read_records(path) if path.is_file() else []
    _check_records(path, records, "line", required=required)
    return records


def _check_records(path: Path, records: Sequence[Record], record_name: str, *, required: dict[str, type]) -> None:
    for number, record in enumerate(records, 1):
        for key, kind in required.items():
            if not isinstance(record.get(key), kind):
                raise InvalidFileError(f"{path}, {record_name} {number} has no {key} that is {_TYPE_NAMES[kind]}")


def _run_state(holder: str | None, start_records: Sequence[Record], step: int, *, steps: int) -> tuple[State, str]:
    """What a run is doing, and the sentence that says why."""
    progress = f"after step {step:,} of {steps:,}" if step else "before its first step"
    if holder is not None:
        return "running", f"process {holder or '(it does not say which)'} trains it"
    if not start_records and not step:
        return "not begun", "nothing was trained yet"
    match start_records[-1] if start_records else {}:
        case {"ended": {"state": "finished"}}:
            return "finished", f"all {steps:,} steps are done"
        case {"ended": {"state": "stopped" | "diverged" | "failed" as state, **ending}}:
            return state, str(ending.get("reason") or f"it ended {progress} and gave no reason")
        case {"ended": ended}:
            raise InvalidFileError(
                f"{ENVIRONMENT} says that the run ended as {ended!r:.60}, which this version does not know"
            )
        case {"seen": _}:
            return "killed", f"its process was gone {progress} without a word: killed, out of memory, or a power cut"
    if step >= steps:
        return "finished", f"all {steps:,} steps are done"
    return "stopped", f"it ended {progress}, by a version that did not write down why"


class SourceTotals(NamedTuple):
    """What a run learned from one source, up to its newest step."""

    source: str
    tokens: int
    share: float
    epochs: float | None
    """How often it went through what is prepared; None where that is not known any more."""
    validation_loss: float | None


def read_source_totals(run: RunHistory) -> list[SourceTotals]:
    """Of each source; none where a run has no mixture."""
    latest = run.metrics[-1] if run.metrics else {}
    tokens = {
        key.removeprefix(SOURCE_TOKENS_PREFIX): int(value)
        for key, value in latest.items()
        if key.startswith(SOURCE_TOKENS_PREFIX)
    }
    total, sizes = sum(tokens.values()), _source_sizes(run)
    return [
        SourceTotals(
            name,
            count,
            count / total if total else 0.0,
            count / (sizes[name] - 1) if sizes.get(name, 0) > 1 else None,
            run.newest(f"validation_loss_{name}"),
        )
        for name, count in tokens.items()
    ]


def _source_sizes(run: RunHistory) -> dict[str, int]:
    """Training tokens of each source, as the run has written them down."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        sources = json.loads((run.path / MIXTURE_FILE).read_text("utf-8"))["sources"]
        return {name: int(source["tokens"]) for name, source in sources.items()}
    return {}


class Selection(NamedTuple):
    """Runs in the order they were named in; by name, those that cannot be read, and the sentence that says why."""

    runs: list[RunHistory]
    broken: dict[str, str]


def select(folders: Sequence[Path]) -> Selection:
    """Read all runs in some folders, each a run or a folder of runs.

    Raises ConfigError for what is no run, and what `read_history` raises for a broken run that was named itself.
    """
    paths = list({run.resolve(): run for folder in folders for run in _expand(folder)}.values())
    names, requested = shortest_names(paths), set(folders)
    runs, broken = [], {}
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(read_history(path, name))
        except (InvalidFileError, ConfigError) as error:
            if path in requested:
                raise
            broken[name] = str(error)
    return Selection(runs, broken)


def holds_runs(folder: Path) -> bool:
    """Whether it is no run itself, but has some in it."""
    return folder.is_dir() and not _is_run(folder) and next(_runs_below(folder), None) is not None


def _is_run(folder: Path) -> bool:
    """Whether a run was begun in it; a lock alone may be anybody's."""
    return (folder / RECIPE).is_file() or ((folder / LOCK).is_file() and (folder / LOG).is_file())


def _expand(folder: Path) -> list[Path]:
    if _is_run(folder):
        return [folder]
    if runs := list(_runs_below(folder)):
        return runs
    raise ConfigError(_not_a_run_message(folder))


def _runs_below(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    for child in _folders(folder) if depth else []:
        if _is_run(child):
            yield child
        else:
            yield from _runs_below(child, depth - 1)


def _folders(folder: Path) -> list[Path]:
    """Sorted as people count: step-2 before step-10. What may not be looked into has none."""
    with suppress(OSError):
        return sorted(
            (child for child in folder.iterdir() if child.is_dir() and child.name[0] != "."), key=_natural_sort_key
        )
    return []


def _natural_sort_key(path: Path) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", path.name, re.ASCII)
    return [(int(part), "") if part[0].isdigit() and part.isascii() else (-1, part) for part in parts]


def _not_a_run_message(folder: Path) -> str:
    """Why there is no run under a name, and what may be meant."""
    inside = next((parent for parent in folder.absolute().parents if _is_run(parent)), None)
    if inside is not None and folder.exists():
        return f"{folder} is a part of the run {inside}; give that"
    if folder.is_dir():
        return f"{folder} holds no run; smolforge train RECIPE --run {folder / 'NAME'} makes one"
    if folder.exists():
        return f"{folder} is a file; a run is a folder that smolforge train made"
    suggestion = did_you_mean(str(folder), [str(run) for run in _runs_below(folder.parent, 1)])
    return f"there is no run {folder}.{suggestion or ' A run is a folder that smolforge train made.'}"


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as no other path ends in."""
    all_parts = [path.resolve().parts for path in paths]

    def name(parts: tuple[str, ...]) -> str:
        for count in range(1, len(parts)):
            if sum(other[-count:] == parts[-count:] for other in all_parts) == 1:
                return "/".join(parts[-count:])
        return str(Path(*parts))

    return [name(parts) for parts in all_parts]
