"""Runs as a table: what each is doing, how far it came, how good and how fast it is, why it ended."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Literal

from smolforge.comparison import history
from smolforge.comparison.history import History, State
from smolforge.comparison.select import Selection
from smolforge.training.environment import ENVIRONMENT
from smolforge.training.run_folder import METRICS

NOTHING = "-"


@dataclass(frozen=True)
class Row:
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


def rows(selection: Selection) -> list[Row]:
    """The runs in their order, and after them those that cannot be read."""
    broken = [
        Row(name, None, "broken", None, None, None, None, None, None, None, None, [], None, why)
        for name, why in selection.broken.items()
    ]
    return [*map(row, selection.runs), *broken]


def row(run: History) -> Row:
    """One run's line."""
    return Row(
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
        changed=_changed(run),
        why=run.why,
        sources={each.source: each.tokens for each in history.read_source_totals(run)},
    )


def _changed(run: History) -> str | None:
    times = [file.stat().st_mtime for name in (METRICS, ENVIRONMENT) if (file := run.path / name).is_file()]
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(max(times))) if times else None


COLUMNS: dict[str, Callable[[Row], str]] = {
    "run": lambda row: row.run,
    "state": lambda row: row.state,
    "step": lambda row: NOTHING if row.step is None else f"{row.step:,} of {row.steps:,}",
    "loss": lambda row: number(row.loss, ".3f"),
    "held out": lambda row: number(row.validation_loss, ".3f"),
    "bits/byte": lambda row: number(row.validation_bits_per_byte, ".3f"),
    "tokens/s": lambda row: number(row.tokens_per_second, ",.0f"),
    "time": lambda row: NOTHING if row.seconds is None else str(timedelta(seconds=round(row.seconds))),
    "last change": lambda row: (row.changed or NOTHING)[:16].replace("T", " "),
    "why": lambda row: row.why,
}
"""What people see, by its heading."""
WORDS = ("run", "state", "why")
"""Columns of words, which begin at the left."""


def number(value: float | None, form: str) -> str:
    """As people read it; a dash where there is none."""
    return NOTHING if value is None else format(value, form)


def lines(table: Sequence[Row], clean: Callable[[str], str] = str) -> list[str]:
    """The table as text, a heading first, each cell cleaned of what does not belong on a terminal."""
    cells = [list(COLUMNS), *([clean(say(row)) for say in COLUMNS.values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if name in WORDS else ">" for name in COLUMNS]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in cells
    ]
