"""A study's runs, one after the other: what is done is not done again, and what fails does not end the study.

OUT/plan.json     OUT/corpus    OUT/runs/VARIANT-seed-N    OUT/runs/VARIANT-rate-F-seed-N, where rates are chosen
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from smolforge.comparison.history import History, read
from smolforge.comparison.study import rounding
from smolforge.comparison.study.plan import Plan
from smolforge.comparison.study.read import Study, words_of
from smolforge.comparison.study.scores import Exam, Scores
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.errors import Diverged, InvalidFile, MissingResource, SettingError
from smolforge.recipe import resume_or_start
from smolforge.recipe.text import open_corpus
from smolforge.recipe.workshop import Observer
from smolforge.settings import leaves

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
        if settings.metric != rounding.METRIC:
            return outcome(trial, folder, settings.metric, why)
        found = outcome(trial, folder, rounding.BEFORE, why)
        if found.value is None or found.history is None:
            return found
        text = Corpus.open(self.corpus(trial.variant))
        kept = self.out / "rounded" / f"{trial.name}.json"
        return found._replace(value=rounding.added(found.history, text, settings.group_size, kept))

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
