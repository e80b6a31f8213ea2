"""Runs as a table: what each is doing, how far it came, how good and how fast it is, why it ended."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Literal

from smolforge.comparison import history
from smolforge.comparison.history import RunHistory, State
from smolforge.comparison.select import Selection
from smolforge.training.environment import ENVIRONMENT
from smolforge.training.run_folder import METRICS

MISSING = "-"


@dataclass(frozen=True)
class RunRow:
    """One run; what it does not know is None. Rates and losses are its newest."""

    run: str
    path: str | None
    state: State | Literal["broken"]
    step: int | None
    steps: int | None
    tokens: int | None
    loss: float | None
    validation_loss: float | None
    validation_bits_per_byte: float | None
    tokens_per_second: float | None
    seconds: float | None
    """Of training, without pauses."""
    resumed: list[int]
    """After these steps."""
    changed: str | None
    """When it last wrote something down."""
    why: str
    """Why it is in this state."""
    sources: dict[str, int] = field(default_factory=dict)
    """Tokens learned from each source of a mixture."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def table_rows(selection: Selection) -> list[RunRow]:
    """The runs in their order, and after them those that cannot be read."""
    broken = [
        RunRow(name, None, "broken", None, None, None, None, None, None, None, None, [], None, reason)
        for name, reason in selection.broken.items()
    ]
    return [*map(run_row, selection.runs), *broken]


def run_row(run: RunHistory) -> RunRow:
    """One run's line."""
    return RunRow(
        run=run.name,
        path=str(run.path),
        state=run.state,
        step=run.step,
        steps=run.steps,
        tokens=int(run.tokens[-1]) if run.metrics else 0,
        loss=run.newest("loss"),
        validation_loss=run.newest("validation_loss"),
        validation_bits_per_byte=run.newest("validation_bits_per_byte"),
        tokens_per_second=run.tokens_per_second,
        seconds=float(run.seconds[-1]) if run.metrics else 0.0,
        resumed=run.resumes,
        changed=_last_change(run),
        why=run.reason,
        sources={totals.source: totals.tokens for totals in history.read_source_totals(run)},
    )


def _last_change(run: RunHistory) -> str | None:
    times = [file.stat().st_mtime for name in (METRICS, ENVIRONMENT) if (file := run.path / name).is_file()]
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(max(times))) if times else None


COLUMNS: dict[str, Callable[[RunRow], str]] = {
    "run": lambda row: row.run,
    "state": lambda row: row.state,
    "step": lambda row: MISSING if row.step is None else f"{row.step:,} of {row.steps:,}",
    "loss": lambda row: format_number(row.loss, ".3f"),
    "held out": lambda row: format_number(row.validation_loss, ".3f"),
    "bits/byte": lambda row: format_number(row.validation_bits_per_byte, ".3f"),
    "tokens/s": lambda row: format_number(row.tokens_per_second, ",.0f"),
    "time": lambda row: MISSING if row.seconds is None else str(timedelta(seconds=round(row.seconds))),
    "last change": lambda row: (row.changed or MISSING)[:16].replace("T", " "),
    "why": lambda row: row.why,
}
"""What people see, by its heading."""
TEXT_COLUMNS = ("run", "state", "why")
"""Columns of words, which begin at the left."""


def format_number(value: float | None, spec: str) -> str:
    """As people read it; a dash where there is none."""
    return MISSING if value is None else format(value, spec)


def format_table(table: Sequence[RunRow], clean: Callable[[str], str] = str) -> list[str]:
    """The table as text, a heading first, each cell cleaned of what does not belong on a terminal."""
    cells = [list(COLUMNS), *([clean(say(row)) for say in COLUMNS.values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if name in TEXT_COLUMNS else ">" for name in COLUMNS]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in cells
    ]
