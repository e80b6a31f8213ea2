"""A model -> the same of small integers, and a table of what that costs and what it gains.

source -> quantise -> folder, read back and held to the bit -> both on held-out text, and both by the clock in turn
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from smolforge import atomic
from smolforge.checkpoint import gguf, huggingface, loading, training_state
from smolforge.checkpoint.gguf import llama
from smolforge.config import Generation
from smolforge.config.load import read_recipe
from smolforge.data.batches import IGNORED
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.data.prepare.documents import read_text
from smolforge.errors import InvalidFile, SettingError
from smolforge.evaluation.perplexity import TOKENS, windows
from smolforge.exporters.transformers import carried, stored_dtype
from smolforge.generation.samplers import sampling
from smolforge.generation.stream import own, tokens
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import Scheme
from smolforge.training.run_folder import RECIPE

GROUP_SIZES = (32, 64)
WINDOW, MOST_TOKENS = 1024, 16_384
"""Of the text: tokens of a window at most (a run's are as long as it trained on), and of all that is measured."""
ROUNDS, PROMPT, ANSWER = 5, 512, 32
"""How often prompts of how many tokens are read, and answers of how many given, after a round that does not count."""
GREEDY = sampling(Generation(temperature=0))
WAY_OUT = "int8 asks for widths that 4 divides, int4 for 32; --to gguf --type q8_0 or q4_0 takes any, and experts"
SHORTEST = 4
"""Context in which there is an answer to be timed: the prompt, two tokens that do not count, and one that does."""


@dataclass(frozen=True)
class Text:
    """What loss is measured on."""

    name: str
    ids: np.ndarray
    text_bytes: float
    window: int


@dataclass(frozen=True)
class Measured:
    """One side of the table."""

    bytes_on_disk: int
    """Of the weights' files; of an adapter, those of its base."""
    tensor_bytes: int
    """What the tensors in them take by their shapes and types; the rest is the files' heads."""
    bytes_in_memory: int
    """Of the model as it is loaded, everything that is no integer in fp32."""
    loss: float
    bits_per_byte: float
    top1_agreement: float
    """Share of tokens whose likeliest successor is that of the model before."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares."""

    files: dict[str, int]
    """Name to bytes."""
    text: str
    tokens: int
    max_abs_logit_diff: float
    """Before and after, on all of the text."""
    before: Measured
    after: Measured


def to_integers(model: str | Path, out: Path, scheme: Scheme, text: Path | None = None) -> Exported:
    """Write `out`, a folder that every verb loads, and measure it on a text, by default what MODEL, a run, held out.

    The folder appears only once what is read back is what was written, to the bit, and is measured. Raises
    SettingError for a model whose widths the scheme does not divide, that is of integers already, or an `out` that has
    something in it, and InvalidFile for a model whose weights are no numbers.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} is there already; name a new folder, or delete it first")
    source = loading.find(model)
    before = loading.load(source)
    hold_to_what_is_measured(before, model)
    measured_on, made = text_for(before, source, text), copy.deepcopy(before)
    try:
        quantized.quantize(made, scheme)
    except SettingError as error:
        raise SettingError(f"{error}; {WAY_OUT}") from None
    found: list[Exported] = []

    def fill(folder: Path) -> None:
        huggingface.save(made, folder, made.tokenizer, torch.bfloat16, None, **carried(source))
        after = loading.load(folder)
        unlike = quantized.unlike(made, after)
        assert not unlike, f"{unlike[0]} was not written as it is"
        found.append(compared(before, after, source, folder, measured_on))

    atomic.write_whole(out, fill)
    return found[0]


def hold_to_what_is_measured(model: LanguageModel, name: str | Path) -> None:
    """Refuse a model that could not be rounded or compared."""
    if model.scheme is not None:
        raise SettingError(f"{name} is of integers already; quantise the model it was made from")
    context = model.config.max_position_embeddings
    if context < SHORTEST:
        raise SettingError(f"{name} has a context of {context} tokens, and its speed is measured in {SHORTEST} or more")
    for parameter, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InvalidFile(f"{parameter} of {name} holds NaN or infinity; this model is nothing to hand on")


def text_for(model: LanguageModel, source: Path, text: Path | None) -> Text:
    """A file, or what a run held out, or the documentation of Python's language; in windows as the run trained on."""
    corpus, length = of_run(source)
    window = min(length, model.config.max_position_embeddings)
    if text is None and corpus is not None:
        size = corpus.size(HELD_OUT)
        ids = np.array(corpus.tokens(HELD_OUT)[:MOST_TOKENS])
        return Text("what the run held out", ids, size["bytes"] * len(ids) / size["tokens"], window)
    content = "\n\n".join(topics.values()) if text is None else read_text(text)
    name = "the documentation of Python's language" if text is None else text.name
    ids = np.array(own(model).encode(content[: MOST_TOKENS * 16])[:MOST_TOKENS])
    if not len(ids):
        raise SettingError(f"{name} is empty; --text names a file to measure on")
    return Text(name, ids, float(len(own(model).decode(ids.tolist()).encode())), window)


def of_run(source: Path) -> tuple[Corpus | None, int]:
    """What a checkpoint learned from, where that is there and held out plain text; the length of its run's windows."""
    source = source.resolve()
    run = source.parents[1] if source.parent.name == "checkpoints" else source
    if not (run / RECIPE).is_file():
        return None, WINDOW
    recipe = read_recipe(run / RECIPE)
    for folder in (run / "corpus", *map(Path, recipe.data.sources)):
        if (folder / "corpus.json").is_file():
            corpus = Corpus.open(folder)
            its_own = corpus.fingerprint == training_state.read_facts(source)["corpus"]
            usable = its_own and corpus.format == "text" and corpus.size(HELD_OUT)["tokens"]
            return corpus if usable else None, recipe.train.sequence_length
    return None, recipe.train.sequence_length


def compared(before: LanguageModel, after: LanguageModel, source: Path, out: Path, text: Text) -> Exported:
    """Both sides of the table."""
    losses, agreement, worst = predicted(before, after, text)
    speed = speeds({"before": before, "after": after})
    sides: tuple[dict[str, Any], ...] = (
        sizes(before, loading.plain(source)) | {"top1_agreement": 1.0} | speed["before"],
        sizes(after, out) | {"top1_agreement": agreement} | speed["after"],
    )
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    per_byte = len(text.ids) / math.log(2) / text.text_bytes
    said = (
        Measured(loss=loss, bits_per_byte=loss * per_byte, **each) for loss, each in zip(losses, sides, strict=True)
    )
    return Exported(files, text.name, len(text.ids), worst, *said)


@torch.inference_mode()
def predicted(before: LanguageModel, after: LanguageModel, text: Text) -> tuple[list[float], float, float]:
    """Loss of each; share of tokens after which both find the same likeliest; largest difference of logits."""
    losses, same, worst = [0.0, 0.0], 0, 0.0
    at_once = max(1, TOKENS // text.window)
    rows, targets = windows(text.ids, own(before).eos_id, text.window, text.window)
    for row, target in zip(rows.split(at_once), targets.split(at_once), strict=True):
        wanted = target[target != IGNORED]
        logits = [model.logits(model.hidden(row)[target != IGNORED]) for model in (before, after)]
        losses = [
            loss + F.cross_entropy(each, wanted, reduction="sum").item()
            for loss, each in zip(losses, logits, strict=True)
        ]
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        worst = max(worst, (logits[0] - logits[1]).abs().max().item())
    if not all(map(math.isfinite, losses)):
        raise InvalidFile("the model gives logits that are no numbers; its weights are damaged")
    count = len(text.ids)
    return [loss / count for loss in losses], same / count, worst


def sizes(model: LanguageModel, folder: Path) -> dict[str, int]:
    """Bytes of a model in the files that it is read from, and in memory."""
    if llama.is_file(folder):
        in_files = sum(each.bytes for each in gguf.File(folder).tensors.values())
    else:
        stored = torch.bfloat16 if model.scheme else stored_dtype(folder)
        in_files = loading.weight_bytes(model.config, model.scheme, stored)
    return {
        "bytes_on_disk": sum(path.stat().st_size for path in loading.weight_files(folder)),
        "tensor_bytes": in_files,
        "bytes_in_memory": sum(weight.nbytes for weight in model.parameters()),
    }


def speeds(models: Mapping[str, LanguageModel]) -> dict[str, dict[str, float]]:
    """Tokens/s of each model, the median of rounds in turn, so that a machine that slows down slows all."""
    clocks: dict[str, Callable[[LanguageModel], float]] = {
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
    }
    found: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in models}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            for clock, rate in clocks.items():
                speed = rate(model)
                found[name][clock] += [speed] if number else []
    return {
        name: {clock: statistics.median(rates) for clock, rates in measured.items()} for name, measured in found.items()
    }


@torch.inference_mode()
def prefill(model: LanguageModel) -> float:
    """Tokens/s of a prompt, until what is likeliest next is known."""
    ids = torch.arange(min(PROMPT, model.config.max_position_embeddings // 2))[None] % model.config.vocab_size
    begun = time.perf_counter()
    model.logits(model.hidden(ids)[:, -1]).argmax(-1).item()
    return ids.shape[1] / (time.perf_counter() - begun)


def decode(model: LanguageModel) -> float:
    """Tokens/s behind the second of an answer; with the first the matrices are laid out."""
    source = tokens(model, [[0]], GREEDY, ANSWER + 2)
    next(source), next(source)
    begun = time.perf_counter()
    count = sum(1 for _ in source)
    return count / (time.perf_counter() - begun)
