"""A recipe and a folder -> a finished run: the one place where data, model, optimizer and loop meet.

recipe -> (settle: budget, horizon) -> corpus -> model -> optimizers -> [ loop + actions ] -> Run
   ^                                                ^                          |
   the stored one, where the folder has a run       the newest sound           |
                                                    checkpoint, if any  <------+ numbers that went wrong

Where several ranks train one run, all of them are here. What is inside `ranks.tell` rank 0 does while they wait:
whatever looks at the folder and decides, writes, or speaks.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from smolforge.checkpoint import loading, training_state
from smolforge.config import Recipe, custom_classes
from smolforge.config.load import write_recipe
from smolforge.data import batches, corpus
from smolforge.data.mixture import MixtureRows, reopened
from smolforge.data.preference_pairs import PairRows
from smolforge.device import describe, is_out_of_memory, pick_device, use_tensor_cores
from smolforge.errors import MissingResource, Stopped
from smolforge.evaluation.tasks import Task
from smolforge.models import lora
from smolforge.models.decoder import LanguageModel
from smolforge.runs import reference_logprobs
from smolforge.runs.async_checkpoint import Background, Saving
from smolforge.runs.callbacks import Observer, Silent, Start, Workshop
from smolforge.runs.dataset import (
    check_held_out,
    check_items,
    check_prompts,
    open_text,
    rows_of,
    tasks_of,
    tell_of_rows,
)
from smolforge.runs.estimate import plan_of_ranks, work
from smolforge.runs.initial_model import bring_moments, initial_model
from smolforge.runs.mixture import Ledger
from smolforge.runs.profiler import Profile
from smolforge.runs.resume import check_disk, restore, standing, take_back
from smolforge.tracking import Rewound, Started, Trackers, trackers
from smolforge.training import guard, optim
from smolforge.training.distributed import ALONE, Ranks
from smolforge.training.loop import Action, State, train
from smolforge.training.objective import Objective
from smolforge.training.run_folder import METRICS, RECIPE, RunFolder, how_it_ended, read_records
from smolforge.training.signals import EXIT_CODES, Stop, stop_signals
from smolforge.training.step_timer import Meter, clock

log = logging.getLogger("smolforge")


@dataclass(frozen=True)
class Run:
    """A run that reached its last step."""

    folder: Path
    model: LanguageModel
    recipe: Recipe
    metrics: dict[str, Any]
    """Of the last step; validation values are in it where text was held out."""


def run_settled(
    recipe: Recipe,
    folder: Path,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
    profile: int | None = None,
    seen: Mapping[str, Any] | None = None,
) -> Run:
    """Train what a settled recipe says, or go on exactly where the folder's run stands.

    Raises Stopped when a signal ended it with everything saved, Diverged when its numbers went wrong too often,
    MissingResource when its last checkpoint could not be saved; on other ranks than the first, Elsewhere for these.
    """
    observer = observer or Silent()
    with ExitStack() as held:
        files = opened(folder, held, ranks)
        heard_by = hearing(recipe, held, ranks)
        stop = held.enter_context(stop_signals())
        device = pick_device(recipe.train.device, ranks.local_rank)  # before anything is prepared
        asked: list[Task] = []  # stays empty where rank 0 is another
        ranks.tell(lambda: asked.extend(tasks_of(recipe)))
        folder_of_text, base, place = ranks.tell(lambda: prepared(recipe, files, asked, observer))
        text = reopened(Path(folder_of_text))
        reading = Background(text.check if ranks.leads else lambda: None, "corpus")
        use_tensor_cores(recipe.train.dtype, device)
        ranks.begin(device, recipe.train.rank_timeout_seconds)
        to_profile = profile if ranks.leads else None
        start = Start(
            recipe, files, text, asked, base, Path(place) if place else None, reading,
            observer, heard_by, stop, ranks, device, to_profile, seen or {},
        )  # fmt: skip
        run = attempt(start, first=True)
        while run is None:
            run = attempt(start)
    return run


def opened(folder: Path, held: ExitStack, ranks: Ranks) -> RunFolder:
    """The run's folder, which rank 0 locks for as long as `held` is; the others only know where it is."""
    locked: list[RunFolder] = []
    ranks.tell(lambda: locked.append(held.enter_context(RunFolder.open(folder))))
    return locked[0] if locked else RunFolder(folder)


