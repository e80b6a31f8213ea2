"""A recipe and a folder -> a finished run: the one place where data, model, optimizer and loop meet.

recipe -> (resolve: budget, horizon) -> dataset -> load -> build -> train, with callbacks -> finish -> Run
                                                    ^                  |
                                       the latest valid checkpoint <---+ rewind, after metrics that went wrong

Every rank of a run is in here. What is inside `ranks.on_rank_zero` is done by rank 0 while the others wait: whatever
looks at the folder and decides, writes, or reports.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from smolforge.checkpoint import loading, training_state
from smolforge.config import Recipe, custom_classes
from smolforge.config.load import write_recipe
from smolforge.data import batches, corpus
from smolforge.data.mixture import MixtureWindows, open_prepared
from smolforge.data.preference_pairs import PairRows
from smolforge.device import describe_device, is_out_of_memory, pick_device, use_tensor_cores
from smolforge.errors import MissingResourceError, Stopped
from smolforge.evaluation.tasks import Task
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel
from smolforge.runs import reference_logprobs
from smolforge.runs.async_checkpoint import AsyncCheckpointer, BackgroundTask
from smolforge.runs.callbacks import SnapshotTaker, TrainingCallbacks
from smolforge.runs.context import ProgressListener, RunContext
from smolforge.runs.dataset import (
    build_row_source,
    check_held_out,
    check_items,
    check_prompts,
    log_row_stats,
    open_dataset,
    tasks_of,
)
from smolforge.runs.estimate import estimate_of_ranks, step_cost
from smolforge.runs.initial_model import base_model_metadata, initial_model, load_initial_moments
from smolforge.runs.mirror import Mirror
from smolforge.runs.mixture import SourceTokenCounter
from smolforge.runs.profiler import Profiler
from smolforge.runs.resume import check_disk, find_resume_point, restore, rewind_run
from smolforge.tracking import Rewound, Started, Trackers, trackers
from smolforge.training import guard, optim
from smolforge.training.distributed import SINGLE_PROCESS, RankGroup
from smolforge.training.loop import Callback, TrainState, train
from smolforge.training.objective import Objective
from smolforge.training.run_folder import METRICS, RECIPE, RunFolder, how_it_ended, read_records
from smolforge.training.signals import EXIT_CODES, StopRequest, stop_signals
from smolforge.training.step_timer import StepTimer, clock

log = logging.getLogger("smolforge")


@dataclass(frozen=True)
class Run:
    """A run that reached its last step."""

    folder: Path
    model: LanguageModel
    recipe: Recipe
    metrics: dict[str, Any]
    """Of the last step, with validation values where there is a validation split."""


def run_resolved(
    recipe: Recipe,
    folder: Path,
    *,
    listener: ProgressListener | None = None,
    ranks: RankGroup = SINGLE_PROCESS,
    profile_steps: int | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Run:
    """Train a resolved recipe, or resume the folder's run exactly where it is.

    Raises Stopped when a signal ended it with everything saved, TrainingDivergedError when its metrics went wrong too
    often, MissingResourceError when its last checkpoint could not be saved; on other ranks than the first,
    FailedOnRankZeroError for these.
    """
    listener = listener or ProgressListener()
    with ExitStack() as stack:
        files = open_run_folder(folder, stack, ranks)
        active_trackers = open_trackers(recipe, stack, ranks)
        stop = stack.enter_context(stop_signals())
        device = pick_device(recipe.train.device, ranks.local_rank)  # before anything is prepared
        eval_tasks: list[Task] = []  # stays empty on other ranks than 0
        ranks.on_rank_zero(lambda: eval_tasks.extend(tasks_of(recipe)))
        inputs = ranks.on_rank_zero(partial(prepare_inputs, recipe, files, eval_tasks, listener=listener))
        dataset_dir, base_fingerprint, reference_dir = inputs
        dataset = open_prepared(Path(dataset_dir))
        corpus_check = BackgroundTask(dataset.check if ranks.is_main else lambda: None, "corpus")
        use_tensor_cores(recipe.train.dtype, device)
        ranks.start(device, recipe.train.rank_timeout_seconds)
        context = RunContext(
            recipe=recipe,
            files=files,
            dataset=dataset,
            tasks=eval_tasks,
            base_fingerprint=base_fingerprint,
            reference_dir=Path(reference_dir) if reference_dir else None,
            corpus_check=corpus_check,
            listener=listener,
            trackers=active_trackers,
            stop=stop,
            ranks=ranks,
            device=device,
            mirror=open_mirror(recipe, files) if ranks.is_main else None,
            profile_steps=profile_steps if ranks.is_main else None,
            environment=environment or {},
        )
        run = run_attempt(context, first=True)
        while run is None:
            run = run_attempt(context, first=False)
    return run


def open_run_folder(folder: Path, stack: ExitStack, ranks: RankGroup) -> RunFolder:
    """Open the run's folder, locked by rank 0 until `stack` closes; the other ranks only know its path."""
    locked: list[RunFolder] = []
    ranks.on_rank_zero(lambda: locked.append(stack.enter_context(RunFolder.open(folder))))
    return locked[0] if locked else RunFolder(folder)


