"""What happens around the steps of a run: measure, sample, report, save.

Rank 0 does it. The others have the same actions in the same turn, and wait; nothing here changes a weight.
"""

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from smolforge.checkpoint import training_state
from smolforge.config import Recipe
from smolforge.data import corpus
from smolforge.data.mixture import Mixture, Prepared
from smolforge.data.preference_pairs import PairRows
from smolforge.device import autocast
from smolforge.device.usage import Energy, PerToken, Usage, energy
from smolforge.evaluation import measure_corpus
from smolforge.evaluation.multiple_choice import score, summary
from smolforge.evaluation.perplexity import measure_mixture, measure_pairs
from smolforge.evaluation.tasks import Task
from smolforge.generation.stream import Prompt, generate
from smolforge.models.decoder import LanguageModel
from smolforge.runs.async_checkpoint import Background, Saving, Take
from smolforge.runs.estimate import Plan
from smolforge.runs.initial_model import told_of_base
from smolforge.runs.mixture import Ledger, shares
from smolforge.runs.resolve import fixed_settings
from smolforge.tracking import Incident, Sampled, Saved, Stepped, Trackers
from smolforge.tracking.histograms import Watch, weight_norm
from smolforge.training import optim
from smolforge.training.distributed import Ranks
from smolforge.training.dpo import Preference
from smolforge.training.guard import Judge
from smolforge.training.loop import Action, State
from smolforge.training.objective import Objective
from smolforge.training.run_folder import METRICS, SAMPLES, RunFolder
from smolforge.training.signals import Stop

Act = Callable[[State, dict[str, Any]], dict[str, Any] | None]


@runtime_checkable
class Observer(Protocol):
    """What a run tells while it goes."""

    def planned(self, recipe: Recipe, plan: Plan, start: State) -> None: ...
    def preparing(self, counts: dict[str, int], source: str = "") -> None: ...
    def referring(self, pairs: int, of: int) -> None: ...
    def stepped(self, metrics: dict[str, Any]) -> None: ...
    def sampled(self, text: str) -> None: ...


class Silent:
    """Hears nothing."""

    def planned(self, recipe: Recipe, plan: Plan, start: State) -> None: ...
    def preparing(self, counts: dict[str, int], source: str = "") -> None: ...
    def referring(self, pairs: int, of: int) -> None: ...
    def stepped(self, metrics: dict[str, Any]) -> None: ...
    def sampled(self, text: str) -> None: ...


@dataclass(frozen=True)
class Start:
    """What all attempts of one start of a run share, as one of its ranks has it."""

    recipe: Recipe
    files: RunFolder
    """Only rank 0 writes into it, and has it locked."""
    text: Prepared
    tasks: Sequence[Task]
    """What is scored beside the held-out text, on rank 0."""
    base: str | None
    """What identifies the weights to start from, where those are needed as long as the run goes."""
    reference: Path | None
    """Where what the model to start from says of pairs is, or will be."""
    reading: Background
    """The check of the text, which rank 0 does."""
    observer: Observer
    trackers: Trackers
    stop: Stop
    ranks: Ranks
    device: torch.device
    profile: int | None
    """Steps to profile, on rank 0."""
    seen: Mapping[str, Any]
    """What else may explain how fast it goes, to be written down."""

    def record(self, incident: dict[str, Any]) -> None:
        """Write down for good that numbers went wrong, and tell of it."""
        self.files.record_incident(incident)
        self.trackers(Incident(incident))

    def saved(self, step: int) -> None:
        """Tell that a checkpoint is safe."""
        self.trackers(Saved(step, training_state.folder_of(self.files.path, step)))


def prompts_of(recipe: Recipe) -> list[Prompt]:
    """The recipe's prompts for samples: the beginning of a text each, or what a user says."""
    if recipe.data.format == "text":
        return list(recipe.train.sample_prompts)
    return [[{"role": "user", "content": prompt}] for prompt in recipe.train.sample_prompts]


