"""What runs read of each source of their mixtures: tokens, their share, epochs, and the loss held out of each."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from smolforge.comparison.history import History
from smolforge.data.mixture import FILE

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


def read(run: History) -> list[Read]:
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
    return {run.name: found for run in runs if (found := read(run))}
