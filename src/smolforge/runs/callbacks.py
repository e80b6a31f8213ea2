"""What a run does between its steps: validate, sample, report, save.

Rank 0 does it. The other ranks have the same callbacks at the same steps, and wait. Nothing here changes a weight.
"""

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from smolforge.checkpoint.training_state import Snapshot, StagingBuffer, take_snapshot
from smolforge.data import corpus
from smolforge.data.mixture import Mixture
from smolforge.data.preference_pairs import PairRows
from smolforge.device import autocast
from smolforge.device.usage import EnergyPerToken, ResourceUsage, joule_counter
from smolforge.evaluation import measure_corpus
from smolforge.evaluation.multiple_choice import score, summary
from smolforge.evaluation.perplexity import measure_mixture, measure_pairs
from smolforge.generation.stream import generate
from smolforge.models.decoder import LanguageModel
from smolforge.runs.async_checkpoint import AsyncCheckpointer, Metrics
from smolforge.runs.context import RunContext
from smolforge.runs.dataset import prompts_of
from smolforge.runs.mixture import SourceTokenCounter, source_fractions
from smolforge.runs.resolve import fixed_settings
from smolforge.tracking import Sampled, Stepped
from smolforge.tracking.histograms import Watch, weight_norm
from smolforge.training import optim
from smolforge.training.dpo import DPOLoss
from smolforge.training.guard import LossGuard
from smolforge.training.loop import Callback, CallbackFn, Hooks, TrainState
from smolforge.training.objective import Objective
from smolforge.training.run_folder import METRICS, SAMPLES