def hearing(recipe: Recipe, held: ExitStack, ranks: Ranks) -> Trackers:
    """Who hears of the run until `held` is left: the recipe's trackers on rank 0, nobody on the others."""
    asked_for: list[Trackers] = []
    ranks.tell(lambda: asked_for.append(trackers(recipe.report.to)))
    heard_by = asked_for[0] if asked_for else trackers(None)
    held.enter_context(hearing_the_end(heard_by))
    return heard_by


@contextmanager
def hearing_the_end(heard_by: Trackers) -> Iterator[None]:
    """Tell how the run ended, unless a person is in a hurry."""
    try:
        yield
    except Exception as error:
        heard_by.end(*how_it_ended(error))
        raise
    heard_by.end(*how_it_ended(None))


def prepared(
    recipe: Recipe, files: RunFolder, asked: Sequence[Task], observer: Observer
) -> tuple[str, str | None, str | None]:
    """Where the run's text is, what its beginning is where that stays, and where the reference of pairs is, once all
    is there that can be without a model. Rank 0 does this, and so the next two.
    """
    training_state.clear(files.path)
    text = open_text(recipe, files.path, files.stored_recipe() is not None, observer)
    check_prompts(recipe, text.tokenizer())
    check_items(asked, recipe, text.tokenizer())
    check_held_out(text, recipe)
    tell_of_rows(text, rows_of(text, recipe), recipe)
    if not recipe.keeps_its_beginning:
        return str(text.folder), None, None
    assert recipe.init_from is not None
    base = loading.fingerprint(recipe.init_from)
    of_pairs = isinstance(text, corpus.Corpus) and recipe.data.format == "pairs"
    return str(text.folder), base, str(reference_logprobs.place_of(recipe, text, base)) if of_pairs else None


def referred(start: Start) -> reference_logprobs.LogProbs | None:
    """What the model to start from says of the pairs, where there are any; rank 0 asks it, unless that was done."""
    recipe, place = start.recipe, start.reference
    if place is None:
        return None
    assert isinstance(start.text, corpus.Corpus)
    text, report = start.text, start.observer.referring
    start.ranks.tell(lambda: reference_logprobs.make_unless_there(place, recipe, text, start.device, report))
    return reference_logprobs.read(place)


def taken_up(start: Start, now: State, facts: dict[str, Any], first: bool) -> list[guard.Incident]:
    """Write down and tell that the run goes on from here; returns what is decided about it."""
    recipe, files, machine = start.recipe, start.files, {}
    if first:
        announce(start, now)
        check_disk(recipe, files.path)
        files.write(RECIPE, write_recipe(recipe))
        settings = {"micro_batch_size": recipe.train.micro_rows, "compile": recipe.train.compile is True}
        machine = describe(start.device) | settings | {"ranks": start.ranks.size}
        machine |= {"own_classes": custom_classes.fingerprints(recipe.own_classes)} if recipe.own_classes else {}
        machine = files.record_start(now.step, machine, dict(start.seen))
    files.rewind(now.step, facts.get("incidents", []))
    training_state.set_aside(files.path, now.step)
    log.info("training from step %d to %d", now.step, recipe.train.steps)
    incidents = files.incidents()
    again = guard.decided(incidents).again
    history = files.journals[METRICS].records
    start.trackers(
        Started(files.path, recipe, machine, now.step, again, history) if first else Rewound(now.step, again)
    )
    return incidents


