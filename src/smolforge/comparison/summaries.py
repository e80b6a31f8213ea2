"""What runs say in words, put side by side: samples, settings, what happened when, the machines."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from smolforge.comparison.history import History, Record
from smolforge.config.base import leaves

MOST_SAMPLES = 8
"""Rows of samples of one prompt; the rest is in the runs."""
LONGEST_SAMPLE = 900
"""Characters."""
NOT_THE_MACHINE = ("step", "time", "ended")
"""Of a start in environment.json."""


class Sample(NamedTuple):
    """A text that a run wrote after a step."""

    step: int
    text: str


class Samples(NamedTuple):
    """Texts after one prompt: of each row, one for each run or None, from about the same step."""

    prompt: str
    rows: list[list[Sample | None]]
    left_out: int


class Event(NamedTuple):
    """Something that happened to a run; what is not known is empty."""

    time: str
    step: int | None
    what: str
    said: str


class Machine(NamedTuple):
    """What a start ran on; of later starts, what is not as before."""

    number: int
    step: int
    time: str
    facts: dict[str, str]


def samples(runs: Sequence[History]) -> list[Samples]:
    """For each prompt that any run was given."""
    prompts = dict.fromkeys(sample["prompt"] for run in runs for sample in run.samples)
    return [_of_prompt(prompt, runs) for prompt in prompts]


def _of_prompt(prompt: str, runs: Sequence[History]) -> Samples:
    """Steps spread evenly over those of the run that has most samples; one that ended before them shows its last."""
    by_run = [{each["step"]: each["text"] for each in run.samples if each["prompt"] == prompt} for run in runs]
    steps = sorted(max(by_run, key=len))
    count = min(MOST_SAMPLES, len(steps))
    chosen = [steps[(len(steps) - 1) * index // max(1, count - 1)] for index in range(count)] if count > 1 else steps
    rows = [[_nearest(texts, step, steps) for texts in by_run] for step in chosen]
    for place, texts in enumerate(by_run):
        if texts and all(row[place] is None for row in rows):
            rows[0][place] = _sample(texts, max(texts))
    return Samples(prompt, rows, len(steps) - len(chosen))


def _nearest(texts: dict[int, str], step: int, steps: list[int]) -> Sample | None:
    """A run's text from a step nearer to this one than to the next that another run has a text from."""
    apart = min((after - before for before, after in pairwise(steps)), default=step)
    near = min(texts, key=lambda each: abs(each - step), default=None)
    if near is None or 2 * abs(near - step) > apart:
        return None
    return _sample(texts, near)


def _sample(texts: dict[int, str], step: int) -> Sample:
    text = re.sub(r"\n\s*\n", "\n\n", texts[step].strip())  # what early models write most is empty lines
    return Sample(step, text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} ...")


def settings(runs: Sequence[History]) -> dict[str, list[str]]:
    """Of every setting, what each run has; one value where all have the same."""
    trees = [leaves(run.recipe) for run in runs]
    values = {name: [written(tree[name]) for tree in trees] for name in trees[0]}
    return {name: each[:1] if len(set(each)) == 1 else each for name, each in values.items()}


def written(value: Any) -> str:
    """A value as a recipe says it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{key} {written(inner)}" for key, inner in value.items() if inner is not None) or "nothing"
    if isinstance(value, list | tuple):
        return ", ".join(map(written, value)) or "nothing"
    return str(value) or '""'


def timeline(run: History) -> Iterator[Event]:
    """Starts, ends and incidents, oldest first. An incident has no time: it follows the last start it can belong to."""
    begins = [start["step"] for start in run.starts]
    owners = [max((i for i, step in enumerate(begins) if step < each["step"]), default=-1) for each in run.incidents]
    yield from (_incident(each) for each, owner in zip(run.incidents, owners, strict=True) if owner < 0)
    for number, start in enumerate(run.starts):
        what = "resumed" if start["step"] else "started again" if number else "began"
        yield Event(clock(start.get("time")), start["step"], what, str(start.get("name") or start.get("device") or ""))
        yield from (_incident(each) for each, owner in zip(run.incidents, owners, strict=True) if owner == number)
        yield _end(run, start, last=number == len(begins) - 1)


def _end(run: History, start: Record, last: bool) -> Event:
    match start.get("ended"):
        case {"state": str(state), **rest}:
            return Event(clock(rest.get("time")), None, state, str(rest.get("reason") or ""))
    return Event("", None, run.state, run.why) if last else Event("", None, "ended", "without a word: killed, perhaps")


def _incident(record: Record) -> Event:
    words = {"skip": "update left out", "rewind": f"taken back to step {record.get('to')}", "stop": "given up"}
    return Event("", record["step"], words.get(record["kind"], record["kind"]), str(record.get("reason") or ""))


def environments(run: History) -> Iterator[Machine]:
    """The machine of each start."""
    before: dict[str, str] = {}
    for number, start in enumerate(run.starts, 1):
        facts = dict(_flat({key: value for key, value in start.items() if key not in NOT_THE_MACHINE}))
        changed = {key: value for key, value in facts.items() if before.get(key) != value}
        yield Machine(number, start["step"], clock(start.get("time")), changed)
        before = facts


def _flat(facts: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", written(value)


def clock(said: Any) -> str:
    """Day and minute of a time as runs write it."""
    return str(said or "")[:16].replace("T", " ")
