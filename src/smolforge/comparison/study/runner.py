"""Run the trials of a study in order. A finished run is not repeated; a failed run does not end the study.

    OUT/plan.json                        steps and "auto" values of each variant
    OUT/corpus                           the prepared text
    OUT/runs/VARIANT-seed-N              a run that counts
    OUT/runs/VARIANT-rate-F-seed-N       a run that chooses the learning rate
    OUT/rounded/RUN.json                 validation loss before and after rounding the matrices to 4 bits
    OUT/tasks/RUN.json                   multiple-choice scores of the last checkpoint

Scores are computed once for each run and kept. Once every run has them, no task is loaded again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from smolforge import atomic
from smolforge.checkpoint.loading import load
from smolforge.comparison.history import RunHistory, read_history
from smolforge.comparison.study.plan import StudyPlan
from smolforge.comparison.study.spec import Study, tokenization_key
from smolforge.config.base import leaves
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.device import pick_device
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, TrainingDivergedError
from smolforge.evaluation.multiple_choice import score, summary
from smolforge.evaluation.perplexity import measure_corpus
from smolforge.evaluation.tasks import Task, load_task
from smolforge.models.quantized import QuantizationScheme, quantize
from smolforge.runs import resume_or_start
from smolforge.runs.context import ProgressListener
from smolforge.runs.dataset import open_corpus

INT4_METRIC, LOSS_METRIC = "loss_added_by_int4", "validation_loss"
MAX_TOKENS = 65_536
"""Held-out tokens at most: what rounding adds is small beside what texts differ by."""
TaskScores = dict[str, dict[str, Any]]
"""By task, as `evaluate` gives them: acc, acc_norm, acc_chars, their standard errors, n, source."""
RATE_SETTINGS = ("optim.learning_rate", "optim.matrix_learning_rate", "optim.schedule.final_learning_rate")
"""What a factor of the learning rate is applied to."""
FINAL_STATES = ("finished", "diverged")
"""States that another start would only come to again."""


def int4_loss_increase(run: RunHistory, corpus: Corpus, group_size: int, *, path: Path) -> float:
    """Nats a token, the embedding as it was. Asked once, then kept.

    Raises ConfigError where groups do not divide the model's widths.
    """
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["group_size"] == group_size:
            return float(stored["after"] - stored["before"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet
    model, length = load(run.path), run.recipe.train.sequence_length
    before = measure_corpus(model, corpus, length, max_tokens=MAX_TOKENS)["loss"]
    quantize(model, QuantizationScheme(4, group_size))
    after = measure_corpus(model, corpus, length, max_tokens=MAX_TOKENS)["loss"]
    atomic.make_dir_durable(path.parent)
    atomic.write_text_atomic(
        path, json.dumps({"group_size": group_size, "before": before, "after": after}, indent=2) + "\n"
    )
    return float(after - before)


class TaskEvaluator:
    """What every run is asked; `words` are names and files, those beside the study's file first."""

    def __init__(self, task_args: Sequence[str], study_dir: Path, out: Path) -> None:
        self.task_args, self.study_dir, self.folder = tuple(task_args), study_dir, out / "tasks"
        self.names = [Path(task).stem for task in task_args]
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"study.tasks has two that are called the same: {', '.join(task_args)}")

    @cached_property
    def tasks(self) -> list[Task]:
        """Raises ConfigError, InvalidFileError or MissingResourceError for what is no task, or cannot be had."""
        return [load_task(str(path) if (path := self.study_dir / task).is_file() else task) for task in self.task_args]

    def prepare(self, runs: Sequence[str]) -> None:
        """Find the tasks, before the first run, where one of these is still to be asked."""
        if any(self.cached_scores(run) is None for run in runs):
            assert len(self.tasks) == len(self.task_args)

    def cached_scores(self, run: str) -> TaskScores | None:
        """What a run was found to score; None where it was not asked."""
        try:
            stored = json.loads((self.folder / f"{run}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        complete = isinstance(stored, Mapping) and all(isinstance(stored.get(name), dict) for name in self.names)
        return {name: stored[name] for name in self.names} if complete else None

    def evaluate(self, run: str, folder: Path, device: str) -> TaskScores:
        """Its scores, asked in fp32 as `evaluate` does. Raises InvalidFileError for an item longer than its context."""
        if not self.task_args:
            return {}
        if (cached := self.cached_scores(run)) is not None:
            return cached
        model = load(folder, device=str(pick_device(device)))
        scores = {task.name: summary(score(model, task.items)) | {"source": task.source} for task in self.tasks}
        atomic.make_dir_durable(self.folder)
        atomic.write_text_atomic(self.folder / f"{run}.json", json.dumps(scores, indent=2) + "\n")
        return scores


class Trial(NamedTuple):
    """One run of a study."""

    variant: str
    seed: int
    factor: float | None = None
    """Of its learning rates; none as the recipe has them."""
    chosen: bool = True
    """Whether it is one that counts, and none of those that choose the rate."""

    @property
    def name(self) -> str:
        rate_part = "" if self.chosen else f"-rate-{self.factor:g}"
        return f"{self.variant}{rate_part}-seed-{self.seed}"


class Outcome(NamedTuple):
    """What came of a run."""

    trial: Trial
    history: RunHistory | None
    """None where it never began."""
    why: str
    """Why it did not come to its end; empty if it did."""
    value: float | None
    """The metric after its last step."""
    scores: TaskScores | None = None
    """Of the study's tasks."""


@runtime_checkable
class StudyListener(ProgressListener, Protocol):
    """Who watches a study: its runs, which of how many begins, and what is measured after them."""

    def on_run_start(self, name: str, number: int, total: int) -> None: ...
    def on_measure_start(self, what: str) -> None: ...


@dataclass
class Trials:
    """All runs of a study in one folder."""

    study: Study
    plan: StudyPlan
    out: Path
    listener: StudyListener
    environment: Mapping[str, Any]
    evaluator: TaskEvaluator
    num_started: int = 0
    corpora: dict[Any, Path] = field(default_factory=dict)

    @property
    def count(self) -> int:
        settings = self.study.settings
        rate_runs = len(settings.learning_rates) * len(settings.learning_rate_seeds)
        return len(self.study.recipes) * (rate_runs + len(settings.seeds))

    def search_learning_rates(self) -> dict[str, dict[float, list[Outcome]]]:
        """Every variant at every factor, on seeds of their own; nothing where the study tries none."""
        settings = self.study.settings
        return {
            name: {
                factor: [self.run(Trial(name, seed, factor, chosen=False)) for seed in settings.learning_rate_seeds]
                for factor in settings.learning_rates
            }
            for name in self.study.recipes
        }

    def run_all(self, factors: Mapping[str, float | None]) -> dict[str, list[Outcome]]:
        """The runs that count, seed by seed, so that a study stopped early has some of every variant."""
        order = [(name, seed) for seed in self.study.settings.seeds for name in self.study.recipes]
        outcomes = [self.with_scores(self.run(Trial(name, seed, factors[name]))) for name, seed in order]
        return {name: [outcome for outcome in outcomes if outcome.trial.variant == name] for name in self.study.recipes}

    def with_scores(self, outcome: Outcome) -> Outcome:
        """A finished run's scores beside its metric."""
        if outcome.history is None or outcome.value is None:
            return outcome
        folder, device = outcome.history.path, outcome.history.recipe.train.device
        return outcome._replace(scores=self.evaluator.evaluate(outcome.trial.name, folder, device))

    def run(self, trial: Trial) -> Outcome:
        """Its run, from wherever it stands. Raises Stopped when a signal ended it."""
        self.num_started += 1
        folder = self.out / "runs" / trial.name
        if (before := self.outcome(trial)).value is not None or _is_final(before):
            return before
        self.listener.on_run_start(trial.name, self.num_started, self.count)
        reason = ""
        try:
            resume_or_start(
                self.study.recipe, folder, self.overrides(trial), listener=self.listener, environment=self.environment
            )
        except (TrainingDivergedError, InvalidFileError, MissingResourceError) as error:
            reason = str(error)
        except RuntimeError as error:  # torch's: one shape that no kernel takes should not cost the other runs
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        return self.outcome(trial, reason)

    def outcome(self, trial: Trial, reason: str = "") -> Outcome:
        """What a run's folder says of it, and of its weights as integers, where that is what the study is about."""
        settings, folder = self.study.settings, self.out / "runs" / trial.name
        if settings.metric != INT4_METRIC:
            return read_outcome(trial, folder, settings.metric, reason=reason)
        outcome = read_outcome(trial, folder, LOSS_METRIC, reason=reason)
        if outcome.value is None or outcome.history is None:
            return outcome
        text = Corpus.open(self.corpus(trial.variant))
        path = self.out / "rounded" / f"{trial.name}.json"
        return outcome._replace(value=int4_loss_increase(outcome.history, text, settings.group_size, path=path))

    def overrides(self, trial: Trial) -> dict[str, Any]:
        """What makes the study's recipe this run's."""
        name = trial.variant
        changes = self.study.changes[name] | self.plan.decided[name] | scaled_learning_rates(self.study, trial)
        corpus = {"data.sources": [str(self.corpus(name))], "tokenizer": None, "special_tokens": []}
        steps = {"train.steps": self.plan.steps[name], "optim.schedule.steps": None}
        return changes | corpus | steps | {"seed": trial.seed}

    def corpus(self, name: str) -> Path:
        """The variant's text, prepared once for all that have the same tokens."""
        recipe, key = self.study.recipes[name], tokenization_key(self.study.recipes[name])
        if key not in self.corpora:
            folder = self.out if not self.corpora else self.out / "texts" / name
            exists = (folder / "corpus" / "corpus.json").is_file()
            text = open_corpus(recipe, folder, exists, listener=self.listener)
            if not text.size(HELD_OUT)["tokens"]:
                raise ConfigError(f"{text.folder} has no held-out text, which a study is measured on")
            self.corpora[key] = text.folder.resolve()
        return self.corpora[key]


def scaled_learning_rates(study: Study, trial: Trial) -> dict[str, float]:
    """The learning rates of a run, where the study tries several."""
    if trial.factor is None:
        return {}
    values = leaves(study.recipes[trial.variant])
    return {name: values[name] * trial.factor for name in RATE_SETTINGS}


def read_outcome(trial: Trial, folder: Path, metric: str, *, reason: str = "") -> Outcome:
    """What a run's folder says of it."""
    try:
        history = read_history(folder, trial.name)
    except (InvalidFileError, ConfigError) as error:
        return Outcome(trial, None, reason or str(error), None)
    last = history.metrics[-1].get(metric) if history.metrics else None
    if history.state != "finished" or history.step < history.steps:
        return Outcome(trial, history, reason or history.reason, None)
    if not isinstance(last, int | float):
        return Outcome(trial, history, f"it ended with no number for {metric}", None)
    return Outcome(trial, history, "", float(last))


def _is_final(before: Outcome) -> bool:
    return before.history is not None and before.history.state in FINAL_STATES


def best_factor(rate_outcomes: Mapping[float, Sequence[Outcome]]) -> float | None:
    """The factor of the lowest mean; one of whose runs failed is no choice. None where all did, or none were tried."""
    means = {
        factor: sum(outcome.value for outcome in outcomes if outcome.value is not None) / len(outcomes)
        for factor, outcomes in rate_outcomes.items()
        if all(outcome.value is not None for outcome in outcomes)
    }
    return min(means, key=lambda factor: means[factor]) if means else None
