"""A run's mixture: how much it needs of each source, where that is prepared, and what was learned from each.

    weights, stages, steps -> tokens of each source -> CACHE/SOURCE-KEY, a corpus each -> RUN/mixture.json

The key is of all that a corpus follows from: the source's files, how they are read, the tokenizer, the tokens. So runs
share what is prepared, and a source or tokenizer that changed is prepared anew. A run that goes on reads what
mixture.json names, and nothing else.
"""

import fcntl
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from smolforge import atomic
from smolforge.config import Data, Recipe
from smolforge.config.data import READING
from smolforge.data import sources
from smolforge.data.corpus import TRAIN, Corpus
from smolforge.data.mixture import FILE, Mixture, MixtureRows, Order
from smolforge.data.prepare import build
from smolforge.errors import InvalidFile, SettingError
from smolforge.tokenizer import Tokenizer
from smolforge.training.guard import Decisions

log = logging.getLogger("smolforge")
Report = Callable[[dict[str, int], str], None]
"""Hears what is done of the source of a name."""
SHARED = re.compile(rf"\bdata\.(?=({'|'.join(name.replace('_', '[-_]') for name in READING)})\b)")
"""What sentences about one text call the settings that a source of a mixture has of its own."""


def order_of(recipe: Recipe) -> Order:
    """The order of the sources of a recipe's mixture."""
    ends = recipe.data.ends(recipe.train.batch_tokens, recipe.optim.schedule.over(recipe.train.steps))
    return Order.of(recipe.data, ends, recipe.train.rows)


def planned(recipe: Recipe) -> dict[str, int]:
    """Windows of each source over the schedule's horizon: the same wherever the run stops."""
    order = order_of(recipe)
    counts = order.counts((recipe.optim.schedule.steps or recipe.train.steps) * recipe.train.rows)
    return dict(zip(order.names, counts, strict=True))


def needs(recipe: Recipe) -> dict[str, int]:
    """Training tokens of each source up to the horizon, if nothing were read twice; a window at least."""
    return {name: max(1, count) * recipe.train.sequence_length + 1 for name, count in planned(recipe).items()}


def shares(recipe: Recipe) -> dict[str, float]:
    """Of each source, its part of all that is read up to the horizon."""
    counts = planned(recipe)
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def open_mixture(recipe: Recipe, folder: Path, found: bool, tokenizer: Tokenizer | None, report: Report) -> Mixture:
    """The run's mixture: what its folder names where it is `found` there, or prepared as far as that was not done."""
    if found:
        return Mixture.open(folder)
    needed, prepared = needs(recipe), already_prepared(recipe.data)
    tokenizer = tokenizer or next((corpus.tokenizer() for corpus in prepared.values()), None)
    if tokenizer is None:
        raise SettingError(
            "all sources of data.mixture need the same tokenizer, and none is named; --tokenizer names one, such as "
            "HuggingFaceTB/SmolLM2-135M, or a corpus that smolforge prepare made of one source and trained it on"
        )
    cache = Path(recipe.data.cache).expanduser() if recipe.data.cache else folder.absolute().parent / "corpora"
    for name in (name for name in needed if name not in prepared):
        check_there(recipe.data, name)
    made = {}
    for number, (name, tokens) in enumerate(needed.items(), 1):
        log.info("source %d of %d, %s: %s tokens are needed", number, len(needed), name, f"{tokens:,}")
        made[name] = prepared.get(name) or in_cache(recipe.data, name, tokens, cache, tokenizer, report)
        facts = made[name].facts
        if (facts["tokenizer"], facts["eos_id"]) != (tokenizer.fingerprint, tokenizer.eos_id):
            raise SettingError(
                f"data.mixture.{name}: {made[name].folder} was made with another tokenizer than the rest"
            )
    mixture = Mixture(folder, made)
    atomic.replace(folder / FILE, json.dumps(mixture.record(), indent=2) + "\n")
    return mixture


def already_prepared(data: Data) -> dict[str, Corpus]:
    """The sources that are prepared corpora themselves."""
    places = {name: Path(data.mixture[name].source).expanduser() for name in data.weights[0]} if data.mixture else {}
    found = {name: Corpus.open(place) for name, place in places.items() if (place / "corpus.json").is_file()}
    for name, corpus in found.items():
        if corpus.format != "text":
            raise SettingError(f"data.mixture.{name}: {corpus.folder} is {corpus.format}, and a mixture is of text")
    return found


def check_there(data: Data, name: str) -> None:
    """Raises, naming the source, where it is missing: before hours are spent on another."""
    with about(name):
        sources.stamp(data.alone(name).sources[0])


