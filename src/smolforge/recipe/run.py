"""A recipe and a folder -> a finished run: the one place where data, model, optimizer and loop meet.

recipe -> (settle: budget, horizon) -> corpus -> model -> optimizers -> [ loop + actions ] -> Run
   ^                                                ^                          |
   the stored one, where the folder has a run       the newest sound           |
                                                    checkpoint, if any  <------+ numbers that went wrong
"""

import itertools
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolforge import commit, guard, optim
from smolforge.checkpoint import resolve, state, weights
from smolforge.config import Recipe
from smolforge.data import batches, corpus, shards
from smolforge.device import describe, pick_device, use_tensor_cores
from smolforge.errors import Diverged, InvalidFile, MissingResource, SettingError, Stopped
from smolforge.meter import Meter, clock
from smolforge.model import LanguageModel, adapted, allocate, build
from smolforge.objective import Objective
from smolforge.recipe.plan import disk_bytes, plan, work
from smolforge.recipe.read import write_recipe
from smolforge.recipe.saving import Background, Saving
from smolforge.recipe.settle import check_going_on, fixed_settings
from smolforge.recipe.workshop import Observer, Silent, Workshop
from smolforge.runs import INCIDENTS, METRICS, RECIPE, RunFolder, read_records
from smolforge.signals import EXIT_CODES, Stop, stop_signals
from smolforge.tokenizer import Tokenizer
from smolforge.training import State, train

log = logging.getLogger("smolforge")


@dataclass(frozen=True)
class Run:
    """A run that reached its last step."""

    folder: Path
    model: LanguageModel
    recipe: Recipe
    metrics: dict[str, Any]
    """Of the last step; validation values are in it where text was held out."""


def run_settled(recipe: Recipe, folder: Path, observer: Observer | None = None) -> Run:
    """Train what a settled recipe says, or go on exactly where the folder's run stands.

    Raises Stopped when a signal ended it with everything saved, Diverged when its numbers went wrong too often,
    MissingResource when its last checkpoint could not be saved.
    """
    observer = observer or Silent()
    with RunFolder.open(folder) as files, stop_signals() as stop:
        pick_device(recipe.train.device)  # one that is not there is said before anything is prepared
        state.clear(folder)
        text = open_corpus(recipe, folder, files.stored_recipe() is not None, observer)
        reading = Background(text.check, "corpus")
        run = attempt(recipe, files, text, reading, observer, stop, first=True)
        while run is None:
            run = attempt(recipe, files, text, reading, observer, stop)
    return run


def attempt(
    recipe: Recipe,
    files: RunFolder,
    text: corpus.Corpus,
    reading: Background,
    observer: Observer,
    stop: Stop,
    first: bool = False,
) -> Run | None:
    """From the newest sound checkpoint to the end; None if the numbers went wrong and all is ready for another."""
    folder, device = files.path, pick_device(recipe.train.device)
    use_tensor_cores(recipe.train.dtype, device)
    newest = newest_checkpoint(folder)
    state.seed_all(recipe.seed)
    model = initial_model(recipe, text, newest is not None).to(device)
    optimizers = optim.optimizers(model, recipe.optim)
    start, facts = restore(newest, model, optimizers, text, recipe) if newest else (State(), {})
    check_going_on(recipe, start.step)
    check_prompts(recipe, model)
    windows = batches.Windows(text.tokens(corpus.TRAIN), recipe.train.sequence_length, recipe.seed)
    if first:
        announce(recipe, start, observer)
        check_disk(recipe, folder)
        files.write(RECIPE, write_recipe(recipe))
        settings = {"micro_batch_size": recipe.train.micro_rows, "compile": recipe.train.compile is True}
        files.record_environment(start.step, describe(device) | settings)
    files.rewind(start.step, facts.get("incidents", []))
    state.set_aside(folder, start.step)
    decisions = guard.decided(files.incidents())
    recent = facts.get("recent_losses", [])
    judge = guard.Judge(recipe.guard, decisions, start.step, recent, files.record_incident)
    meter = Meter(work(recipe, device), recipe.train.steps - start.step, clock(device))
    numbers = map(decisions.batch, itertools.count(start.step))
    source = batches.stream(windows, numbers, recipe.train.rows, recipe.data.num_workers)
    objective = Objective.of(model, recipe)
    saving = Saving(recipe.train, files, reading, hurried=stop.asked)
    shop = Workshop(recipe, files, model, optimizers, text, judge, saving, observer)
    log.info("training from step %d to %d", start.step, recipe.train.steps)
    stop.stepping = True
    try:
        with saving:
            end = train(objective, optimizers, source, recipe, start, shop.actions(), stop.asked, meter, judge)
            shop.finish(end)
    except guard.Rewind as wrong:
        take_back(recipe, files, decisions, wrong)
        return None
    if end.step < recipe.train.steps:
        raise stopped(stop, end, folder)
    log.info("finished at step %d", end.step)
    optim.swap_average(optimizers)
    return Run(folder, model.eval(), recipe, {"step": end.step} | last_metrics(folder))