class TrainingCallbacks:
    """The callbacks of one run, and what they need."""

    def __init__(
        self,
        context: RunContext,
        model: LanguageModel,
        optimizers: list[torch.optim.Optimizer],
        *,
        loss_guard: LossGuard,
        checkpointer: AsyncCheckpointer,
        validation_pairs: PairRows | None = None,
        token_counter: SourceTokenCounter | None = None,
    ) -> None:
        """DPO is validated on `validation_pairs`; a mixture counts the tokens of its sources in `token_counter`."""
        self.recipe, self.files, self.dataset = context.recipe, context.files, context.dataset
        self.tasks, self.stop, self.ranks = context.tasks, context.stop, context.ranks
        self.listener, self.trackers = context.listener, context.trackers
        self.model, self.optimizers = model, optimizers
        self.loss_guard, self.checkpointer = loss_guard, checkpointer
        self.validation_pairs, self.token_counter = validation_pairs, token_counter
        self.metrics: dict[str, Any] = {}
        """Of the last step."""
        self.retry_save = False
        counter = joule_counter(context.device) if self.ranks.size == 1 else None
        self.energy_meter = EnergyPerToken(counter, self.recipe.train.batch_tokens)
        self.usage = ResourceUsage(context.device)
        self.watch = Watch(model, self.recipe.report, context.trackers)

    def hooks(self, extra: Sequence[Callback] = ()) -> Hooks:
        """Return all that this run adds to the training loop."""
        return Hooks([*self.callbacks(), *extra], self.should_stop, self.on_gradients, self.loss_guard)

    def callbacks(self) -> list[Callback]:
        """Return the callbacks in the order they run: a checkpoint comes after its step's line of metrics."""
        settings, report = self.recipe.train, self.recipe.report
        callbacks = []
        if settings.evaluate_every and (self.has_validation_split or settings.evaluate_tasks):
            callbacks.append(Callback(settings.evaluate_every, self.on_rank_zero(self.validate)))
        if settings.sample_every:
            callbacks.append(Callback(settings.sample_every, self.on_rank_zero(self.sample)))
        if self.ranks.is_main:
            if report.norms_every:
                callbacks.append(Callback(report.norms_every, self.log_weight_norm))
            if report.watch:
                callbacks.append(Callback(report.watch_every, self.log_watched))
            callbacks.append(Callback(1, self.report, metrics_only=True))
        save = self.on_rank_zero(self.save)
        callbacks.append(Callback(settings.checkpoint_every, save, force=lambda: self.retry_save))
        return callbacks

    def on_rank_zero(self, fn: CallbackFn) -> CallbackFn:
        """Return a callback that rank 0 runs while the others wait."""
        return partial(self.ranks.on_rank_zero, fn)

    def should_stop(self) -> bool:
        """Return whether any rank received a signal to stop. One exchange makes all ranks return the same.

        The same exchange sets `retry_save`: whether a checkpoint that failed should be tried again.
        """
        retry = self.ranks.is_main and self.checkpointer.poll()
        answers = self.ranks.all_gather(self.stop.received or 0, int(retry))
        self.retry_save = bool(answers[0][1])
        number = next((number for number, _ in answers if number), None)
        if number is not None:
            self.stop.received = signal.Signals(number)
        return number is not None

    @property
    def has_validation_split(self) -> bool:
        """Whether the dataset has a validation split."""
        return self.dataset.size(corpus.HELD_OUT)["tokens"] > 0

    def validate(self, state: TrainState, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return metrics of the validation split and scores of the tasks."""
        with optim.ema_weights(self.optimizers):
            return (self.validation_metrics() if self.has_validation_split else {}) | self.task_scores()

    def task_scores(self) -> dict[str, float | int]:
        """Return each task's accuracies, by each way of counting, and its number of items."""
        scores: dict[str, float | int] = {}
        self.model.eval()
        for task in self.tasks:
            with autocast(self.recipe.train.dtype, self.model.lm_head_weight.device):
                result = summary(score(self.model, task.items))
            scores |= {f"task_{task.name}_{name}": result[name] for name in ("acc", "acc_norm", "acc_chars", "n")}
        self.model.train()
        return scores

    def validation_metrics(self) -> dict[str, float]:
        """Return loss and what goes with it, of the validation split."""
        settings = self.recipe.train
        if self.validation_pairs is not None:
            objective = Objective(self.model, settings.dtype, preference=DPOLoss(self.recipe.dpo.beta))
            values = measure_pairs(objective, self.validation_pairs, settings.evaluate_tokens)
            return {f"validation_{name}": value for name, value in values.items()}
        options: dict[str, Any] = {
            "sequence_length": settings.sequence_length,
            "max_tokens": settings.evaluate_tokens,
            "precision": autocast(settings.dtype, self.model.lm_head_weight.device),
            "intra_document_masking": self.recipe.data.intra_document_masking,
        }
        if isinstance(self.dataset, Mixture):
            values = measure_mixture(self.model, self.dataset, source_fractions(self.recipe), **options)
            return {f"validation_{name}": value for name, value in values.items()}
        values = measure_corpus(self.model, self.dataset, **options)
        return {f"validation_{name}": values[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}

    def sample(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Generate from the recipe's prompts, and report the texts."""
        prompts, options = prompts_of(self.recipe), self.recipe.sample.model_dump()
        if options["seed"] is None:
            options["seed"] = self.recipe.seed + state.step
        self.model.eval()
        with optim.ema_weights(self.optimizers):
            completions = generate(self.model, prompts, **options)
        self.model.train()
        separator = "" if self.dataset.format == "text" else "\n"
        for number, (prompt, completion) in enumerate(zip(self.recipe.train.sample_prompts, completions, strict=True)):
            self.files.append(SAMPLES, {"step": state.step, "prompt": prompt, "text": completion.text})
            self.listener.on_sample(prompt + separator + completion.text)
            self.trackers(Sampled(state.step, number, prompt, completion.text))

    def log_weight_norm(self, state: TrainState, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the norm of all weights."""
        return {"weight_norm": weight_norm(self.model)}

    def on_gradients(self, step: int) -> None:
        """Record the gradients of a step, on rank 0, where the recipe asks for histograms."""
        if self.ranks.is_main:
            self.watch.gradients(step)

    def log_watched(self, state: TrainState, metrics: dict[str, Any]) -> dict[str, Any]:
        """Report histograms of weights and gradients; return their norms."""
        return self.watch.finish_step(state.step)

    def report(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Complete the step's metrics, write their line, and report them."""
        metrics["batch"] = self.loss_guard.decisions.next_batch(state.step - 1)
        if self.token_counter is not None:
            metrics |= self.token_counter.after_a_step(metrics["batch"], "left_out" in metrics)
        metrics |= self.energy_meter.sample() | self.usage.sample()
        self.metrics = metrics
        self.files.append(METRICS, metrics)
        self.listener.on_step(metrics)
        self.trackers(Stepped(metrics))

    def save(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Start a checkpoint, except amid skipped updates: a rewind goes back to before the first of them."""
        if "left_out" not in metrics:
            self.checkpointer.save(state, metrics)

    def finish(self, state: TrainState) -> None:
        """Return when the last step is on disk. Raises MissingResourceError where that cannot be."""
        self.checkpointer.finish(state, self.metrics)


@dataclass(frozen=True)
class SnapshotTaker:
    """Copies all that a checkpoint holds, at one moment of a run."""

    context: RunContext
    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    loss_guard: LossGuard
    base_metadata: dict[str, Any]
    """Of the model that LoRA changes."""
    adapter_config: dict[str, Any] | None
    """For peft, of a LoRA run."""

    def __call__(self, state: TrainState, metrics: Metrics, staging: StagingBuffer | None) -> Snapshot:
        """Return a snapshot of weights (or their EMA), optimizer and random states, and metadata."""
        metadata = self.metadata(state, metrics) | self.base_metadata
        with optim.ema_weights(self.optimizers):
            tensors = optim.state_tensors(self.optimizers, self.model)
            return take_snapshot(self.model, tensors, metadata, staging=staging, adapter_settings=self.adapter_config)

    def metadata(self, state: TrainState, metrics: Metrics) -> dict[str, Any]:
        """Return what state.json holds of this moment."""
        loss, reference_dir = metrics.get("validation_loss"), self.context.reference_dir
        return {
            "step": state.step,
            "tokens": state.tokens,
            "corpus": self.context.dataset.fingerprint,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "recipe": fixed_settings(self.context.recipe),
            "incidents": self.context.files.incidents(),
            "recent_losses": list(self.loss_guard.recent),
            **({"reference": reference_dir.name} if reference_dir else {}),
        }
