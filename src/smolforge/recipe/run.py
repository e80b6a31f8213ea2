"""A recipe and a folder -> a finished run: the one place where data, model, optimizer and loop meet.

recipe -> (settle: budget, horizon) -> corpus -> model -> optimizers -> [ loop + actions ] -> Run
   ^                                                ^
   the stored one, where the folder has a run       the newest sound checkpoint, where it has one
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from smolforge import optim
from smolforge.checkpoint import resolve, state, weights
from smolforge.config import Recipe
from smolforge.data import batches, corpus
from smolforge.device import describe, pick_device
from smolforge.errors import InvalidFile, MissingResource, SettingError, Stopped
from smolforge.evaluation import measure_corpus
from smolforge.generation.stream import generate
from smolforge.model import LanguageModel, adapted, allocate, build
from smolforge.recipe.plan import Plan, disk_bytes, plan
from smolforge.recipe.read import write_recipe
from smolforge.recipe.settle import check_going_on
from smolforge.recipe.signals import EXIT_CODES, Stop, stop_signals
from smolforge.runs import METRICS, RECIPE, SAMPLES, RunFolder, read_records
from smolforge.tokenizer import Tokenizer
from smolforge.training import Action, State, autocast, train

log = logging.getLogger("smolforge")


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

    Raises Stopped when a signal ended it with everything saved.
    """
    observer = observer or Silent()
    with RunFolder.open(folder) as files:
        device = pick_device(recipe.train.device)
        text = open_corpus(recipe, folder, files.stored_recipe() is not None, observer)
        state.seed_all(recipe.seed)
        newest = newest_checkpoint(folder)
        model = initial_model(recipe, text, newest is not None).to(device)
        optimizers = optim.optimizers(model, recipe.optim)
        start = restore(newest, model, optimizers, text) if newest else State()
        check_going_on(recipe, start.step)
        check_prompts(recipe, model)
        windows = batches.Windows(text.tokens(corpus.TRAIN), recipe.train.sequence_length, recipe.seed)
        announce(recipe, start, observer)
        check_disk(recipe, folder)
        files.write(RECIPE, write_recipe(recipe))
        files.rewind(start.step)
        state.tidy(folder, newest)
        files.record_environment(start.step, describe(device) | {"micro_batch_size": recipe.train.micro_batch_size})
        source = batches.stream(windows, start.step, recipe.train.rows, recipe.data.num_workers)
        shop = Workshop(recipe, files, model, optimizers, text, observer)
        log.info("training from step %d to %d", start.step, recipe.train.steps)
        with stop_signals() as stop:
            end = train(model, optimizers, source, recipe, start, shop.actions(), stop.asked)
            if end.step < recipe.train.steps:
                shop.save(end, {})
                raise stopped(stop, end, folder)
        log.info("finished at step %d", end.step)
    return Run(folder, model.eval(), recipe, {"step": end.step} | last_metrics(folder))


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
    made = corpus.prepare(recipe.data, folder / "corpus", tokenizer, recipe.model.vocab_size, report=observer.preparing)
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


def newest_checkpoint(folder: Path) -> Path | None:
    """Where to resume from. Raises InvalidFile where there are checkpoints and all are damaged."""
    newest = state.newest_sound(folder, log.warning)
    if newest is None and state.all_of(folder):
        raise InvalidFile(f"no checkpoint of {folder} is sound; delete its checkpoints to begin again")
    return newest


def restore(
    checkpoint: Path, model: LanguageModel, optimizers: list[torch.optim.Optimizer], text: corpus.Corpus
) -> State:
    """Weights, moments, random states and place. Raises InvalidFile for a checkpoint made from another corpus."""
    tensors, facts = state.load(checkpoint, model)
    if facts["corpus"] != text.fingerprint:
        raise InvalidFile(
            f"{checkpoint} was trained on another corpus than {text.folder}; bring that one back, or start anew"
        )
    optim.load_state_tensors(optimizers, model, tensors)
    log.info("resumed from %s", checkpoint)
    return State(facts["step"], facts["tokens"])


def check_disk(recipe: Recipe, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold."""
    have = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed, free = disk_bytes(recipe) - have, shutil.disk_usage(folder).free
    if needed > free:
        raise MissingResource(
            f"the checkpoints of this run need {needed:,} more bytes and {folder} has {free:,} free; "
            "make room, or choose another disk"
        )


@dataclass(frozen=True)
class Workshop:
    """What happens around the steps of one run."""

    recipe: Recipe
    files: RunFolder
    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    text: corpus.Corpus
    observer: Observer

    def actions(self) -> list[Action]:
        """In the order they happen: a checkpoint comes after the line of metrics that belongs to it."""
        settings = self.recipe.train
        actions = [
            Action(1, self.report, when_stopped=True),
            Action(settings.checkpoint_every, self.save, when_stopped=True),
        ]
        if settings.sample_every:
            actions.insert(0, Action(settings.sample_every, self.sample))
        if settings.evaluate_every and self.text.size(corpus.HELD_OUT)["tokens"]:
            actions.insert(0, Action(settings.evaluate_every, self.measure))
        return actions

    def measure(self, now: State, metrics: dict[str, Any]) -> dict[str, Any]:
        settings = self.recipe.train
        precision = autocast(settings.dtype, self.model.head.device)
        found = measure_corpus(
            self.model, self.text, settings.sequence_length, settings.evaluate_tokens, precision=precision
        )
        return {f"validation_{name}": found[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}

    def sample(self, now: State, metrics: dict[str, Any]) -> None:
        prompts, options = self.recipe.train.sample_prompts, self.recipe.sample.model_dump()
        if options["seed"] is None:
            options["seed"] = self.recipe.seed + now.step
        self.model.eval()
        found = generate(self.model, prompts, **options)
        self.model.train()
        for prompt, completion in zip(prompts, found, strict=True):
            self.files.append(SAMPLES, {"step": now.step, "prompt": prompt, "text": completion.text})
            self.observer.sampled(prompt + completion.text)

    def report(self, now: State, metrics: dict[str, Any]) -> None:
        self.files.append(METRICS, metrics)
        self.observer.stepped(metrics)

    def save(self, now: State, metrics: dict[str, Any]) -> None:
        """One checkpoint of this moment, and older ones that are no longer wanted removed."""
        folder = state.folder_of(self.files.path, now.step)
        if folder.exists():
            return
        facts = {
            "step": now.step,
            "tokens": now.tokens,
            "corpus": self.text.fingerprint,
            "validation_loss": metrics.get("validation_loss"),
        }
        tensors = optim.state_tensors(self.optimizers, self.model)
        state.save(folder, self.model, self.model.tokenizer, tensors, facts)
        state.retain(self.files.path, self.recipe.train.keep_last, self.recipe.train.keep_best)
        log.info("saved %s", folder.name)


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