@contextmanager
def about(name: str) -> Iterator[None]:
    """What is raised of a text is said of this source, and the way out is its own setting."""
    try:
        yield
    except (InvalidFile, SettingError) as error:
        said = SHARED.sub(f"data.mixture.{name}.", str(error))
        raise type(error)(f"data.mixture.{name}: {said}") from None


def in_cache(data: Data, name: str, tokens: int, cache: Path, tokenizer: Tokenizer, report: Report) -> Corpus:
    """A source prepared up to so many training tokens, or as many as it has; once for all that ask for the same."""
    assert data.mixture is not None
    alone = data.alone(name)
    most = math.ceil(tokens / (1 - alone.held_out))
    atomic.make_folder(cache)
    with about(name):
        folder = cache / called(alone, tokenizer, most)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if is_broken(folder):
                shutil.rmtree(folder)
            return build.prepare(alone, folder, tokenizer, max_tokens=most, report=lambda done: report(done, name))


def called(data: Data, tokenizer: Tokenizer, max_tokens: int) -> str:
    """What a prepared source is called among others: the end of its name, and a key of all that it follows from."""
    request = build.request_of(data, tokenizer, 0, max_tokens)
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    return f"{re.sub('[^a-z0-9]+', '-', data.sources[0].lower())[-40:].strip('-')}-{key}"


def is_broken(folder: Path) -> bool:
    """Whether what is there is no whole corpus."""
    try:
        Corpus.open(folder)
    except InvalidFile:
        return folder.exists()
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process prepares the same."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tell_of_mixture(mixture: Mixture, rows: MixtureRows, recipe: Recipe) -> None:
    """Say what of each source there is, and what a person should know before hours are spent on it."""
    steps, horizon = recipe.train.steps, recipe.optim.schedule.steps
    epochs = rows.epochs(rows.labels(steps * recipe.train.rows))
    for name, corpus in mixture.sources.items():
        there = f"{corpus.size(TRAIN)['tokens']:,}"
        log.info("%s: %s tokens are prepared, and read %.2f times", name, there, epochs[name])
    for warning in warnings(recipe, epochs):
        log.warning(warning)
    if horizon is not None and steps > horizon:
        log.warning(
            "the sources were prepared for the schedule's %s steps; beyond them what is there is read again",
            f"{horizon:,}",
        )  # fmt: skip


def warnings(recipe: Recipe, epochs: Mapping[str, float | None]) -> list[str]:
    """What nobody means: a stage that is never reached, a source that is read too often, in so many epochs."""
    most, order = recipe.data.warn_epochs, order_of(recipe)
    horizon = recipe.optim.schedule.steps or recipe.train.steps
    begins = [begin // recipe.train.rows for begin in order.begins]
    late = [
        f"{name} begins after step {begin:,}, and the schedule has {horizon:,}: it is never reached (data.stages)"
        for name, begin in zip(recipe.data.stage_names, begins, strict=True)
        if begin >= horizon
    ]
    often = [
        f"{name} will be read {times:.1f} times (data.warn_epochs is {most}); a smaller weight reads it less"
        for name, times in epochs.items()
        if most is not None and times is not None and times > most
    ]
    return late + often


class Ledger:
    """Tokens learned from each source, kept from step to step."""

    def __init__(self, rows: MixtureRows, recipe: Recipe, decisions: Decisions, done: int) -> None:
        self.rows, self.a_step, self.decisions = rows, recipe.train.rows, decisions
        self.tokens = self.learned(done)

    def learned(self, done: int) -> dict[str, int]:
        """By the first `done` steps: all batches they had, but for updates that were left out."""
        begins = {0: 0, **dict(self.decisions.jumps)}
        total = dict.fromkeys(self.rows.order.names, 0)
        for step, after in pairwise(sorted({min(step, done) for step in begins} | {done})):
            total = added(total, self.between(begins[step], begins[step] + after - step))
        for step in self.decisions.skipped:
            if step <= done:
                batch = self.decisions.batch(step - 1)
                total = added(total, self.between(batch, batch + 1), -1)
        return total

    def between(self, batch: int, end: int) -> dict[str, int]:
        """Labels of each source in some batches."""
        return added(self.rows.labels(end * self.a_step), self.rows.labels(batch * self.a_step), -1)

    def after_a_step(self, batch: int, left_out: bool) -> dict[str, int]:
        """What a step's metrics say: the stage that its batch is of, and tokens of each source so far."""
        if not left_out:
            self.tokens = added(self.tokens, self.between(batch, batch + 1))
        stage = 1 + self.rows.order.stage(batch * self.a_step)
        return {"stage": stage} | {f"tokens_from_{name}": count for name, count in self.tokens.items()}


def added(counts: Mapping[str, int], more: Mapping[str, int], times: int = 1) -> dict[str, int]:
    return {name: count + times * more[name] for name, count in counts.items()}
