"""Where a MODEL comes from, as far as its folder tells: the run behind it, what that read, and what it began with.

RUN/checkpoints/step-N  ->  recipe.toml, metrics.jsonl up to N, environment.json, corpus.json of what it read
a Hub id                ->  the repository and its commit
any other folder        ->  its shape

What was measured of a model: while it was trained, and what `evaluate --json` told of it since.
"""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.checkpoint import hub, loading, peft_adapter, training_state
from smolforge.config import ModelConfig, Recipe
from smolforge.config.load import read_recipe
from smolforge.data.mixture import Mixture, reopened
from smolforge.data.sources import on_hub
from smolforge.errors import InvalidFile, SettingError
from smolforge.evaluation.multiple_choice import standard_error
from smolforge.evaluation.tasks import NAMED
from smolforge.training.environment import starts
from smolforge.training.run_folder import METRICS, RECIPE, read_records

SMOLLM = "HuggingFaceTB/SmolLM"
ONLY = ""
_PINNED = re.compile(r"[^/@]+/[^/@]+@[0-9a-f]{40}")
"""How a run writes down a model of the Hub; a folder may look like an id as well."""


@dataclass(frozen=True)
class Run:
    """What a run wrote down, up to the step of a checkpoint."""

    path: Path
    step: int
    recipe: Recipe = field(repr=False)
    metrics: list[dict[str, Any]] = field(repr=False)
    starts: list[dict[str, Any]] = field(repr=False)
    corpora: dict[str, dict[str, Any]] = field(repr=False)
    """corpus.json of each source of a mixture by its name, or of the one corpus by ONLY; of what is still there."""

    @property
    def stamps(self) -> dict[str, list[Any]]:
        """Sources, and what they were: of a data set of the Hub its commit, of files three numbers."""
        asked = [facts.get("request", {}).get("files", {}) for facts in self.corpora.values()]
        return {source: stamp for files in asked for source, stamp in files.items()}

    def short(self, name: str) -> str:
        """What a recipe names, without the place it had on a machine."""
        stamp = self.stamps.get(name)
        remote = len(stamp) == 1 if stamp else _PINNED.fullmatch(name) or on_hub(name)
        return name if remote else last_part(name)

    @property
    def tokens(self) -> int:
        """That it learned from."""
        return self.metrics[-1]["tokens"] if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Of training, pauses between starts left out."""
        return sum(_seconds(record, self.recipe.train.batch_tokens) for record in self.metrics)

    def newest(self, prefix: str) -> tuple[int, dict[str, float]]:
        """The latest step that measured what begins so, and its numbers."""
        for record in reversed(self.metrics):
            found = {key: value for key, value in record.items() if key.startswith(prefix) and _is_number(value)}
            if found:
                return record["step"], found
        return 0, {}


@dataclass(frozen=True)
class Origin:
    """What is known of a model."""

    folder: Path
    config: ModelConfig
    run: Run | None
    base: str | None
    """The MODEL that its weights began as, or are: org/name@commit, or the name of a folder."""

    @property
    def base_repo(self) -> str | None:
        """Where that is a repository of the Hub."""
        return self.base.partition("@")[0] if self.base is not None and _PINNED.fullmatch(self.base) else None

    @property
    def from_smollm(self) -> bool:
        return (self.base_repo or "").startswith(SMOLLM)


def origin(model: str | Path) -> Origin:
    """Raises as resolve.find, and InvalidFile for a run whose files are broken."""
    folder = loading.find(model)
    config = loading.read_config(folder)
    inside = folder.parent.name == "checkpoints" and (folder.parent.parent / RECIPE).is_file()
    run = _run(folder.parent.parent, folder) if inside else None
    if run is not None:
        return Origin(folder, config, run, _remote(run.recipe.init_from))
    base = _remote(loading.pinned(peft_adapter.base_of(folder))) if peft_adapter.is_adapter(folder) else None
    if base is None and not Path(model).exists():
        base = f"{hub.split_id(str(model))[0]}@{folder.name}"
    return Origin(folder, config, None, base)


def _run(path: Path, checkpoint: Path) -> Run:
    step, recipe = training_state.step_of(checkpoint), read_recipe(path / RECIPE)
    metrics = [record for record in read_records(path / METRICS) if record.get("step", math.inf) <= step]
    began = starts(path)
    taken = [start for start in began if start.get("step", 0) < step] or began[:1]
    return Run(
        path, step, recipe, metrics, taken, _corpora(path, recipe, training_state.read_facts(checkpoint)["corpus"])
    )


def _corpora(path: Path, recipe: Recipe, fingerprint: str) -> dict[str, dict[str, Any]]:
    """What a checkpoint learned from, where that is still there and the same: the run's own, or one that was named."""
    for place in (path, path / "corpus", *map(Path, recipe.data.sources)):
        with suppress(InvalidFile, OSError):
            text = reopened(place)
            if text.fingerprint == fingerprint:
                sources = text.sources if isinstance(text, Mixture) else {ONLY: text}
                return {name: each.facts for name, each in sources.items()}
    return {}


def _remote(base: str | None) -> str | None:
    """The name of what a run began with; of a folder, without where it was on the machine."""
    return base if base is None or _PINNED.fullmatch(base) else last_part(base)


def last_part(place: str) -> str:
    """The name of a file or folder, whichever way its machine cuts paths."""
    return re.split(r"[\\/]", place.rstrip("\\/"))[-1]


def _seconds(record: dict[str, Any], batch_tokens: int) -> float:
    parts = [value for key, value in record.items() if key.startswith("seconds_") and key != "seconds_left"]
    if parts:
        return math.fsum(value for value in parts if _is_number(value))
    speed = record.get("tokens_per_second")
    return batch_tokens / speed if _is_number(speed) and speed else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    if measured != loading.fingerprint(known.folder):
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
