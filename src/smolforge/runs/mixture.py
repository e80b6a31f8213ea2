"""A run's mixture: the tokens it needs of each source, where they are prepared, and the tokens learned from each.

    weights, stages, steps -> tokens of each source -> CACHE/SOURCE-KEY, a corpus each -> RUN/mixture.json

The key is a hash of all that the corpus depends on: the source's files, how they are read, the tokenizer, the tokens.
Runs share what is prepared; a source or tokenizer that changed is prepared again. A resumed run reads what
mixture.json names, and nothing else.
"""

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
from smolforge.config.data import READ_SETTINGS
from smolforge.data import sources
from smolforge.data.corpus import TRAIN, Corpus
from smolforge.data.mixture import MIXTURE_FILE, Mixture, MixtureSchedule, MixtureWindows
from smolforge.data.prepare import build
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.tokenizer import Tokenizer
from smolforge.training.guard import Decisions

log = logging.getLogger("smolforge")
Report = Callable[[dict[str, int], str], None]
"""Hears what is done of the source of a name."""
SHARED = re.compile(rf"\bdata\.(?=({'|'.join(name.replace('_', '[-_]') for name in READ_SETTINGS)})\b)")
"""What sentences about one text call the settings that a source of a mixture has of its own."""


def order_of(recipe: Recipe) -> MixtureSchedule:
    """Return the schedule of a recipe's mixture: which source each window comes from."""
    ends = recipe.data.stage_ends(recipe.train.batch_tokens, recipe.optim.schedule.resolved(recipe.train.steps))
    return MixtureSchedule.from_data(recipe.data, ends, recipe.train.sequences_per_step)


def window_counts(recipe: Recipe) -> dict[str, int]:
    """Return the windows of each source up to the schedule's horizon, wherever the run stops."""
    order = order_of(recipe)
    counts = order.counts((recipe.optim.schedule.steps or recipe.train.steps) * recipe.train.sequences_per_step)
    return dict(zip(order.names, counts, strict=True))


def tokens_needed(recipe: Recipe) -> dict[str, int]:
    """Return the training tokens of each source up to the horizon, if nothing were read twice; a window at least."""
    return {name: max(1, count) * recipe.train.sequence_length + 1 for name, count in window_counts(recipe).items()}


def source_fractions(recipe: Recipe) -> dict[str, float]:
    """Return each source's fraction of all tokens up to the horizon."""
    counts = window_counts(recipe)
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def open_mixture(recipe: Recipe, folder: Path, exists: bool, *, tokenizer: Tokenizer | None, report: Report) -> Mixture:
    """Open the run's mixture where it `exists`; else prepare those of its sources that are not prepared yet."""
    if exists:
        return Mixture.open(folder)
    needed, prepared = tokens_needed(recipe), already_prepared(recipe.data)
    tokenizer = tokenizer or next((corpus.tokenizer() for corpus in prepared.values()), None)
    if tokenizer is None:
        raise ConfigError(
            "all sources of data.mixture need the same tokenizer, and none is named; --tokenizer names one, such as "
            "HuggingFaceTB/SmolLM2-135M, or a corpus that smolforge prepare made of one source and trained it on"
        )
    cache = Path(recipe.data.cache).expanduser() if recipe.data.cache else folder.absolute().parent / "corpora"
    for name in (name for name in needed if name not in prepared):
        check_source_exists(recipe.data, name)
    corpora = {}
    for number, (name, tokens) in enumerate(needed.items(), 1):
        log.info("source %d of %d, %s: %s tokens are needed", number, len(needed), name, f"{tokens:,}")
        corpora[name] = prepared.get(name) or prepare_in_cache(
            recipe.data, name, tokens, cache=cache, tokenizer=tokenizer, report=report
        )
        metadata = corpora[name].metadata
        if (metadata["tokenizer"], metadata["eos_id"]) != (tokenizer.fingerprint, tokenizer.eos_id):
            raise ConfigError(
                f"data.mixture.{name}: {corpora[name].folder} was made with another tokenizer than the rest"
            )
    mixture = Mixture(folder, corpora)
    atomic.write_text_atomic(folder / MIXTURE_FILE, json.dumps(mixture.record(), indent=2) + "\n")
    return mixture


def already_prepared(data: Data) -> dict[str, Corpus]:
    """Return the sources that are prepared corpora themselves."""
    paths = {name: Path(data.mixture[name].source).expanduser() for name in data.weights[0]} if data.mixture else {}
    corpora = {name: Corpus.open(path) for name, path in paths.items() if (path / "corpus.json").is_file()}
    for name, corpus in corpora.items():
        if corpus.format != "text":
            raise ConfigError(f"data.mixture.{name}: {corpus.folder} is {corpus.format}, and a mixture is of text")
    return corpora


def check_source_exists(data: Data, name: str) -> None:
    """Raise an error that names the source where it is missing, before hours are spent on another."""
    with blame_source(name):
        sources.stamp(data.single_source(name).sources[0])


@contextmanager
def blame_source(name: str) -> Iterator[None]:
    """Name this source, and its own settings, in errors about a text."""
    try:
        yield
    except (InvalidFileError, ConfigError) as error:
        message = SHARED.sub(f"data.mixture.{name}.", str(error))
        raise type(error)(f"data.mixture.{name}: {message}") from None