def attempt(start: Start, first: bool = False) -> Run | None:
    """From the newest sound checkpoint to the end; None if the numbers went wrong and all is ready for another."""
    recipe, files, ranks = start.recipe, start.files, start.ranks
    place, facts = ranks.tell(lambda: standing(start))
    known = referred(start)
    training_state.seed_all(recipe.seed)
    model = initial_model(recipe, start.text, filled_later=place is not None or not ranks.leads).to(start.device)
    optimizers = optim.optimizers(model, recipe.optim)
    if place:
        now = restore(Path(place), model, optimizers)
    else:
        now = State()
        bring_moments(recipe, model, optimizers)
    decisions = guard.decided(ranks.tell(lambda: taken_up(start, now, facts, first)))
    record = start.record if ranks.leads else lambda incident: None
    judge = guard.Judge(recipe.guard, decisions, now.step, facts.get("recent_losses", []), record)
    profile = Profile(files.path, start.profile) if start.profile else None
    annotate = record_function if profile else nullcontext
    meter = Meter(work(recipe, start.device, ranks.size), recipe.train.steps - now.step, clock(start.device), annotate)
    rows = recipe.train.rows
    numbers = map(decisions.batch, itertools.count(now.step))
    text = rows_of(start.text, recipe, known)
    source = batches.stream(text, numbers, rows, recipe.data.num_workers, ranks.share(rows))
    objective = ranks.parallel(Objective.of(model, recipe))
    saving = Saving(recipe.train, files, start.reading, start.stop.asked, start.saved)
    ledger = Ledger(text, recipe, decisions, now.step) if isinstance(text, MixtureRows) else None
    shop = Workshop(start, model, optimizers, judge, saving, held_out(start, known), ledger)
    actions = shop.actions() + ([Action(1, profile.step, late=True)] if profile else [])
    start.stop.stepping = True
    try:
        with saving:
            with profile or nullcontext(), memory_suffices(recipe):
                end = train(
                    objective,
                    optimizers,
                    source,
                    recipe,
                    now,
                    actions,
                    shop.stopping,
                    meter,
                    judge,
                    ranks,
                    shop.looking,
                )
            metrics = ranks.tell(lambda: concluded(start, shop, end))
    except guard.Rewind as wrong:
        ranks.tell(partial(take_back, start, decisions, wrong))
        return None
    optim.swap_average(optimizers)
    lora.merge(model)
    return Run(files.path, model.eval(), recipe, metrics)


def held_out(start: Start, known: reference_logprobs.LogProbs | None) -> PairRows | None:
    """Pairs to measure on, where there are any."""
    if known is None or corpus.HELD_OUT not in known:
        return None
    assert isinstance(start.text, corpus.Corpus)
    return reference_logprobs.rows_of(start.text, corpus.HELD_OUT, start.recipe, known)


@contextmanager
def memory_suffices(recipe: Recipe) -> Iterator[None]:
    """Raises MissingResource, with what needs less, where it does not."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        train, less = recipe.train, []
        if train.micro_rows > 1:
            less.append(f"--train.micro-batch-size {train.micro_rows // 2} (it is {train.micro_rows})")
        if train.activation_checkpointing != "full":
            less.append("--train.activation-checkpointing full")
        way_out = " or ".join(less) or "a smaller model, or a shorter --train.sequence-length,"
        raise MissingResource(f"a step needs more memory than there is; {way_out} needs less") from error


def concluded(start: Start, shop: Workshop, end: State) -> dict[str, Any]:
    """The last step's metrics, once it is safe on disk. Raises Stopped where a signal ended the run."""
    shop.finish(end)
    if end.step < start.recipe.train.steps:
        raise stopped(start.stop, end, start.files.path)
    log.info("finished at step %d", end.step)
    return {"step": end.step} | last_metrics(start.files.path)


def announce(start: Start, now: State) -> None:
    """Say what is to be expected, and what a person should know before waiting for it."""
    expected = plan_of_ranks(start.recipe, now.step, start.ranks.size)
    start.observer.planned(start.recipe, expected, now)
    for warning in expected.warnings():
        log.warning(warning)


def last_metrics(folder: Path) -> dict[str, Any]:
    path = folder / METRICS
    records = read_records(path) if path.is_file() else []
    return records[-1] if records else {}


def stopped(stop: Stop, end: State, folder: Path) -> Stopped:
    assert stop.asked_by is not None
    return Stopped(
        f"stopped by {stop.asked_by.name} after step {end.step}, everything is saved in {folder}; "
        "the same command goes on from there",
        EXIT_CODES[stop.asked_by],
    )
