"""The dataset of a run: the corpus its recipe names, or one prepared from its sources, with one tokenizer for all."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from smolforge.checkpoint import loading
from smolforge.config import Recipe
from smolforge.data import batches, corpus, packing, preference_pairs
from smolforge.data.mixture import MIXTURE_FILE, Mixture, MixtureWindows, PreparedData
from smolforge.data.prepare import build
from smolforge.data.sources import is_on_hub
from smolforge.errors import ConfigError
from smolforge.evaluation import tasks
from smolforge.evaluation.multiple_choice import encode_items
from smolforge.evaluation.tasks import Task
from smolforge.generation.stream import Prompt, prompt_ids
from smolforge.runs import reference_logprobs
from smolforge.runs.context import ProgressListener
from smolforge.runs.mixture import log_mixture, open_mixture, order_of
from smolforge.tokenizer import Tokenizer
from smolforge.training.run_folder import RunFolder

log = logging.getLogger("smolforge")


def open_dataset(recipe: Recipe, folder: Path, exists: bool, *, listener: ProgressListener) -> PreparedData:
    """Open the recipe's dataset, one corpus or a mixture; prepare it where the run does not exist yet."""
    if recipe.data.mixture is None:
        return open_corpus(recipe, folder, exists, listener=listener, max_tokens=max_streamed_tokens(recipe))
    has_mixture = exists and (folder / MIXTURE_FILE).is_file()  # a run that goes on needs nothing it began from
    tokenizers = {} if has_mixture else named_tokenizers(recipe)
    mixture = open_mixture(
        recipe, folder, has_mixture, tokenizer=next(iter(tokenizers.values()), None), report=listener.on_prepare
    )
    for corpus_of_source in mixture.sources.values():
        check_same_tokenizer(corpus_of_source, tokenizers)
    check_vocabulary(len(mixture.tokenizer()), recipe)
    return mixture


def open_corpus(
    recipe: Recipe, folder: Path, exists: bool, *, listener: ProgressListener, max_tokens: int | None = None
) -> corpus.Corpus:
    """Open the prepared corpus the recipe names, or prepare one in the run folder, of at most `max_tokens` tokens."""
    if exists and (folder / "corpus" / "corpus.json").is_file():
        return corpus.Corpus.open(folder / "corpus")
    sources = recipe.data.sources
    if exists and not any((Path(source) / "corpus.json").is_file() for source in sources):
        exists = False  # it was restored from a mirror, which has no corpus
    tokenizers = {} if exists else named_tokenizers(recipe)  # a run that goes on needs nothing it began from
    if recipe.special_tokens and not tokenizers and not exists:
        raise ConfigError("special_tokens are added to a tokenizer that was named; --tokenizer names one")
    for source in sources:
        if (Path(source) / "corpus.json").is_file():
            if len(sources) > 1:
                raise ConfigError(f"data.sources: the prepared corpus {source} stands alone; give it no company")
            prepared = corpus.Corpus.open(Path(source))
            check_same_format(prepared, recipe)
            check_same_tokenizer(prepared, tokenizers)
            check_vocabulary(len(prepared.tokenizer()), recipe)
            return prepared
    tokenizer = next(iter(tokenizers.values()), None)
    if tokenizer:
        check_vocabulary(len(tokenizer), recipe)
    elif recipe.init_from is not None and not exists:
        raise ConfigError(
            f"{recipe.init_from} has no tokenizer beside it, and another would number the words otherwise; --tokenizer "
            "names the one it was trained with (HuggingFaceTB/cosmo2-tokenizer is that of SmolLM and SmolLM2)"
        )
    out, limits = folder / "corpus", {"vocab_size": recipe.model.vocab_size, "max_tokens": max_tokens}
    if not exists:  # what a try that never came to its first step left, unless it is of the same text
        build.remove_outdated(out, recipe.data, tokenizer, **limits)
    prepared = build.prepare(recipe.data, out, tokenizer, **limits, report=listener.on_prepare)
    check_same_tokenizer(prepared, tokenizers)
    return prepared


def max_streamed_tokens(recipe: Recipe) -> int | None:
    """Return the tokens to prepare of a dataset on the Hub: up to the schedule's horizon, and the validation split.

    None, for all there are, of other texts, and where epochs are counted.
    """
    data, train = recipe.data, recipe.train
    if data.format != "text" or train.epochs is not None or len(data.sources) != 1 or not is_on_hub(data.sources[0]):
        return None
    steps = recipe.optim.schedule.steps or train.steps
    return math.ceil((steps * train.batch_tokens + 1) / (1 - data.held_out))


def named_tokenizers(recipe: Recipe) -> dict[str, Tokenizer]:
    """Return the tokenizers a recipe names, its own and its base model's, with the special tokens it adds, by flag."""
    tokenizers: dict[str, Tokenizer] = {}
    # First the model's: where both name one on the Hub, that brings all its files at once.
    of_base_model = tokenizer_of_model(recipe.init_from) if recipe.init_from is not None else None
    if recipe.tokenizer is not None:
        tokenizers["--tokenizer"] = loading.load_tokenizer(recipe.tokenizer)
    if of_base_model is not None:
        tokenizers["--init-from"] = of_base_model
    added = recipe.special_tokens
    return {
        flag: tokenizer.with_special_tokens(added) if added else tokenizer for flag, tokenizer in tokenizers.items()
    }


def tokenizer_of_model(model: str) -> Tokenizer | None:
    """Return the tokenizer that a MODEL brings."""
    return loading.tokenizer_of(loading.tokenizer_folder(loading.resolve_model_path(model)))


