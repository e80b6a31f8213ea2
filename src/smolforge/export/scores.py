"""What was measured of a model: while it was trained, and what `evaluate --json` told of it since."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.checkpoint import resolve
from smolforge.errors import InvalidFile, SettingError
from smolforge.evaluation.multiple_choice import standard_error
from smolforge.evaluation.tasks import NAMED
from smolforge.export.origin import Origin

WAYS = ("acc", "acc_norm", "acc_chars")
HELD_OUT = "held-out part of the corpus"


class Score(NamedTuple):
    """One number."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    """Items, or tokens."""
    how: str
    """When it was measured, and on what."""

    @property
    def dataset(self) -> str | None:
        """On the Hub."""
        return NAMED[self.task].path if self.task in NAMED else None


def scores(known: Origin, told: Path | None = None) -> list[Score]:
    """All there are; `told` is a file with what `evaluate --json` printed, of this very model.

    Raises InvalidFile for a file that is none, SettingError where it tells of another model.
    """
    return [*(_told(known, told) if told else []), *_while_training(known)]


def _while_training(known: Origin) -> list[Score]:
    if known.run is None:
        return []
    step, held_out = known.run.newest("validation_")
    found = [
        Score(HELD_OUT, key.removeprefix("validation_"), value, None, None, f"step {step:,}")
        for key, value in held_out.items()
    ]
    step, tasks = known.run.newest("task_")
    for key, value in tasks.items():
        name, way = next(((key[5 : -len(w) - 1], w) for w in WAYS if key.endswith(f"_{w}")), ("", ""))
        if name:
            n = tasks.get(f"task_{name}_n")
            error = standard_error(value, int(n)) if n else None
            found.append(Score(name, way, value, error, int(n) if n else None, f"step {step:,}"))
    return found


def _told(known: Origin, path: Path) -> list[Score]:
    try:
        said = json.loads(path.read_text("utf-8"))
        model, measured, tasks = said["model"], said["weights"], said["tasks"]
        found = [score for name, values in tasks.items() for score in _of_task(name, values)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidFile(f"{path} is not what smolforge evaluate MODEL --json prints") from None
    if measured != resolve.fingerprint(known.folder):
        raise SettingError(f"{path} has the scores of {model} with other weights than those in {known.folder}")
    return found


def _of_task(name: str, values: dict[str, Any]) -> list[Score]:
    """A task's accuracies with their errors, or a text's loss and what goes with it."""
    n = values.get("n", values.get("tokens"))
    shots = values.get("few_shot")
    how = f"smolforge evaluate, {shots or 0}-shot" if "n" in values else "smolforge evaluate"
    numbers = {key: value for key, value in values.items() if isinstance(value, float) and "_stderr" not in key}
    return [Score(name, key, value, values.get(_error_of(key)), n, how) for key, value in numbers.items()]


def _error_of(key: str) -> str:
    """acc -> acc_stderr; the harness's acc,none -> acc_stderr,none."""
    metric, comma, rest = key.partition(",")
    return f"{metric}_stderr{comma}{rest}"
