"""What happens around the steps of a run: measure, sample, report, save."""

import math
from typing import Any, Protocol, runtime_checkable

import torch

from smolforge import optim
from smolforge.checkpoint import state
from smolforge.config import Recipe
from smolforge.data import corpus
from smolforge.device import autocast
from smolforge.evaluation import measure_corpus
from smolforge.generation.stream import generate
from smolforge.guard import Judge
from smolforge.model import LanguageModel
from smolforge.recipe.plan import Plan
from smolforge.recipe.saving import Saving, Take
from smolforge.recipe.settle import fixed_settings
from smolforge.runs import METRICS, SAMPLES, RunFolder
from smolforge.training import Action, State


@runtime_checkable
class Observer(Protocol):
    """What a run tells while it goes."""

    def planned(self, recipe: Recipe, plan: Plan, start: State) -> None: ...
    def preparing(self, counts: dict[str, int]) -> None: ...
    def stepped(self, metrics: dict[str, Any]) -> None: ...
    def sampled(self, text: str) -> None: ...


class Silent:
    """Hears nothing."""

    def planned(self, recipe: Recipe, plan: Plan, start: State) -> None: ...
    def preparing(self, counts: dict[str, int]) -> None: ...
    def stepped(self, metrics: dict[str, Any]) -> None: ...
    def sampled(self, text: str) -> None: ...


class Workshop:
    """What is at hand between the steps of one run, and the actions that use it."""

    def __init__(
        self,
        recipe: Recipe,
        files: RunFolder,
        model: LanguageModel,
        optimizers: list[torch.optim.Optimizer],
        text: corpus.Corpus,
        judge: Judge,
        saving: Saving,
        observer: Observer,
    ) -> None:
        self.recipe, self.files, self.model, self.optimizers = recipe, files, model, optimizers
        self.text, self.judge, self.saving, self.observer = text, judge, saving, observer
        self.metrics: dict[str, Any] = {}

    def actions(self) -> list[Action]:
        """In the order they happen: a checkpoint comes after the line of metrics that belongs to it."""
        settings = self.recipe.train
        actions = [
            Action(1, self.report, when_stopped=True, late=True),
            Action(settings.checkpoint_every, self.save, when_stopped=True, wanted=self.saving.look),
        ]
        if settings.sample_every:
            actions.insert(0, Action(settings.sample_every, self.sample))
        if settings.evaluate_every and self.text.size(corpus.HELD_OUT)["tokens"]:
            actions.insert(0, Action(settings.evaluate_every, self.measure))
        return actions

    def measure(self, now: State, metrics: dict[str, Any]) -> dict[str, Any]:
        settings = self.recipe.train
        with optim.averaged(self.optimizers):
            found = measure_corpus(
                self.model,
                self.text,
                settings.sequence_length,
                settings.evaluate_tokens,
                precision=autocast(settings.dtype, self.model.head.device),
                intra_document_masking=self.recipe.data.intra_document_masking,
            )
        return {f"validation_{name}": found[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}

    def sample(self, now: State, metrics: dict[str, Any]) -> None:
        prompts, options = self.recipe.train.sample_prompts, self.recipe.sample.model_dump()
        if options["seed"] is None:
            options["seed"] = self.recipe.seed + now.step
        self.model.eval()
        with optim.averaged(self.optimizers):
            found = generate(self.model, prompts, **options)
        self.model.train()
        for prompt, completion in zip(prompts, found, strict=True):
            self.files.append(SAMPLES, {"step": now.step, "prompt": prompt, "text": completion.text})
            self.observer.sampled(prompt + completion.text)

    def report(self, now: State, metrics: dict[str, Any]) -> None:
        metrics["batch"] = self.judge.decisions.batch(now.step - 1)
        self.metrics = metrics
        self.files.append(METRICS, metrics)
        self.observer.stepped(metrics)

    def save(self, now: State, metrics: dict[str, Any]) -> None:
        """Not in the middle of updates left out: a rewind goes back to before the first of them."""
        if "left_out" not in metrics:
            self.saving.save(now.step, self.taking(now))

    def finish(self, now: State) -> None:
        """Come back when the last step is safe on disk. Raises MissingResource if that cannot be."""
        self.saving.finish(now.step, self.taking(now))

    def taking(self, now: State) -> Take:
        """How a snapshot of this moment is taken."""

        def take(staging: state.Staging | None) -> state.Snapshot:
            loss = self.metrics.get("validation_loss")
            facts = {
                "step": now.step,
                "tokens": now.tokens,
                "corpus": self.text.fingerprint,
                "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
                "recipe": fixed_settings(self.recipe),
                "incidents": self.files.incidents(),
                "recent_losses": list(self.judge.recent),
            }
            with optim.averaged(self.optimizers):
                return state.snapshot(self.model, optim.state_tensors(self.optimizers, self.model), facts, staging)

        return take
