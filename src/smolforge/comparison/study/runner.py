"""A study's runs, one after the other: what is done is not done again, and what fails does not end the study.

OUT/plan.json     OUT/corpus    OUT/runs/VARIANT-seed-N    OUT/runs/VARIANT-rate-F-seed-N, where rates are chosen

What a run's model loses on held-out text when its matrices are rounded to 4 bits: OUT/rounded/RUN.json.

Multiple choice for each finished run, asked of its last checkpoint and kept: OUT/tasks/RUN.json.

A study that goes on asks no run twice; of a study whose runs have all been asked, no task is looked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from smolforge import atomic
from smolforge.checkpoint.loading import load
from smolforge.comparison.history import History, read
from smolforge.comparison.study.plan import Plan
from smolforge.comparison.study.spec import Study, words_of
from smolforge.config.base import leaves
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.device import pick_device
from smolforge.errors import Diverged, InvalidFile, MissingResource, SettingError
from smolforge.evaluation.multiple_choice import score, summary
from smolforge.evaluation.perplexity import measure_corpus
from smolforge.evaluation.tasks import Task, find
from smolforge.models.quantized import Scheme, quantize
from smolforge.runs import resume_or_start
from smolforge.runs.callbacks import Observer
from smolforge.runs.dataset import open_corpus

METRIC, BEFORE = "loss_added_by_int4", "validation_loss"
TOKENS = 65_536
"""Held-out tokens at most: what rounding adds is small beside what texts differ by."""


def added(run: History, corpus: Corpus, group_size: int, kept: Path) -> float:
    """Nats a token, the embedding as it was. Asked once, then kept.

    Raises SettingError where groups do not divide the model's widths.
    """
    try:
        stored = json.loads(kept.read_text("utf-8"))
        if stored["group_size"] == group_size:
            return float(stored["after"] - stored["before"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet
    model, length = load(run.path), run.recipe.train.sequence_length
    before = measure_corpus(model, corpus, length, TOKENS)["loss"]
    quantize(model, Scheme(4, group_size))
    after = measure_corpus(model, corpus, length, TOKENS)["loss"]
    atomic.make_folder(kept.parent)
    atomic.replace(kept, json.dumps({"group_size": group_size, "before": before, "after": after}, indent=2) + "\n")
    return float(after - before)


Scores = dict[str, dict[str, Any]]
"""By task, as `evaluate` gives them: acc, acc_norm, acc_chars, their standard errors, n, source."""


class Exam:
    """What every run is asked; `words` are names and files, those beside the study's file first."""

    def __init__(self, words: Sequence[str], beside: Path, out: Path) -> None:
        self.words, self.beside, self.folder = tuple(words), beside, out / "tasks"
        self.names = [Path(word).stem for word in words]
        if len(set(self.names)) < len(self.names):
            raise SettingError(f"study.tasks has two that are called the same: {', '.join(words)}")

    @cached_property
    def tasks(self) -> list[Task]:
        """Raises SettingError, InvalidFile or MissingResource for what is no task, or cannot be had."""
        return [find(str(near) if (near := self.beside / word).is_file() else word) for word in self.words]

    def prepare(self, runs: Sequence[str]) -> None:
        """Find the tasks, before the first run, where one of these is still to be asked."""
        if any(self.known(run) is None for run in runs):
            assert len(self.tasks) == len(self.words)

    def known(self, run: str) -> Scores | None:
        """What a run was found to score; None where it was not asked."""
        try:
            stored = json.loads((self.folder / f"{run}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(stored, Mapping) and all(isinstance(stored.get(name), dict) for name in self.names)
        return {name: stored[name] for name in self.names} if whole else None

    def of(self, run: str, folder: Path, device: str) -> Scores:
        """Its scores, asked in fp32 as `evaluate` does. Raises InvalidFile for an item longer than its context."""
        if not self.words:
            return {}
        if (before := self.known(run)) is not None:
            return before
        model = load(folder, device=str(pick_device(device)))
        found = {task.name: summary(score(model, task.items)) | {"source": task.source} for task in self.tasks}
        atomic.make_folder(self.folder)
        atomic.replace(self.folder / f"{run}.json", json.dumps(found, indent=2) + "\n")
        return found


RATES = ("optim.learning_rate", "optim.matrix_learning_rate", "optim.schedule.final_learning_rate")
"""What a factor of the learning rate is applied to."""
OVER = ("finished", "diverged")
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
        tried = "" if self.chosen else f"-rate-{self.factor:g}"
        return f"{self.variant}{tried}-seed-{self.seed}"


class Outcome(NamedTuple):
    """What came of a run."""

    trial: Trial
    history: History | None
    """None where it never began."""
    why: str
    """Why it did not come to its end; empty if it did."""
    value: float | None
    """The metric after its last step."""
    scores: Scores | None = None
    """Of the study's tasks."""


@runtime_checkable
class Audience(Observer, Protocol):
    """Who watches a study: its runs, which of how many begins, and what is measured after them."""

    def beginning(self, name: str, number: int, of: int) -> None: ...
    def measuring(self, what: str) -> None: ...


@dataclass
class Trials:
    """All runs of a study in one folder."""

    study: Study
    plan: Plan
    out: Path
    audience: Audience
    seen: Mapping[str, Any]
    exam: Exam
    done: int = 0
    texts: dict[Any, Path] = field(default_factory=dict)

    @property
    def count(self) -> int:
        settings = self.study.settings
        tried = len(settings.learning_rates) * len(settings.learning_rate_seeds)
        return len(self.study.recipes) * (tried + len(settings.seeds))

    def choosing(self) -> dict[str, dict[float, list[Outcome]]]:
        """Every variant at every factor, on seeds of their own; nothing where the study tries none."""
        settings = self.study.settings
        return {
            name: {
                factor: [self.run(Trial(name, seed, factor, chosen=False)) for seed in settings.learning_rate_seeds]
                for factor in settings.learning_rates
            }
            for name in self.study.recipes
        }

    def judged(self, factors: Mapping[str, float | None]) -> dict[str, list[Outcome]]:
        """The runs that count, seed by seed, so that a study stopped early has some of every variant."""
        order = [(name, seed) for seed in self.study.settings.seeds for name in self.study.recipes]
        found = [self.examined(self.run(Trial(name, seed, factors[name]))) for name, seed in order]
        return {name: [each for each in found if each.trial.variant == name] for name in self.study.recipes}

    def examined(self, outcome: Outcome) -> Outcome:
        """A finished run's scores beside its metric."""
        if outcome.history is None or outcome.value is None:
            return outcome
        folder, device = outcome.history.path, outcome.history.recipe.train.device
        return outcome._replace(scores=self.exam.of(outcome.trial.name, folder, device))

    def run(self, trial: Trial) -> Outcome:
        """Its run, from wherever it stands. Raises Stopped when a signal ended it."""
        self.done += 1
        folder = self.out / "runs" / trial.name
        if (before := self.outcome(trial)).value is not None or _is_over(before):
            return before
        self.audience.beginning(trial.name, self.done, self.count)
        why = ""
        try:
            resume_or_start(self.study.recipe, folder, self.overrides(trial), observer=self.audience, seen=self.seen)
        except (Diverged, InvalidFile, MissingResource) as error:
            why = str(error)
        except RuntimeError as error:  # torch's: one shape that no kernel takes should not cost the other runs
            why = " ".join(f"{type(error).__name__}: {error}".split())
        return self.outcome(trial, why)

    def outcome(self, trial: Trial, why: str = "") -> Outcome:
        """What a run's folder says of it, and of its weights as integers, where that is what the study is about."""
        settings, folder = self.study.settings, self.out / "runs" / trial.name
        if settings.metric != METRIC:
            return outcome(trial, folder, settings.metric, why)
        found = outcome(trial, folder, BEFORE, why)
        if found.value is None or found.history is None:
            return found
        text = Corpus.open(self.corpus(trial.variant))
        kept = self.out / "rounded" / f"{trial.name}.json"
        return found._replace(value=added(found.history, text, settings.group_size, kept))

    def overrides(self, trial: Trial) -> dict[str, Any]:
        """What makes the study's recipe this run's."""
        name = trial.variant
        changes = self.study.changes[name] | self.plan.decided[name] | scaled(self.study, trial)
        corpus = {"data.sources": [str(self.corpus(name))], "tokenizer": None, "special_tokens": []}
        steps = {"train.steps": self.plan.steps[name], "optim.schedule.steps": None}
        return changes | corpus | steps | {"seed": trial.seed}

    def corpus(self, name: str) -> Path:
        """The variant's text, prepared once for all that have the same tokens."""
        recipe, key = self.study.recipes[name], words_of(self.study.recipes[name])
        if key not in self.texts:
            folder = self.out if not self.texts else self.out / "texts" / name
            begun = (folder / "corpus" / "corpus.json").is_file()
            text = open_corpus(recipe, folder, begun, self.audience)
            if not text.size(HELD_OUT)["tokens"]:
                raise SettingError(f"{text.folder} has no held-out text, which a study is measured on")
            self.texts[key] = text.folder.resolve()
        return self.texts[key]


def scaled(study: Study, trial: Trial) -> dict[str, float]:
    """The learning rates of a run, where the study tries several."""
    if trial.factor is None:
        return {}
    values = leaves(study.recipes[trial.variant])
    return {name: values[name] * trial.factor for name in RATES}


def outcome(trial: Trial, folder: Path, metric: str, why: str = "") -> Outcome:
    """What a run's folder says of it."""
    try:
        history = read(folder, trial.name)
    except (InvalidFile, SettingError) as error:
        return Outcome(trial, None, why or str(error), None)
    last = history.metrics[-1].get(metric) if history.metrics else None
    if history.state != "finished" or history.step < history.steps:
        return Outcome(trial, history, why or history.why, None)
    if not isinstance(last, int | float):
        return Outcome(trial, history, f"it ended with no number for {metric}", None)
    return Outcome(trial, history, "", float(last))


def _is_over(before: Outcome) -> bool:
    return before.history is not None and before.history.state in OVER


def best(tried: Mapping[float, Sequence[Outcome]]) -> float | None:
    """The factor of the lowest mean; one of whose runs failed is no choice. None where all did, or none were tried."""
    means = {
        factor: sum(each.value for each in outcomes if each.value is not None) / len(outcomes)
        for factor, outcomes in tried.items()
        if all(each.value is not None for each in outcomes)
    }
    return min(means, key=lambda factor: means[factor]) if means else None
