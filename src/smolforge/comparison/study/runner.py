"""Run the trials of a study in order. A finished run is not repeated; a failed run does not end the study.

OUT/plan.json                        steps and "auto" values of each variant
OUT/corpus                           the prepared text
OUT/runs/VARIANT-seed-N              a run that counts
OUT/runs/VARIANT-rate-F-seed-N       a run that chooses the learning rate
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.comparison.history import RunHistory, read_history
from smolforge.comparison.study.benchmarks import TaskEvaluator, TaskScores, int4_loss_increase
from smolforge.comparison.study.plan import StudyPlan
from smolforge.comparison.study.spec import Study, tokenization_key
from smolforge.config.base import leaves
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, TrainingDivergedError
from smolforge.runs import resume_or_start
from smolforge.runs.context import ProgressListener
from smolforge.runs.dataset import open_corpus

INT4_METRIC, LOSS_METRIC = "loss_added_by_int4", "validation_loss"
RATE_SETTINGS = ("optim.learning_rate", "optim.matrix_learning_rate", "optim.schedule.final_learning_rate")
"""What a factor of the learning rate is applied to."""
FINAL_STATES = ("finished", "diverged")
"""States that another start would only come to again."""


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

    @property
    def finished_run(self) -> RunHistory | None:
        return None if self.value is None else self.history


RateOutcomes = Mapping[float, Sequence[Outcome]]
"""Outcomes by the factor of the learning rate."""


class StudyListener(ProgressListener):
    """Who watches a study: its runs, which of how many begins, and what is measured after them."""

    def on_run_start(self, name: str, number: int, total: int) -> None:
        """Called when a run starts, with the number of all runs."""

    def on_measure_start(self, what: str) -> None:
        """The runs are done, and something is measured of each variant."""


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
        if (run := outcome.finished_run) is None:
            return outcome
        return outcome._replace(scores=self.evaluator.evaluate(run.name, run.path, run.recipe.train.device))

    def run(self, trial: Trial) -> Outcome:
        """Its run, from wherever it stands. Raises Stopped when a signal ended it."""
        self.num_started += 1
        folder = self.out / "runs" / trial.name
        before = self.outcome(trial)
        if before.history is not None and before.history.state in FINAL_STATES:
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
        of_integers = settings.metric == INT4_METRIC
        outcome = read_outcome(trial, folder, LOSS_METRIC if of_integers else settings.metric, reason=reason)
        if not of_integers or (run := outcome.finished_run) is None:
            return outcome
        text, path = Corpus.open(self.corpus(trial.variant)), self.out / "rounded" / f"{trial.name}.json"
        return outcome._replace(value=int4_loss_increase(run, text, settings.group_size, path=path))

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
    """What a run's folder says of it; `reason` is why it ended, where that is known."""
    try:
        history = read_history(folder, trial.name)
    except (InvalidFileError, ConfigError) as error:
        return Outcome(trial, None, reason or str(error), None)
    if history.state != "finished" or history.step < history.steps:
        return Outcome(trial, history, reason or history.reason, None)
    value = history.metrics[-1].get(metric) if history.metrics else None
    if not isinstance(value, int | float):
        return Outcome(trial, history, f"it ended with no number for {metric}", None)
    return Outcome(trial, history, "", float(value))


def mean_by_factor(rate_outcomes: RateOutcomes) -> dict[float, float | None]:
    """The metric's mean at each factor of the learning rate; None where a run failed."""
    means: dict[float, float | None] = {}
    for factor, outcomes in rate_outcomes.items():
        values = [outcome.value for outcome in outcomes if outcome.value is not None]
        means[factor] = statistics.fmean(values) if len(values) == len(outcomes) else None
    return means


def best_factor(rate_outcomes: RateOutcomes) -> float | None:
    """The factor of the lowest mean. None where at each a run failed, or none were tried."""
    means = {factor: mean for factor, mean in mean_by_factor(rate_outcomes).items() if mean is not None}
    return min(means, key=lambda factor: means[factor], default=None)