def take_back(recipe: Recipe, files: RunFolder, decisions: guard.Decisions, wrong: guard.Rewind) -> None:
    """Write down where the run goes on after numbers went wrong. Raises Diverged when that was done often enough."""
    place = place_to_go_back_to(files.path, recipe.train.checkpoint_every, wrong.first)
    to = state.step_of(place) if place else 0
    incident = {"step": wrong.step, "reason": wrong.reason}
    if decisions.rewinds >= recipe.guard.max_rewinds:
        files.record_incident({"kind": "stop", **incident})
        sound = f"with --init-from {place}" if place else "from the beginning"
        raise Diverged(
            f"the run ends at step {wrong.step}: {wrong.reason}. It was taken back {decisions.rewinds} times before "
            f"({files.path / INCIDENTS}). A lower --optim.learning-rate needs another --run, {sound}; "
            f"--guard.max-rewinds {decisions.rewinds + 3} goes on with this one"
        )
    next_batch = decisions.batch(wrong.step - 1) + 1
    state.set_aside(files.path, to)  # first: a checkpoint of what is taken back must not meet the decision
    files.record_incident({"kind": "rewind", **incident, "to": to, "next_batch": next_batch})
    skipped = next_batch - decisions.batch(to)
    log.warning("step %d: %s; back to step %d, %d batches are skipped", wrong.step, wrong.reason, to, skipped)


def place_to_go_back_to(folder: Path, every: int | None, first_bad: int) -> Path | None:
    """The newest sound checkpoint that a run without stops has too, if there is one; None is the beginning."""
    if every is None:
        return None
    found = state.newest_sound(folder, log.warning, wanted=lambda step: step % every == 0 and step < first_bad)
    if found is None and first_bad > every:  # the interval was another before, or they are damaged
        return newest_checkpoint(folder, before=first_bad)
    return found


def announce(recipe: Recipe, start: State, observer: Observer) -> None:
    """Say what is to be expected, and what a person should know before waiting for it."""
    expected = plan(recipe, start.step)
    observer.planned(recipe, expected, start)
    for warning in expected.warnings():
        log.warning(warning)


def check_prompts(recipe: Recipe, model: LanguageModel) -> None:
    """Refuse samples that could not be drawn, before the first step rather than at their first turn."""
    limit = model.config.max_position_embeddings
    for prompt in recipe.train.sample_prompts if recipe.train.sample_every else ():
        if len(model.tokenizer.encode(prompt)) >= limit:
            raise SettingError(f"a prompt of train.sample_prompts fills the model's context of {limit} tokens")


def open_corpus(recipe: Recipe, folder: Path, begun: bool, observer: Observer) -> corpus.Corpus:
    """The prepared corpus the recipe names, or one made in the run folder from its sources before it begins."""
    if begun and (folder / "corpus" / "corpus.json").is_file():
        return corpus.Corpus.open(folder / "corpus")
    if not begun:  # what a try that never came to its first step left, perhaps of other text
        shutil.rmtree(folder / "corpus", ignore_errors=True)
    sources = recipe.data.sources
    named = {} if begun else named_tokenizers(recipe)  # a run that goes on needs nothing it began from
    if recipe.special_tokens and not named and not begun:
        raise SettingError("special_tokens are added to a tokenizer that was named; --tokenizer names one")
    for source in sources:
        if (Path(source) / "corpus.json").is_file():
            if len(sources) > 1:
                raise SettingError(f"data.sources: the prepared corpus {source} stands alone; give it no company")
            prepared = corpus.Corpus.open(Path(source))
            check_same_tokenizer(prepared, named)
            check_vocabulary(len(prepared.tokenizer()), recipe)
            return prepared
    tokenizer = next(iter(named.values()), None)
    if tokenizer:
        check_vocabulary(len(tokenizer), recipe)
    made = shards.prepare(recipe.data, folder / "corpus", tokenizer, recipe.model.vocab_size, report=observer.preparing)
    check_same_tokenizer(made, named)
    return made