def open_mirror(recipe: Recipe, files: RunFolder) -> Mirror | None:
    """Return the mirror that the recipe names; nothing is read or written yet."""
    return Mirror(Path(recipe.train.mirror), files, recipe.train) if recipe.train.mirror else None


def open_trackers(recipe: Recipe, stack: ExitStack, ranks: RankGroup) -> Trackers:
    """Open the recipe's trackers on rank 0, and none on the others, until `stack` closes."""
    opened: list[Trackers] = []
    ranks.on_rank_zero(lambda: opened.append(trackers(recipe.report.to)))
    active = opened[0] if opened else trackers(None)
    stack.enter_context(reporting_the_end(active))
    return active


@contextmanager
def reporting_the_end(active: Trackers) -> Iterator[None]:
    """Report to the trackers how the run ended, except after a second Ctrl-C."""
    try:
        yield
    except Exception as error:
        active.end(*how_it_ended(error))
        raise
    active.end(*how_it_ended(None))


def prepare_inputs(
    recipe: Recipe, files: RunFolder, eval_tasks: Sequence[Task], *, listener: ProgressListener
) -> tuple[str, str | None, str | None]:
    """Prepare all that can be without a model, on rank 0.

    Returns the dataset's folder; the fingerprint of the base model, where LoRA or DPO needs one; and the folder of the
    reference model's log-probabilities, for DPO.
    """
    training_state.remove_partial(files.path)
    dataset = open_dataset(recipe, files.path, files.stored_recipe() is not None, listener=listener)
    check_prompts(recipe, dataset.tokenizer())
    check_items(eval_tasks, recipe, dataset.tokenizer())
    check_held_out(dataset, recipe)
    log_row_stats(dataset, build_row_source(dataset, recipe), recipe)
    if not recipe.needs_base_model:
        return str(dataset.folder), None, None
    assert recipe.init_from is not None
    base = loading.fingerprint(recipe.init_from)
    has_pairs = isinstance(dataset, corpus.Corpus) and recipe.data.format == "pairs"
    return str(dataset.folder), base, str(reference_logprobs.path_for(recipe, dataset, base)) if has_pairs else None


@dataclass(frozen=True)
class LoadedState:
    """What one attempt starts from: fresh, or restored from a checkpoint."""

    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    train_state: TrainState
    decisions: guard.Decisions
    recent_losses: Sequence[float]
    ref_logprobs: reference_logprobs.LogProbs | None


def run_attempt(context: RunContext, *, first: bool) -> Run | None:
    """Load, build, train and finish. Returns None after a rewind, when all is ready for the next attempt."""
    recipe, ranks = context.recipe, context.ranks
    loaded = load_state(context, first=first)
    rows = build_row_source(context.dataset, recipe, loaded.ref_logprobs)
    profiler = Profiler(context.files.path, context.profile_steps) if context.profile_steps else None
    timer = build_timer(context, loaded, profiler)
    source = build_batches(context, loaded, rows)
    objective = ranks.wrap_ddp(Objective.from_recipe(loaded.model, recipe))
    callbacks = build_callbacks(context, loaded, rows)
    hooks = callbacks.hooks([Callback(1, profiler.step, metrics_only=True)] if profiler else [])
    context.stop.stepping = True
    try:
        with callbacks.checkpointer:
            with profiler or nullcontext(), explain_oom(recipe):
                end = train(
                    objective, loaded.optimizers, source,
                    recipe=recipe, state=loaded.train_state, timer=timer, hooks=hooks, ranks=ranks,
                )  # fmt: skip
            metrics = ranks.on_rank_zero(partial(finish_run, context, callbacks, end))
    except guard.Rewind as rewind:
        ranks.on_rank_zero(partial(rewind_run, context, loaded.decisions, rewind))
        return None
    optim.swap_ema(loaded.optimizers)
    lora.merge(loaded.model)
    return Run(context.files.path, loaded.model.eval(), recipe, metrics)


