"""Runs side by side, as a report: a table, figures, samples, settings, what happened, the machine of each start."""

import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smolforge.comparison import page
from smolforge.comparison.figures import FIGURES
from smolforge.comparison.history import Record, RunHistory, Selection, State, read_source_totals
from smolforge.comparison.page import MISSING, Report, Table, format_number
from smolforge.config.base import leaves
from smolforge.formatting import flatten, format_setting
from smolforge.training.environment import ENVIRONMENT
from smolforge.training.run_folder import METRICS

TABS = {"loss-tokens": "tokens", "loss-steps": "steps", "loss-seconds": "time"}
CAPTIONS = {
    **dict.fromkeys(TABS, ("Loss", "Of the very first steps, what lies above the frame is cut.")),
    "learning-rate": ("Learning rate", ""),
    "gradient-norm": ("Gradient norm", "Of all gradients together, before clipping."),
    "speed": ("Speed", "Without the time between steps. Utilisation counts causal attention, after PaLM."),
    "step-time": (
        "Where a step's time goes",
        "Mean of all steps but the first after a start. Between steps lie measuring, sampling and saving.",
    ),
}
MAX_SAMPLES = 8
"""Rows of samples of one prompt; the rest is in the runs."""
MAX_SAMPLE_CHARS = 900
"""Characters."""
NON_MACHINE_KEYS = ("step", "time", "ended")
"""Of a start in environment.json."""


@dataclass(frozen=True)
class RunRow:
    """One run; what it does not know is None. Rates and losses are its newest."""

    run: str
    path: str | None = None
    state: State | Literal["broken"] = "broken"
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    """Of training, without pauses."""
    resumed: list[int] = field(default_factory=list)
    """After these steps."""
    changed: str | None = None
    """When it last wrote something down."""
    why: str = ""
    """Why it is in this state."""
    sources: dict[str, int] = field(default_factory=dict)
    """Tokens learned from each source of a mixture."""


def table_rows(selection: Selection) -> list[RunRow]:
    """The runs in their order, and after them those that cannot be read."""
    return [*map(run_row, selection.runs), *(RunRow(name, why=reason) for name, reason in selection.broken.items())]


def run_row(run: RunHistory) -> RunRow:
    """One run's line."""
    return RunRow(
        run=run.name,
        path=str(run.path),
        state=run.state,
        step=run.step,
        steps=run.steps,
        tokens=int(run.tokens[-1]) if run.metrics else 0,
        seconds=float(run.seconds[-1]) if run.metrics else 0.0,
        tokens_per_second=run.tokens_per_second,
        resumed=run.resumes,
        changed=_last_change(run),
        why=run.reason,
        sources={totals.source: totals.tokens for totals in read_source_totals(run)},
        **{key: run.newest(key) for key in ("loss", "validation_loss", "validation_bits_per_byte")},
    )


def _last_change(run: RunHistory) -> str | None:
    times = [file.stat().st_mtime for name in (METRICS, ENVIRONMENT) if (file := run.path / name).is_file()]
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(max(times))) if times else None


def runs_table(rows: Sequence[RunRow], omit: Collection[str] = ()) -> Table:
    """What people see of them; the lowest held-out loss stands out, where there are several to choose from."""
    columns = {
        "run": lambda row: row.run,
        "state": lambda row: row.state,
        "step": lambda row: MISSING if row.step is None else f"{row.step:,} of {row.steps:,}",
        "loss": lambda row: format_number(row.loss, ".3f"),
        "held out": lambda row: format_number(row.validation_loss, ".3f"),
        "bits/byte": lambda row: format_number(row.validation_bits_per_byte, ".3f"),
        "tokens/s": lambda row: format_number(row.tokens_per_second, ",.0f"),
        "time": lambda row: MISSING if row.seconds is None else str(timedelta(seconds=round(row.seconds))),
        "last change": lambda row: format_time(row.changed) or MISSING,
        "why": lambda row: row.why,
    }
    columns = {name: cell for name, cell in columns.items() if name not in omit}
    losses = [(row.validation_loss, row.run) for row in rows if row.validation_loss is not None]
    best = (min(losses)[1], "held out") if len(losses) > 1 else None
    return Table("", list(columns), [[cell(row) for cell in columns.values()] for row in rows], ("state", "why"), best)