class Workshop:
    """What is at hand between the steps of one run, and the actions that use it."""

    def __init__(
        self,
        start: Start,
        model: LanguageModel,
        optimizers: list[torch.optim.Optimizer],
        judge: Judge,
        saving: Saving,
        pairs: PairRows | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """`pairs` are what is held out, where the model learns from such; a mixture has a `ledger`."""
        self.recipe, self.files, self.text, self.observer = start.recipe, start.files, start.text, start.observer
        self.tasks, self.stop, self.ranks, self.trackers = start.tasks, start.stop, start.ranks, start.trackers
        self.model, self.optimizers, self.judge, self.saving = model, optimizers, judge, saving
        self.metrics: dict[str, Any] = {}
        self.save_wanted = False
        counted = energy(start.device) if self.ranks.size == 1 else Energy([])
        self.drawn = PerToken(counted, start.recipe.train.batch_tokens)
        self.usage = Usage(start.device)
        self.base, self.adapter = told_of_base(start.recipe, start.base) if self.ranks.leads else ({}, None)
        self.pairs, self.ledger = pairs, ledger
        self.reference = {"reference": start.reference.name} if start.reference else {}
        self.watch = Watch(model, start.recipe.report, start.trackers)

    def actions(self) -> list[Action]:
        """In the order they happen: a checkpoint comes after the line of metrics that belongs to it."""
        settings, report = self.recipe.train, self.recipe.report
        actions = []
        if settings.evaluate_every and (self.held_out or settings.evaluate_tasks):
            actions.append(Action(settings.evaluate_every, self.led(self.measure)))
        if settings.sample_every:
            actions.append(Action(settings.sample_every, self.led(self.sample)))
        if self.ranks.leads:
            if report.norms_every:
                actions.append(Action(report.norms_every, self.weigh))
            if report.watch:
                actions.append(Action(report.watch_every, self.look))
            actions.append(Action(1, self.report, late=True))
        actions.append(Action(settings.checkpoint_every, self.led(self.save), wanted=lambda: self.save_wanted))
        return actions

    def led(self, act: Act) -> Act:
        """Done by rank 0 while the others wait."""
        return lambda now, metrics: self.ranks.tell(lambda: act(now, metrics))

    def stopping(self) -> bool:
        """Asked before each step: whether a signal to any rank asked for an end, and, for `save`, whether a checkpoint
        that failed should be tried again. One exchange makes all ranks say the same.
        """
        look = self.ranks.leads and self.saving.look()
        said = self.ranks.gather(self.stop.asked_by or 0, int(look))
        self.save_wanted = bool(said[0][1])
        asked_by = next((number for number, _ in said if number), None)
        if asked_by is not None:
            self.stop.asked_by = signal.Signals(asked_by)
        return asked_by is not None

    @property
    def held_out(self) -> bool:
        """Whether there is text to measure on."""
        return self.text.size(corpus.HELD_OUT)["tokens"] > 0

    def measure(self, now: State, metrics: dict[str, Any]) -> dict[str, Any]:
        """On the held-out text, and on tasks."""
        with optim.averaged(self.optimizers):
            return (self.measured() if self.held_out else {}) | self.scored()

    def scored(self) -> dict[str, float | int]:
        """Accuracies of each task, by each way of counting, and how many items it has."""
        found: dict[str, float | int] = {}
        self.model.eval()
        for task in self.tasks:
            with autocast(self.recipe.train.dtype, self.model.head.device):
                told = summary(score(self.model, task.items))
            found |= {f"task_{task.name}_{name}": told[name] for name in ("acc", "acc_norm", "acc_chars", "n")}
        self.model.train()
        return found

    def measured(self) -> dict[str, float]:
        """Loss and what goes with it, on the held-out text or pairs."""
        settings = self.recipe.train
        if self.pairs is not None:
            objective = Objective(self.model, settings.dtype, preference=Preference(self.recipe.dpo.beta))
            found = measure_pairs(objective, self.pairs, settings.evaluate_tokens)
            return {f"validation_{name}": value for name, value in found.items()}
        sizes = {"sequence_length": settings.sequence_length, "max_tokens": settings.evaluate_tokens}
        way = {
            "precision": autocast(settings.dtype, self.model.head.device),
            "intra_document_masking": self.recipe.data.intra_document_masking,
        }
        if isinstance(self.text, Mixture):
            found = measure_mixture(self.model, self.text, shares(self.recipe), **sizes, **way)
            return {f"validation_{name}": value for name, value in found.items()}
        found = measure_corpus(self.model, self.text, **sizes, **way)
        return {f"validation_{name}": found[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}

    def sample(self, now: State, metrics: dict[str, Any]) -> None:
        prompts, options = prompts_of(self.recipe), self.recipe.sample.model_dump()
        if options["seed"] is None:
            options["seed"] = self.recipe.seed + now.step
        self.model.eval()
        with optim.averaged(self.optimizers):
            found = generate(self.model, prompts, **options)
        self.model.train()
        between = "" if self.text.format == "text" else "\n"
        for number, (prompt, completion) in enumerate(zip(self.recipe.train.sample_prompts, found, strict=True)):
            self.files.append(SAMPLES, {"step": now.step, "prompt": prompt, "text": completion.text})
            self.observer.sampled(prompt + between + completion.text)
            self.trackers(Sampled(now.step, number, prompt, completion.text))

    def weigh(self, now: State, metrics: dict[str, Any]) -> dict[str, Any]:
        return {"weight_norm": weight_norm(self.model)}

    def looking(self, step: int) -> None:
        """At the gradients of a step, on rank 0."""
        if self.ranks.leads:
            self.watch.gradients(step)

    def look(self, now: State, metrics: dict[str, Any]) -> dict[str, Any]:
        return self.watch.after(now.step)

    def report(self, now: State, metrics: dict[str, Any]) -> None:
        metrics["batch"] = self.judge.decisions.batch(now.step - 1)
        if self.ledger is not None:
            metrics |= self.ledger.after_a_step(metrics["batch"], "left_out" in metrics)
        metrics |= self.drawn.after_a_step() | self.usage.after_a_step()
        self.metrics = metrics
        self.files.append(METRICS, metrics)
        self.observer.stepped(metrics)
        self.trackers(Stepped(metrics))

    def save(self, now: State, metrics: dict[str, Any]) -> None:
        """Not in the middle of updates left out: a rewind goes back to before the first of them."""
        if "left_out" not in metrics:
            self.saving.save(now.step, self.taking(now))

    def finish(self, now: State) -> None:
        """Come back when the last step is safe on disk. Raises MissingResource if that cannot be."""
        self.saving.finish(now.step, self.taking(now))

    def taking(self, now: State) -> Take:
        """How a snapshot of this moment is taken."""

        def take(staging: training_state.Staging | None) -> training_state.Snapshot:
            facts = self.facts(now)
            with optim.averaged(self.optimizers):
                moments = optim.state_tensors(self.optimizers, self.model)
                return training_state.snapshot(self.model, moments, facts, staging, self.adapter)

        return take

    def facts(self, now: State) -> dict[str, Any]:
        """What state.json says of this moment."""
        loss = self.metrics.get("validation_loss")
        return {
            "step": now.step,
            "tokens": now.tokens,
            "corpus": self.text.fingerprint,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "recipe": fixed_settings(self.recipe),
            "incidents": self.files.incidents(),
            "recent_losses": list(self.judge.recent),
            **self.base,
            **self.reference,
        }
