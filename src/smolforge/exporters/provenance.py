"""Find where a MODEL comes from, as far as its folder tells: its run, training data, base model and scores.

RUN/checkpoints/step-N  ->  recipe.toml, metrics.jsonl up to N, environment.json, corpus.json of the training data
a Hub id                ->  the repository and its commit
any other folder        ->  its shape

Scores come from the run's own metrics and from a file that `evaluate --json` printed.
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
from smolforge.data.mixture import Mixture, PreparedData, open_prepared
from smolforge.data.sources import is_on_hub
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.multiple_choice import standard_error
from smolforge.evaluation.tasks import HUB_TASKS
from smolforge.training.environment import starts
from smolforge.training.run_folder import METRICS, RECIPE, read_records

SMOLLM = "HuggingFaceTB/SmolLM"
SINGLE_CORPUS = ""
_PINNED = re.compile(r"[^/@]+/[^/@]+@[0-9a-f]{40}")
"""How a run writes down a model of the Hub; a folder may look like an id as well."""
ACCURACIES = ("acc", "acc_norm", "acc_chars")
VALIDATION_TASK = "held-out part of the corpus"


@dataclass(frozen=True)
class RunProvenance:
    """What a run wrote down, up to the step of a checkpoint."""

    path: Path
    step: int
    recipe: Recipe = field(repr=False)
    metrics: list[dict[str, Any]] = field(repr=False)
    starts: list[dict[str, Any]] = field(repr=False)
    corpora: dict[str, dict[str, Any]] = field(repr=False)
    """corpus.json of each source of a mixture by its name, or of the one corpus by ONLY; of what is still there."""

    @property
    def source_stamps(self) -> dict[str, list[Any]]:
        """Sources, and what they were: of a data set of the Hub its commit, of files three numbers."""
        files_by_corpus = [metadata.get("request", {}).get("files", {}) for metadata in self.corpora.values()]
        return {source: stamp for files in files_by_corpus for source, stamp in files.items()}

    def portable_name(self, name: str) -> str:
        """What a recipe names, without the place it had on a machine."""
        stamp = self.source_stamps.get(name)
        remote = len(stamp) == 1 if stamp else _PINNED.fullmatch(name) or is_on_hub(name)
        return name if remote else file_name(name)

    @property
    def tokens(self) -> int:
        """That it learned from."""
        return self.metrics[-1]["tokens"] if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Of training, pauses between starts left out."""
        return sum(_step_seconds(record, self.recipe.train.batch_tokens) for record in self.metrics)

    def newest(self, prefix: str) -> tuple[int, dict[str, float]]:
        """The latest step that measured what begins so, and its numbers."""
        for record in reversed(self.metrics):
            numbers = {key: value for key, value in record.items() if key.startswith(prefix) and _is_number(value)}
            if numbers:
                return record["step"], numbers
        return 0, {}


@dataclass(frozen=True)
class Origin:
    """What is known of a model."""

    folder: Path
    config: ModelConfig
    run: RunProvenance | None
    base: str | None
    """The MODEL that its weights began as, or are: org/name@commit, or the name of a folder."""

    @property
    def base_repo(self) -> str | None:
        """Where that is a repository of the Hub."""
        return self.base.partition("@")[0] if self.base is not None and _PINNED.fullmatch(self.base) else None

    @property
    def from_smollm(self) -> bool:
        return (self.base_repo or "").startswith(SMOLLM)


def read_origin(model: str | Path) -> Origin:
    """Raises as loading.resolve_model_path, and InvalidFileError for a run whose files are broken."""
    folder = loading.resolve_model_path(model)
    config = loading.read_config(folder)
    inside = folder.parent.name == "checkpoints" and (folder.parent.parent / RECIPE).is_file()
    run = _read_run(folder.parent.parent, folder) if inside else None
    if run is not None:
        return Origin(folder, config, run, _without_path(run.recipe.init_from))
    base = (
        _without_path(loading.pin_revision(peft_adapter.base_model_of(folder)))
        if peft_adapter.is_adapter(folder)
        else None
    )
    if base is None and not Path(model).exists():
        base = f"{hub.split_hub_id(str(model))[0]}@{folder.name}"
    return Origin(folder, config, None, base)


def _read_run(path: Path, checkpoint: Path) -> RunProvenance:
    step, recipe = training_state.step_from_dir(checkpoint), read_recipe(path / RECIPE)
    metrics = [record for record in read_records(path / METRICS) if record.get("step", math.inf) <= step]
    all_starts = starts(path)
    used_starts = [start for start in all_starts if start.get("step", 0) < step] or all_starts[:1]
    return RunProvenance(
        path,
        step,
        recipe,
        metrics,
        used_starts,
        _read_corpora(path, recipe, checkpoint),
    )


