"""The text of a run: the corpus its recipe names, or one made from its sources, by a tokenizer that all agree on."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from smolforge.checkpoint import loading
from smolforge.config import Recipe
from smolforge.data import batches, corpus, packing, preference_pairs
from smolforge.data.mixture import FILE, Mixture, MixtureRows, Prepared
from smolforge.data.prepare import build
from smolforge.data.sources import on_hub
from smolforge.errors import SettingError
from smolforge.evaluation import tasks
from smolforge.evaluation.multiple_choice import encoded
from smolforge.evaluation.tasks import Task
from smolforge.generation.stream import prompt_ids
from smolforge.runs import reference_logprobs
from smolforge.runs.callbacks import Observer, prompts_of
from smolforge.runs.mixture import open_mixture, order_of, tell_of_mixture
from smolforge.tokenizer import Tokenizer
from smolforge.training.run_folder import RunFolder

log = logging.getLogger("smolforge")


def open_text(recipe: Recipe, folder: Path, begun: bool, observer: Observer) -> Prepared:
    """What the recipe learns from, one corpus or a mixture, prepared before the run begins."""
    if recipe.data.mixture is None:
        return open_corpus(recipe, folder, begun, observer, most_streamed(recipe))
    found = begun and (folder / FILE).is_file()  # a run that goes on needs nothing it began from
    named = {} if found else named_tokenizers(recipe)
    text = open_mixture(recipe, folder, found, next(iter(named.values()), None), observer.preparing)
    for each in text.sources.values():
        check_same_tokenizer(each, named)
    check_vocabulary(len(text.tokenizer()), recipe)
    return text


def open_corpus(
    recipe: Recipe, folder: Path, begun: bool, observer: Observer, most: int | None = None
) -> corpus.Corpus:
    """The prepared corpus the recipe names, or one made in the run folder from its sources before it begins, of at most
    so many tokens.
    """
    if begun and (folder / "corpus" / "corpus.json").is_file():
        return corpus.Corpus.open(folder / "corpus")
    sources = recipe.data.sources
    named = {} if begun else named_tokenizers(recipe)  # a run that goes on needs nothing it began from
    if recipe.special_tokens and not named and not begun:
        raise SettingError("special_tokens are added to a tokenizer that was named; --tokenizer names one")
    for source in sources:
        if (Path(source) / "corpus.json").is_file():
            if len(sources) > 1:
                raise SettingError(f"data.sources: the prepared corpus {source} stands alone; give it no company")
            prepared = corpus.Corpus.open(Path(source))
            check_same_format(prepared, recipe)
            check_same_tokenizer(prepared, named)
            check_vocabulary(len(prepared.tokenizer()), recipe)
            return prepared
    tokenizer = next(iter(named.values()), None)
    if tokenizer:
        check_vocabulary(len(tokenizer), recipe)
    elif recipe.init_from is not None and not begun:
        raise SettingError(
            f"{recipe.init_from} has no tokenizer beside it, and another would number the words otherwise; --tokenizer "
            "names the one it was trained with (HuggingFaceTB/cosmo2-tokenizer is that of SmolLM and SmolLM2)"
        )
    if not begun:  # what a try that never came to its first step left, unless it is of the same text
        build.clear(folder / "corpus", recipe.data, tokenizer, recipe.model.vocab_size, most)
    asked = (recipe.data, folder / "corpus", tokenizer, recipe.model.vocab_size, most)
    made = build.prepare(*asked, report=observer.preparing)
    check_same_tokenizer(made, named)
    return made


def most_streamed(recipe: Recipe) -> int | None:
    """Tokens to prepare of a data set on the Hub: what is read up to the schedule's horizon, and the share held out.

    None, for all there is, of other texts, and where epochs of it are counted.
    """
    data, train = recipe.data, recipe.train
    if data.format != "text" or train.epochs is not None or len(data.sources) != 1 or not on_hub(data.sources[0]):
        return None
    steps = recipe.optim.schedule.steps or train.steps
    return math.ceil((steps * train.batch_tokens + 1) / (1 - data.held_out))


def named_tokenizers(recipe: Recipe) -> dict[str, Tokenizer]:
    """The tokenizers a recipe brings, its own and that of the model it starts from, with the tokens it adds."""
    found: dict[str, Tokenizer] = {}
    # First the model's: where both name one on the Hub, that brings all its files at once.
    begun = _its_own(recipe.init_from) if recipe.init_from is not None else None
    if recipe.tokenizer is not None:
        found["--tokenizer"] = loading.tokenizer(recipe.tokenizer)
    if begun is not None:
        found["--init-from"] = begun
    added = recipe.special_tokens
    return {flag: each.with_special_tokens(added) if added else each for flag, each in found.items()}


def _its_own(model: str) -> Tokenizer | None:
    """The tokenizer that a MODEL brings."""
    return loading.tokenizer_of(loading.with_tokenizer(loading.find(model)))


def check_same_tokenizer(text: corpus.Corpus, named: dict[str, Tokenizer]) -> None:
    """All must number the words alike, or a model would learn from words that are not there."""
    for flag, tokenizer in named.items():
        if tokenizer.fingerprint != text.facts["tokenizer"]:
            raise SettingError(f"the corpus {text.folder} was made with another tokenizer than that of {flag}")


def check_same_format(text: corpus.Corpus, recipe: Recipe) -> None:
    """A recipe says what it learns from."""
    if text.format != recipe.data.format:
        form = text.format
        raise SettingError(f"the corpus {text.folder} is {form}; --data.format {form} learns from it as such")


def check_vocabulary(ids: int, recipe: Recipe) -> None:
    if ids > recipe.model.vocab_size:
        raise SettingError(
            f"the tokenizer has {ids:,} ids and model.vocab_size is {recipe.model.vocab_size:,}; "
            f"--model.vocab-size {ids} makes them fit"
        )


def rows_of(text: Prepared, recipe: Recipe, known: reference_logprobs.LogProbs | None = None) -> batches.Rows:
    """What batches are made of; of pairs with what is `known` of them. Raises InvalidFile for less than a row."""
    if isinstance(text, Mixture):
        texts = {name: each.tokens(corpus.TRAIN) for name, each in text.sources.items()}
        return MixtureRows(texts, order_of(recipe), recipe.train.sequence_length, recipe.seed)
    match recipe.data.format:
        case "text":
            return batches.Windows(text.tokens(corpus.TRAIN), recipe.train.sequence_length, recipe.seed)
        case "chat":
            return packing.PackedRows(text, corpus.TRAIN, recipe.train.sequence_length, recipe.seed)
        case "pairs":
            return reference_logprobs.rows_of(text, corpus.TRAIN, recipe, known)
        case never:
            assert_never(never)


def tasks_of(recipe: Recipe) -> list[Task]:
    """What to score while training.

    Raises SettingError, InvalidFile or MissingResource for what is no task, or cannot be read.
    """
    settings = recipe.train
    words = settings.evaluate_tasks if settings.evaluate_tasks and settings.evaluate_every else ()
    found = [tasks.find(word, settings.evaluate_task_items) for word in words]
    names = [task.name for task in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingError(f"two of train.evaluate_tasks are called {twice[0]}; name each once, or rename a file")
    return found


def tell_of_rows(text: Prepared, source: batches.Rows, recipe: Recipe) -> None:
    """Say aloud how often the sources of a mixture are read, and what of conversations is too long to be learned."""
    if isinstance(text, Mixture) and isinstance(source, MixtureRows):
        tell_of_mixture(text, source, recipe)
    if isinstance(source, preference_pairs.PairRows):
        a_step = source.pairs / source.count * recipe.train.rows
        log.info("%s pairs, %.1f a step; %.1f %% of the rows filled up", source.pairs, a_step, 100 * source.padding)
        if source.cut:
            log.warning(
                "of %s pairs %s are longer than dpo.max_length (%s) tokens: of those the end of the prompt is kept, %s "
                "tokens, and of the answers what there is room for",
                f"{source.pairs:,}", f"{source.cut:,}", *recipe.dpo.lengths(recipe.train.sequence_length),
            )  # fmt: skip
    if isinstance(source, packing.PackedRows) and source.cut + source.left_out:
        log.warning(
            "of %s conversations %s are longer than a row of train.sequence_length (%s) tokens and cut after a whole "
            "turn, or at the row's end where the first is too long; %s more, whose first answer begins beyond it, "
            "are left out",
            f"{len(source.lengths):,}", f"{source.cut:,}", f"{recipe.train.sequence_length:,}", f"{source.left_out:,}",
        )  # fmt: skip


def count_rows(recipe: Recipe, folder: Path, observer: Observer) -> int:
    """Rows of one epoch, for which the text is prepared in the folder of a run that has not begun."""
    with RunFolder.open(folder):
        return rows_of(open_corpus(recipe, folder, False, observer), recipe).count


def check_prompts(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Refuse samples that could not be drawn, before the first step rather than at their first turn."""
    limit = recipe.model.max_position_embeddings
    for prompt in prompts_of(recipe) if recipe.train.sample_every else ():
        if len(prompt_ids(tokenizer, prompt)) >= limit:
            raise SettingError(f"a prompt of train.sample_prompts fills the model's context of {limit} tokens")


def check_items(asked: Sequence[Task], recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Refuse items beyond the model's context before the first step rather than at their first turn."""
    for task in asked:
        encoded(tokenizer, task.items, recipe.model.max_position_embeddings)


def check_held_out(text: Prepared, recipe: Recipe) -> None:
    """Refuse held-out conversations that are all too long to be measured, before the first step as well."""
    measured = recipe.train.evaluate_every and text.size(corpus.HELD_OUT)["tokens"]
    if measured and isinstance(text, corpus.Corpus) and text.format == "chat":
        packing.PackedRows(text, corpus.HELD_OUT, recipe.train.sequence_length, seed=0)