def source_tables(runs: Sequence[RunHistory]) -> Iterator[Table]:
    """What each run that has a mixture read."""
    for run in runs:
        rows = [
            [
                totals.source,
                f"{totals.tokens:,}",
                f"{totals.share:.2%}",
                format_number(totals.epochs, ".2f"),
                format_number(totals.validation_loss, ".3f"),
            ]
            for totals in read_source_totals(run)
        ]
        if rows:
            title = "What was read" if len(runs) == 1 else f"What was read by {run.name}"
            yield Table(title, ["source", "tokens", "share", "epochs", "held out"], rows)


def runs_report(selection: Selection) -> Report:
    """All that their page shows."""
    runs, rows = selection.runs, table_rows(selection)
    return Report(
        kind="runs",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        names=[run.name for run in runs],
        tables=[runs_table(rows, omit=("last change",)), *source_tables(runs)],
        tabs=TABS,
        captions=CAPTIONS,
        details={
            "runs": runs,
            "samples": samples_by_prompt(runs),
            "settings": compare_settings(runs),
            "timelines": {run.name: list(timeline(run)) for run in runs},
            "environments": {run.name: list(environments(run)) for run in runs},
        },
    )


def write_report(selection: Selection, out: Path) -> list[Path]:
    """Write the page and the figures into a folder; returns the files, the page first. Raises OSError."""
    figures = {name: partial(draw, selection.runs) for name, draw in FIGURES.items()}
    return page.write_page(runs_report(selection), figures, out)


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


def timeline(run: RunHistory) -> Iterator[Event]:
    """Starts, ends and incidents, oldest first. An incident has no time: it follows the last start it can belong to."""
    start_steps = [start["step"] for start in run.starts]
    incidents: dict[int, list[Event]] = defaultdict(list)
    for incident in run.incidents:
        owner = max((number for number, step in enumerate(start_steps) if step < incident["step"]), default=-1)
        incidents[owner].append(_incident_event(incident))
    yield from incidents[-1]
    for number, start in enumerate(run.starts):
        label = "resumed" if start["step"] else "started again" if number else "began"
        machine = str(start.get("name") or start.get("device") or "")
        yield Event(format_time(start.get("time")), start["step"], label, machine)
        yield from incidents[number]
        yield _end_event(run, start, last=number == len(start_steps) - 1)


def _end_event(run: RunHistory, start: Record, last: bool) -> Event:
    match start.get("ended"):
        case {"state": str(state), **ending}:
            return Event(format_time(ending.get("time")), None, state, str(ending.get("reason") or ""))
    state, reason = (run.state, run.reason) if last else ("ended", "without a word: killed, perhaps")
    return Event("", None, state, reason)


def _incident_event(record: Record) -> Event:
    labels = {"skip": "update left out", "rewind": f"taken back to step {record.get('to')}", "stop": "given up"}
    return Event("", record["step"], labels.get(record["kind"], record["kind"]), str(record.get("reason") or ""))


def environments(run: RunHistory) -> Iterator[Machine]:
    """The machine of each start."""
    before: dict[str, str] = {}
    for number, start in enumerate(run.starts, 1):
        facts = flatten({key: value for key, value in start.items() if key not in NON_MACHINE_KEYS})
        metadata = {key: format_setting(value) for key, value in facts.items()}
        changed = {key: value for key, value in metadata.items() if before.get(key) != value}
        yield Machine(number, start["step"], format_time(start.get("time")), changed)
        before = metadata


def format_time(timestamp: Any) -> str:
    """Day and minute of a time as runs write it."""
    return str(timestamp or "")[:16].replace("T", " ")