def _read_corpora(path: Path, recipe: Recipe, checkpoint: Path) -> dict[str, dict[str, Any]]:
    text = training_data(path, recipe, checkpoint)
    corpora = {} if text is None else text.sources if isinstance(text, Mixture) else {SINGLE_CORPUS: text}
    return {name: corpus.metadata for name, corpus in corpora.items()}


def training_data(path: Path, recipe: Recipe, checkpoint: Path) -> PreparedData | None:
    """Return what a checkpoint learned from, where that is still there and the same: the run's own, or a named one."""
    fingerprint = training_state.read_metadata(checkpoint)["corpus"]
    for candidate in (path, path / "corpus", *map(Path, recipe.data.sources)):
        with suppress(InvalidFileError, OSError):
            text = open_prepared(candidate)
            if text.fingerprint == fingerprint:
                return text
    return None


def _without_path(base: str | None) -> str | None:
    """The name of what a run began with; of a folder, without where it was on the machine."""
    return base if base is None or _PINNED.fullmatch(base) else file_name(base)


def file_name(path: str) -> str:
    """The name of a file or folder, whichever way its machine cuts paths."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _step_seconds(record: dict[str, Any], batch_tokens: int) -> float:
    parts = [value for key, value in record.items() if key.startswith("seconds_") and key != "seconds_left"]
    if parts:
        return math.fsum(value for value in parts if _is_number(value))
    speed = record.get("tokens_per_second")
    return batch_tokens / speed if _is_number(speed) and speed else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class RecordedScore(NamedTuple):
    """One number."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    """Items, or tokens."""
    source: str
    """When it was measured, and on what."""

    @property
    def dataset(self) -> str | None:
        """On the Hub."""
        return HUB_TASKS[self.task].path if self.task in HUB_TASKS else None


def read_scores(origin: Origin, scores_path: Path | None = None) -> list[RecordedScore]:
    """All there are; `scores_path` is a file with what `evaluate --json` printed, of this very model.

    Raises InvalidFileError for a file that is none, ConfigError where it tells of another model.
    """
    return [*(_scores_from_file(origin, scores_path) if scores_path else []), *_scores_from_run(origin)]


def _scores_from_run(origin: Origin) -> list[RecordedScore]:
    if origin.run is None:
        return []
    step, held_out = origin.run.newest("validation_")
    scores = [
        RecordedScore(VALIDATION_TASK, key.removeprefix("validation_"), value, None, None, f"step {step:,}")
        for key, value in held_out.items()
    ]
    step, tasks = origin.run.newest("task_")
    for key, value in tasks.items():
        name, metric = next(
            ((key[5 : -len(accuracy) - 1], accuracy) for accuracy in ACCURACIES if key.endswith(f"_{accuracy}")),
            ("", ""),
        )
        if name:
            n = tasks.get(f"task_{name}_n")
            error = standard_error(value, int(n)) if n else None
            scores.append(RecordedScore(name, metric, value, error, int(n) if n else None, f"step {step:,}"))
    return scores


def _scores_from_file(origin: Origin, path: Path) -> list[RecordedScore]:
    try:
        content = json.loads(path.read_text("utf-8"))
        model, fingerprint, tasks = content["model"], content["weights"], content["tasks"]
        scores = [score for name, values in tasks.items() for score in _task_scores(name, values)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidFileError(f"{path} is not what smolforge evaluate MODEL --json prints") from None
    if fingerprint != loading.fingerprint(origin.folder):
        raise ConfigError(f"{path} has the scores of {model} with other weights than those in {origin.folder}")
    return scores


def _task_scores(name: str, values: dict[str, Any]) -> list[RecordedScore]:
    """A task's accuracies with their errors, or a text's loss and what goes with it."""
    n = values.get("n", values.get("tokens"))
    shots = values.get("few_shot")
    source = f"smolforge evaluate, {shots or 0}-shot" if "n" in values else "smolforge evaluate"
    counts = [f", {values[name]:,} long items {name}" for name in ("truncated", "skipped") if values.get(name)]
    source += "".join(counts)
    numbers = {key: value for key, value in values.items() if isinstance(value, float) and "_stderr" not in key}
    return [RecordedScore(name, key, value, values.get(_stderr_key(key)), n, source) for key, value in numbers.items()]


def _stderr_key(key: str) -> str:
    """acc -> acc_stderr; the harness's acc,none -> acc_stderr,none."""
    metric, comma, suffix = key.partition(",")
    return f"{metric}_stderr{comma}{suffix}"