def check_same_tokenizer(text: corpus.Corpus, tokenizers: dict[str, Tokenizer]) -> None:
    """Raise ConfigError where a corpus was made with another tokenizer than a named one."""
    for flag, tokenizer in tokenizers.items():
        if tokenizer.fingerprint != text.metadata["tokenizer"]:
            raise ConfigError(f"the corpus {text.folder} was made with another tokenizer than that of {flag}")


def check_same_format(text: corpus.Corpus, recipe: Recipe) -> None:
    """Raise ConfigError where a corpus has another format than the recipe's."""
    if text.format != recipe.data.format:
        form = text.format
        raise ConfigError(f"the corpus {text.folder} is {form}; --data.format {form} learns from it as such")


def check_vocabulary(ids: int, recipe: Recipe) -> None:
    """Raise ConfigError where the tokenizer has more ids than the model."""
    if ids > recipe.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {ids:,} ids and model.vocab_size is {recipe.model.vocab_size:,}; "
            f"--model.vocab-size {ids} makes them fit"
        )


def build_row_source(
    text: PreparedData, recipe: Recipe, ref_logprobs: reference_logprobs.LogProbs | None = None
) -> batches.RowSource:
    """Return what batches are made of. Raises InvalidFileError where the dataset has less than a row."""
    if isinstance(text, Mixture):
        texts = {name: source_corpus.tokens(corpus.TRAIN) for name, source_corpus in text.sources.items()}
        return MixtureWindows(texts, order_of(recipe), recipe.train.sequence_length, seed=recipe.seed)
    match recipe.data.format:
        case "text":
            return batches.TokenWindows(text.tokens(corpus.TRAIN), recipe.train.sequence_length, recipe.seed)
        case "chat":
            return packing.PackedRows(text, corpus.TRAIN, recipe.train.sequence_length, seed=recipe.seed)
        case "pairs":
            return reference_logprobs.rows_of(text, corpus.TRAIN, recipe, ref_logprobs=ref_logprobs)
        case never:
            assert_never(never)


def tasks_of(recipe: Recipe) -> list[Task]:
    """Load the tasks to score while training. Raises what `load_task` raises."""
    settings = recipe.train
    names_or_files = settings.evaluate_tasks if settings.evaluate_tasks and settings.evaluate_every else ()
    loaded = [tasks.load_task(word, settings.evaluate_task_items) for word in names_or_files]
    names = [task.name for task in loaded]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two of train.evaluate_tasks are called {repeated[0]}; name each once, or rename a file")
    return loaded


def log_row_stats(text: PreparedData, source: batches.RowSource, recipe: Recipe) -> None:
    """Log how often the sources of a mixture are read, and which conversations or pairs are too long to be learned."""
    if isinstance(text, Mixture) and isinstance(source, MixtureWindows):
        log_mixture(text, source, recipe)
    if isinstance(source, preference_pairs.PairRows):
        a_step = source.pairs / source.count * recipe.train.sequences_per_step
        log.info("%s pairs, %.1f a step; %.1f %% of the rows filled up", source.pairs, a_step, 100 * source.padding)
        if source.num_truncated:
            log.warning(
                "of %s pairs %s are longer than dpo.max_length (%s) tokens: of those the end of the prompt is kept, %s "
                "tokens, and of the answers what there is room for",
                f"{source.pairs:,}", f"{source.num_truncated:,}", *recipe.dpo.lengths(recipe.train.sequence_length),
            )  # fmt: skip
    if isinstance(source, packing.PackedRows) and source.num_truncated + source.num_dropped:
        log.warning(
            "of %s conversations %s are longer than a row of train.sequence_length (%s) tokens and cut after a whole "
            "turn, or at the row's end where the first is too long; %s more, whose first answer begins beyond it, "
            "are left out",
            f"{len(source.lengths):,}", f"{source.num_truncated:,}", f"{recipe.train.sequence_length:,}",
            f"{source.num_dropped:,}",
        )  # fmt: skip


def count_rows(recipe: Recipe, folder: Path, listener: ProgressListener) -> int:
    """Return the sequences of one epoch; the data is prepared in the folder of a run that does not exist yet."""
    with RunFolder.open(folder):
        return build_row_source(open_corpus(recipe, folder, False, listener=listener), recipe).count


def prompts_of(recipe: Recipe) -> list[Prompt]:
    """Return the recipe's prompts for samples: texts to continue, or messages of a user."""
    if recipe.data.format == "text":
        return list(recipe.train.sample_prompts)
    return [[{"role": "user", "content": prompt}] for prompt in recipe.train.sample_prompts]


def check_prompts(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raise ConfigError for prompts that fill the model's context, before the first step."""
    limit = recipe.model.max_position_embeddings
    for prompt in prompts_of(recipe) if recipe.train.sample_every else ():
        if len(prompt_ids(tokenizer, prompt)) >= limit:
            raise ConfigError(f"a prompt of train.sample_prompts fills the model's context of {limit} tokens")


def check_items(eval_tasks: Sequence[Task], recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Warn of task items beyond the model's context, before the first step. Raises InvalidFileError for no others."""
    limit = recipe.model.max_position_embeddings
    for task in eval_tasks:
        rows, _ = encode_items(tokenizer, task.items, limit)
        if skipped := len(task.items) - len({row.item for row in rows}):
            total = f"{skipped:,} of {len(task.items):,} items"
            log.warning("%s: %s are longer than the model's context of %d tokens, and skipped", task.name, total, limit)


def check_held_out(text: PreparedData, recipe: Recipe) -> None:
    """Raise InvalidFileError where all conversations of the validation split are too long, before the first step."""
    measured = recipe.train.evaluate_every and text.size(corpus.HELD_OUT)["tokens"]
    if measured and isinstance(text, corpus.Corpus) and text.format == "chat":
        packing.PackedRows(text, corpus.HELD_OUT, recipe.train.sequence_length, seed=0)