def prepare_in_cache(
    data: Data, name: str, tokens: int, *, cache: Path, tokenizer: Tokenizer, report: Report
) -> Corpus:
    """Prepare a source up to a number of training tokens, or all it has; once for all runs that need the same."""
    assert data.mixture is not None
    of_source = data.single_source(name)
    max_tokens = math.ceil(tokens / (1 - of_source.held_out))
    atomic.make_dir_durable(cache)
    with blame_source(name):
        folder = cache / cache_name(of_source, tokenizer, max_tokens)
        with atomic.lock_file(folder.with_name(f".{folder.name}.lock")):
            if is_broken(folder):
                shutil.rmtree(folder)
            return build.prepare(
                of_source, folder, tokenizer, max_tokens=max_tokens, report=lambda done: report(done, name)
            )


def cache_name(data: Data, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Return a prepared source's folder name: the end of its name, and a hash of all it depends on."""
    request = build.request_of(data, tokenizer, 0, max_tokens=max_tokens)
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    return f"{re.sub('[^a-z0-9]+', '-', data.sources[0].lower())[-40:].strip('-')}-{key}"


def is_broken(folder: Path) -> bool:
    """Whether a folder exists that is no complete corpus."""
    try:
        Corpus.open(folder)
    except InvalidFileError:
        return folder.exists()
    return False


def log_mixture(mixture: Mixture, rows: MixtureWindows, recipe: Recipe) -> None:
    """Log the tokens and epochs of each source, and warn of what the user should know before hours are spent."""
    steps, horizon = recipe.train.steps, recipe.optim.schedule.steps
    epochs = rows.epochs(rows.labels(steps * recipe.train.sequences_per_step))
    for name, corpus in mixture.sources.items():
        available = f"{corpus.size(TRAIN)['tokens']:,}"
        log.info("%s: %s tokens are prepared, and read %.2f times", name, available, epochs[name])
    for warning in mixture_warnings(recipe, epochs):
        log.warning(warning)
    if horizon is not None and steps > horizon:
        log.warning(
            "the sources were prepared for the schedule's %s steps; beyond them what is there is read again",
            f"{horizon:,}",
        )  # fmt: skip


def mixture_warnings(recipe: Recipe, epochs: Mapping[str, float | None]) -> list[str]:
    """Return warnings of stages that are never reached and of sources that are read too often."""
    max_epochs, order = recipe.data.warn_epochs, order_of(recipe)
    horizon = recipe.optim.schedule.steps or recipe.train.steps
    starts = [start // recipe.train.sequences_per_step for start in order.starts]
    late = [
        f"{name} begins after step {start:,}, and the schedule has {horizon:,}: it is never reached (data.stages)"
        for name, start in zip(recipe.data.stage_names, starts, strict=True)
        if start >= horizon
    ]
    repeated = [
        f"{name} will be read {times:.1f} times (data.warn_epochs is {max_epochs}); a smaller weight reads it less"
        for name, times in epochs.items()
        if max_epochs is not None and times is not None and times > max_epochs
    ]
    return late + repeated


class SourceTokenCounter:
    """Counts the tokens learned from each source, step by step."""

    def __init__(self, rows: MixtureWindows, recipe: Recipe, decisions: Decisions, *, completed: int) -> None:
        self.rows, self.rows_per_step, self.decisions = rows, recipe.train.sequences_per_step, decisions
        self.tokens = self.learned(completed)

    def learned(self, completed: int) -> dict[str, int]:
        """Return the tokens of each source in the first `completed` steps, without skipped updates."""
        batch_at_step = {0: 0, **dict(self.decisions.jumps)}
        total = dict.fromkeys(self.rows.schedule.names, 0)
        for step, after in pairwise(sorted({min(step, completed) for step in batch_at_step} | {completed})):
            total = add_counts(total, self.between(batch_at_step[step], batch_at_step[step] + after - step))
        for step in self.decisions.skipped:
            if step <= completed:
                batch = self.decisions.next_batch(step - 1)
                total = add_counts(total, self.between(batch, batch + 1), -1)
        return total

    def between(self, batch: int, end: int) -> dict[str, int]:
        """Return the labels of each source in batches `batch` to `end`."""
        return add_counts(self.rows.labels(end * self.rows_per_step), self.rows.labels(batch * self.rows_per_step), -1)

    def after_a_step(self, batch: int, left_out: bool) -> dict[str, int]:
        """Return a step's metrics: the stage of its batch, and the tokens of each source so far."""
        if not left_out:
            self.tokens = add_counts(self.tokens, self.between(batch, batch + 1))
        stage = 1 + self.rows.schedule.stage(batch * self.rows_per_step)
        return {"stage": stage} | {f"tokens_from_{name}": count for name, count in self.tokens.items()}


def add_counts(counts: Mapping[str, int], more: Mapping[str, int], times: int = 1) -> dict[str, int]:
    """Return `counts` plus `times` times `more`."""
    return {name: count + times * more[name] for name, count in counts.items()}