def load_state(context: RunContext, *, first: bool) -> LoadedState:
    """Load the latest valid checkpoint, or initialize model and optimizer where there is none."""
    recipe, ranks = context.recipe, context.ranks
    checkpoint, metadata = ranks.on_rank_zero(partial(find_resume_point, context))
    ref_logprobs = load_reference_logprobs(context)
    training_state.seed_all(recipe.seed)
    filled_later = checkpoint is not None or not ranks.is_main
    model = initial_model(recipe, context.dataset, filled_later=filled_later).to(context.device)
    optimizers = optim.build_optimizers(model, recipe.optim)
    if checkpoint:
        train_state = restore(Path(checkpoint), model, optimizers)
    else:
        train_state = TrainState()
        load_initial_moments(recipe, model, optimizers)
    incidents = ranks.on_rank_zero(partial(record_attempt_start, context, train_state, metadata, first=first))
    decisions = guard.fold_incidents(incidents)
    return LoadedState(model, optimizers, train_state, decisions, metadata.get("recent_losses", []), ref_logprobs)


def load_reference_logprobs(context: RunContext) -> reference_logprobs.LogProbs | None:
    """Load the reference model's log-probabilities of the pairs, for DPO; rank 0 computes them where there are none."""
    path, dataset = context.reference_dir, context.dataset
    if path is None:
        return None
    assert isinstance(dataset, corpus.Corpus)
    compute = partial(reference_logprobs.compute_unless_there, path, context.recipe, dataset)
    context.ranks.on_rank_zero(partial(compute, device=context.device, report=context.listener.on_reference))
    return reference_logprobs.read(path)


def record_attempt_start(
    context: RunContext, state: TrainState, metadata: dict[str, Any], *, first: bool
) -> list[guard.Incident]:
    """Write and report where the run starts or resumes. Returns its incidents so far."""
    recipe, files, machine = context.recipe, context.files, {}
    if first:
        announce(context, state)
        check_disk(recipe, files.path)
        files.write(RECIPE, write_recipe(recipe))
        settings = {"micro_batch_size": recipe.train.sequences_per_micro_batch, "compile": recipe.train.compile is True}
        machine = describe_device(context.device) | settings | {"ranks": context.ranks.size}
        machine |= {"own_classes": custom_classes.fingerprints(recipe.custom_classes)} if recipe.custom_classes else {}
        machine = files.record_start(state.step, machine, dict(context.environment))
    files.rewind(state.step, metadata.get("incidents", []))
    training_state.quarantine_later(files.path, state.step)
    if first and context.mirror is not None:
        context.mirror.offer(state.step)
    log.info("training from step %d to %d", state.step, recipe.train.steps)
    incidents = files.incidents()
    again = guard.fold_incidents(incidents).repeated_steps
    history = files.journals[METRICS].records
    context.trackers(
        Started(files.path, recipe, machine, state.step, again, history) if first else Rewound(state.step, again)
    )
    return incidents


def announce(context: RunContext, state: TrainState) -> None:
    """Report what the run will cost, and warn of what the user should know before waiting for it."""
    estimate = estimate_of_ranks(context.recipe, state.step, context.ranks.size)
    context.listener.on_plan(context.recipe, estimate, state)
    for warning in estimate.warnings():
        log.warning(warning)


def build_timer(context: RunContext, loaded: LoadedState, profiler: Profiler | None) -> StepTimer:
    """Return the clock of this attempt's steps; a profiler gets the names of their phases."""
    cost = step_cost(context.recipe, context.device, context.ranks.size)
    steps = context.recipe.train.steps - loaded.train_state.step
    return StepTimer(cost, steps, clock(context.device), annotate=record_function if profiler else nullcontext)