def named_tokenizers(recipe: Recipe) -> dict[str, Tokenizer]:
    """The tokenizers a recipe brings, its own and that of the model it starts from, with the tokens it adds."""
    named = {"--tokenizer": recipe.tokenizer}
    if recipe.init_from is not None:
        folder = resolve.find(recipe.init_from)
        named["--init-from"] = str(folder) if (folder / "tokenizer.json").is_file() else None
    found = {flag: resolve.tokenizer(path) for flag, path in named.items() if path is not None}
    added = recipe.special_tokens
    return {flag: each.with_special_tokens(added) if added else each for flag, each in found.items()}


def check_same_tokenizer(text: corpus.Corpus, named: dict[str, Tokenizer]) -> None:
    """All must number the words alike, or a model would learn from words that are not there."""
    for flag, tokenizer in named.items():
        if tokenizer.fingerprint != text.facts["tokenizer"]:
            raise SettingError(f"the corpus {text.folder} was made with another tokenizer than that of {flag}")


def check_vocabulary(ids: int, recipe: Recipe) -> None:
    if ids > recipe.model.vocab_size:
        raise SettingError(
            f"the tokenizer has {ids:,} ids and model.vocab_size is {recipe.model.vocab_size:,}; "
            f"--model.vocab-size {ids} makes them fit"
        )


def initial_model(recipe: Recipe, text: corpus.Corpus, resuming: bool) -> LanguageModel:
    """Fresh weights, those to start from, or none yet where a checkpoint is about to fill them."""
    dtype = torch.float64 if recipe.train.dtype == "float64" else torch.float32
    if resuming:
        model = allocate(recipe.model, dtype)
    elif recipe.init_from is not None:
        model = adapted(weights.load(resolve.find(recipe.init_from), dtype), recipe.model)
    else:
        model = build(recipe.model, recipe.seed, dtype)
    model.tokenizer = text.tokenizer()
    return model


def newest_checkpoint(folder: Path, before: float = math.inf) -> Path | None:
    """Where to go on from. Raises InvalidFile where there are checkpoints and all are damaged."""
    newest = state.newest_sound(folder, log.warning, wanted=lambda step: step < before)
    if newest is None and any(state.step_of(each) < before for each in state.all_of(folder)):
        raise InvalidFile(f"no checkpoint of {folder} is sound; delete its checkpoints to begin again")
    return newest


def restore(
    checkpoint: Path,
    model: LanguageModel,
    optimizers: list[torch.optim.Optimizer],
    text: corpus.Corpus,
    recipe: Recipe,
) -> tuple[State, dict[str, Any]]:
    """Weights, moments, random states, place, and all else that state.json has.

    Raises InvalidFile for a checkpoint made from another corpus or by another recipe.
    """
    tensors, facts = state.load(checkpoint, model)
    if facts["corpus"] != text.fingerprint:
        raise InvalidFile(
            f"{checkpoint} was trained on another corpus than {text.folder}; bring that one back, or start anew"
        )
    now, then = fixed_settings(recipe), facts.get("recipe", {})
    for name in now.keys() & then.keys():
        if now[name] != then[name]:
            raise InvalidFile(
                f"{RECIPE} has {name} {now[name]!r}, but {checkpoint} was made with {then[name]!r}; "
                f"put that back into {RECIPE}"
            )
    optim.load_state_tensors(optimizers, model, tensors)
    optim.swap_average(optimizers)  # saved as the model, where there is one
    log.info("resumed from %s", checkpoint)
    return State(facts["step"], facts["tokens"]), facts


def check_disk(recipe: Recipe, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold."""
    have = sum(path.stat().st_size for kept in state.all_of(folder) for path in kept.rglob("*") if path.is_file())
    needed, free = disk_bytes(recipe) - have, commit.free_bytes(folder)
    if needed > free:
        raise MissingResource(
            f"the checkpoints of this run need {needed:,} more bytes and {folder} has {free:,} free; "
            "make room, or choose another disk"
        )


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
