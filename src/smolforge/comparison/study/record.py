"""What a study found, as data: study.json is all of it, and reads back as the same, so that a report needs no runs.

Whatever depends on how fast the machine was stands under `speed`; all else is the same however often a study was
stopped and went on.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smolforge import __version__
from smolforge.comparison.statistics import POWER, Difference
from smolforge.comparison.study.law import LawFound
from smolforge.comparison.study.read import StudySettings
from smolforge.errors import InvalidFile


@dataclass(frozen=True)
class Mean:
    """Of a variant's finished runs."""

    n: int
    mean: float
    spread: float | None
    """Standard deviation over seeds; None of one."""


@dataclass(frozen=True)
class Rates:
    """How a variant came to its learning rate."""

    means: dict[float, float | None]
    """The metric's mean at each factor; None where a run failed."""
    factor: float | None
    at_the_end: bool
    """Whether the best is the first or the last that was tried, so that a better one may lie beyond."""


@dataclass(frozen=True)
class Run:
    """One that came to its end: what it measured on held-out text, and when."""

    variant: str
    measured: list[dict[str, int | float | None]]
    """step, tokens, validation_loss, validation_bits_per_byte, validation_accuracy."""
    speed: dict[str, Any]
    """machine, tokens_per_second, and `seconds` of training until each of those."""


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    changes: dict[str, Any]
    values: dict[int, float]
    """The metric by seed, of the runs that came to their end."""
    failed: dict[str, str]
    """Why each other run did not, by its name."""
    mean: float | None
    spread: float | None
    """Standard deviation over seeds."""
    also: dict[str, Mean]
    """What else was measured of the trained models: validation_accuracy, and of each task TASK.acc and so on."""
    difference: Difference | None
    """To the baseline; None of the baseline itself."""
    verdict: str
    rates: Rates | None
    steps: int
    cost: dict[str, int]
    """parameters, active, flops_per_token, kv_bytes_per_token, tokens, flops, predicted_memory_bytes."""
    speed: dict[str, Any]
    """tokens_per_second and seconds of runs, decode_tokens_per_second of each round, peak_memory_bytes."""


@dataclass(frozen=True)
class Findings:
    """All that a study found."""

    study: str
    recipe: str
    """Its name."""
    common: dict[str, Any]
    """What all variants change in it."""
    settings: StudySettings
    variants: list[Variant]
    runs: dict[str, Run]
    """By name."""
    law: LawFound | None

    def of(self, variant: str) -> list[Run]:
        """Its runs, by seed."""
        return [run for run in self.runs.values() if run.variant == variant]

    def as_json(self) -> dict[str, Any]:
        """Every number, as study.json has it."""
        head = {"study": self.study, "version": __version__, "power": POWER, "recipe": self.recipe}
        return {
            **head,
            "common": self.common,
            "settings": self.settings.model_dump(mode="json", exclude_none=True),
            "variants": {each.name: asdict(each) for each in self.variants},
            "law": self.law and asdict(self.law),
            "runs": {name: asdict(run) for name, run in self.runs.items()},
        }


def recorded(path: Path) -> Findings:
    """The findings in a study.json. Raises InvalidFile where it is none."""
    try:
        tree = json.loads(path.read_text("utf-8"))
        known = {name: tree[name] for name in ("study", "recipe", "common", "settings", "law", "runs")}
        return TypeAdapter(Findings).validate_python({**known, "variants": list(tree["variants"].values())})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise InvalidFile(f"{path} is no study's: {' '.join(str(error).split())[:200]}") from None