def build_batches(context: RunContext, loaded: LoadedState, rows: batches.RowSource) -> Iterator[batches.Batch]:
    """Return this rank's share of every batch, from the next step on."""
    train_settings = context.recipe.train
    numbers = map(loaded.decisions.next_batch, itertools.count(loaded.train_state.step))
    share = context.ranks.rows_of_rank(train_settings.sequences_per_step)
    workers = context.recipe.data.num_workers
    return batches.iterate_batches(rows, numbers, train_settings.sequences_per_step, num_workers=workers, share=share)


def build_callbacks(context: RunContext, loaded: LoadedState, rows: batches.RowSource) -> TrainingCallbacks:
    """Return the run's callbacks, with the guard of its losses and the writer of its checkpoints."""
    recipe, state = context.recipe, loaded.train_state
    record = context.record_incident if context.ranks.is_main else ignore_incident
    loss_guard = guard.LossGuard(recipe.guard, loaded.decisions, state.step, recent=loaded.recent_losses, record=record)
    base_metadata, adapter_config = base_model_metadata(recipe, context.base_fingerprint)
    checkpointer = AsyncCheckpointer(
        recipe.train,
        context.files,
        SnapshotTaker(context, loaded.model, loaded.optimizers, loss_guard, base_metadata, adapter_config),
        corpus_check=context.corpus_check,
        urgent=context.stop.is_set,
        on_saved=context.report_saved,
        in_use=lambda: context.mirror.copying if context.mirror is not None else None,
    )
    return TrainingCallbacks(
        context,
        loaded.model,
        loaded.optimizers,
        loss_guard=loss_guard,
        checkpointer=checkpointer,
        validation_pairs=validation_pairs(context, loaded.ref_logprobs),
        token_counter=SourceTokenCounter(rows, recipe, loaded.decisions, completed=state.step)
        if isinstance(rows, MixtureWindows)
        else None,
    )


def ignore_incident(incident: guard.Incident) -> None:
    """Do nothing: rank 0 records it."""


def validation_pairs(context: RunContext, ref_logprobs: reference_logprobs.LogProbs | None) -> PairRows | None:
    """Return the validation split of the pairs, for DPO."""
    if ref_logprobs is None or corpus.HELD_OUT not in ref_logprobs:
        return None
    assert isinstance(context.dataset, corpus.Corpus)
    return reference_logprobs.rows_of(context.dataset, corpus.HELD_OUT, context.recipe, ref_logprobs=ref_logprobs)


@contextmanager
def explain_oom(recipe: Recipe) -> Iterator[None]:
    """Raise MissingResourceError, with the settings that need less memory, where there is not enough."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hints, size = [], recipe.train.sequences_per_micro_batch
        if size > 1:
            hints.append(f"--train.micro-batch-size {size // 2} (it is {size})")
        if recipe.train.activation_checkpointing != "full":
            hints.append("--train.activation-checkpointing full")
        hint = " or ".join(hints) or "a smaller model, or a shorter --train.sequence-length,"
        raise MissingResourceError(f"a step needs more memory than there is; {hint} needs less") from error


def finish_run(context: RunContext, callbacks: TrainingCallbacks, end: TrainState) -> dict[str, Any]:
    """Return the last step's metrics, once its checkpoint is on disk, and in the mirror.

    Raises Stopped where a signal ended the run.
    """
    callbacks.finish(end)
    mirrored = {}
    if context.mirror is not None:
        context.mirror.finish(end.step, context.stop, context.listener.on_mirror)
        mirrored = {"mirrored_step": end.step}
    if end.step < context.recipe.train.steps:
        raise stopped(context.stop, end, context.files.path)
    log.info("finished at step %d", end.step)
    return {"step": end.step} | last_metrics(context.files.path) | mirrored


def last_metrics(folder: Path) -> dict[str, Any]:
    """Return the last line of a run's metrics.jsonl; {} where there is none."""
    path = folder / METRICS
    records = read_records(path) if path.is_file() else []
    return records[-1] if records else {}


def stopped(stop: StopRequest, end: TrainState, folder: Path) -> Stopped:
    """Return the error of a run that a signal ended."""
    assert stop.received is not None
    return Stopped(
        f"stopped by {stop.received.name} after step {end.step}, everything is saved in {folder}; "
        "the same command goes on from there",
        EXIT_CODES[stop.received],
    )
