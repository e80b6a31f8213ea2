"""Put what runs wrote side by side: samples, settings, a timeline of events, the machine of each start."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from smolforge.comparison.history import Record, RunHistory
from smolforge.config.base import leaves

MAX_SAMPLES = 8
"""Rows of samples of one prompt; the rest is in the runs."""
MAX_SAMPLE_CHARS = 900
"""Characters."""
NON_MACHINE_KEYS = ("step", "time", "ended")
"""Of a start in environment.json."""


class Sample(NamedTuple):
    """A text that a run wrote after a step."""

    step: int
    text: str


class PromptSamples(NamedTuple):
    """Texts after one prompt: of each row, one for each run or None, from about the same step."""

    prompt: str
    rows: list[list[Sample | None]]
    num_omitted: int


class Event(NamedTuple):
    """Something that happened to a run; what is not known is empty."""

    time: str
    step: int | None
    label: str
    detail: str


class Machine(NamedTuple):
    """What a start ran on; of later starts, what is not as before."""

    number: int
    step: int
    time: str
    metadata: dict[str, str]


def samples_by_prompt(runs: Sequence[RunHistory]) -> list[PromptSamples]:
    """For each prompt that any run was given."""
    prompts = dict.fromkeys(sample["prompt"] for run in runs for sample in run.samples)
    return [_samples_of_prompt(prompt, runs) for prompt in prompts]


def _samples_of_prompt(prompt: str, runs: Sequence[RunHistory]) -> PromptSamples:
    """Steps spread evenly over those of the run that has most samples; one that ended before them shows its last."""
    by_run = [{sample["step"]: sample["text"] for sample in run.samples if sample["prompt"] == prompt} for run in runs]
    steps = sorted(max(by_run, key=len))
    count = min(MAX_SAMPLES, len(steps))
    selected = [steps[(len(steps) - 1) * index // max(1, count - 1)] for index in range(count)] if count > 1 else steps
    rows = [[_nearest_sample(texts, step, steps) for texts in by_run] for step in selected]
    for index, texts in enumerate(by_run):
        if texts and all(row[index] is None for row in rows):
            rows[0][index] = _shorten_sample(texts, max(texts))
    return PromptSamples(prompt, rows, len(steps) - len(selected))


def _nearest_sample(texts: dict[int, str], step: int, steps: list[int]) -> Sample | None:
    """A run's text from a step nearer to this one than to the next that another run has a text from."""
    min_distance = min((after - before for before, after in pairwise(steps)), default=step)
    nearest = min(texts, key=lambda candidate: abs(candidate - step), default=None)
    if nearest is None or 2 * abs(nearest - step) > min_distance:
        return None
    return _shorten_sample(texts, nearest)


def _shorten_sample(texts: dict[int, str], step: int) -> Sample:
    text = re.sub(r"\n\s*\n", "\n\n", texts[step].strip())  # what early models write most is empty lines
    return Sample(step, text if len(text) <= MAX_SAMPLE_CHARS else f"{text[:MAX_SAMPLE_CHARS]} ...")


def compare_settings(runs: Sequence[RunHistory]) -> dict[str, list[str]]:
    """Of every setting, what each run has; one value where all have the same."""
    trees = [leaves(run.recipe) for run in runs]
    values = {name: [format_setting(tree[name]) for tree in trees] for name in trees[0]}
    return {name: run_values[:1] if len(set(run_values)) == 1 else run_values for name, run_values in values.items()}


def format_setting(value: Any) -> str:
    """A value as a recipe says it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return (
            ", ".join(f"{key} {format_setting(item)}" for key, item in value.items() if item is not None) or "nothing"
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(format_setting, value)) or "nothing"
    return str(value) or '""'


def timeline(run: RunHistory) -> Iterator[Event]:
    """Starts, ends and incidents, oldest first. An incident has no time: it follows the last start it can belong to."""
    start_steps = [start["step"] for start in run.starts]
    owners = [
        max((i for i, step in enumerate(start_steps) if step < incident["step"]), default=-1)
        for incident in run.incidents
    ]
    yield from (_incident_event(incident) for incident, owner in zip(run.incidents, owners, strict=True) if owner < 0)
    for number, start in enumerate(run.starts):
        label = "resumed" if start["step"] else "started again" if number else "began"
        yield Event(
            format_time(start.get("time")), start["step"], label, str(start.get("name") or start.get("device") or "")
        )
        yield from (
            _incident_event(incident) for incident, owner in zip(run.incidents, owners, strict=True) if owner == number
        )
        yield _end_event(run, start, last=number == len(start_steps) - 1)


def _end_event(run: RunHistory, start: Record, last: bool) -> Event:
    match start.get("ended"):
        case {"state": str(state), **ending}:
            return Event(format_time(ending.get("time")), None, state, str(ending.get("reason") or ""))
    return (
        Event("", None, run.state, run.reason) if last else Event("", None, "ended", "without a word: killed, perhaps")
    )


def _incident_event(record: Record) -> Event:
    labels = {"skip": "update left out", "rewind": f"taken back to step {record.get('to')}", "stop": "given up"}
    return Event("", record["step"], labels.get(record["kind"], record["kind"]), str(record.get("reason") or ""))


def environments(run: RunHistory) -> Iterator[Machine]:
    """The machine of each start."""
    before: dict[str, str] = {}
    for number, start in enumerate(run.starts, 1):
        metadata = dict(_flatten_metadata({key: value for key, value in start.items() if key not in NON_MACHINE_KEYS}))
        changed = {key: value for key, value in metadata.items() if before.get(key) != value}
        yield Machine(number, start["step"], format_time(start.get("time")), changed)
        before = metadata


def _flatten_metadata(metadata: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in metadata.items():
        if isinstance(value, dict):
            yield from _flatten_metadata(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", format_setting(value)


def format_time(timestamp: Any) -> str:
    """Day and minute of a time as runs write it."""
    return str(timestamp or "")[:16].replace("T", " ")
