"""Export a model with int8 or int4 weights, and measure what that costs and what it gains.

source -> quantize -> folder, read back bit-for-bit -> both on validation text, and both timed in turn
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
from smolforge.checkpoint import gguf, huggingface, loading
from smolforge.checkpoint.gguf import llama
from smolforge.config import Generation
from smolforge.config.load import read_recipe
from smolforge.data.batches import IGNORE_INDEX
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.data.prepare.documents import read_text
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.perplexity import TOKENS, windows
from smolforge.exporters.provenance import training_data
from smolforge.exporters.transformers import inherited_settings, new_folder, stored_dtype
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens, require_tokenizer
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import QuantizationScheme
from smolforge.training.run_folder import RECIPE

GROUP_SIZES = (32, 64)
MAX_WINDOW, MAX_TOKENS = 1024, 16_384
"""Of the text: tokens of a window at most (a run's are as long as it trained on), and of all that is measured."""
ROUNDS, PREFILL_TOKENS, DECODE_TOKENS = 5, 512, 32
"""How often prompts of how many tokens are read, and answers of how many given, after a round that does not count."""
GREEDY_SAMPLER = make_sampler(Generation(temperature=0))
SCHEME_HINT = "int8 asks for widths that 4 divides, int4 for 32; --to gguf --type q8_0 or q4_0 takes any, and experts"
MIN_CONTEXT = 4
"""Context in which there is an answer to be timed: the prompt, two tokens that do not count, and one that does."""


@dataclass(frozen=True)
class EvaluationText:
    """What loss is measured on."""

    name: str
    ids: np.ndarray
    text_bytes: float
    window: int


@dataclass(frozen=True)
class ModelMeasurements:
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
class QuantizedExport:
    """What was written, and how it compares."""

    files: dict[str, int]
    """Name to bytes."""
    text: str
    tokens: int
    max_abs_logit_diff: float
    """Before and after, on all of the text."""
    before: ModelMeasurements
    after: ModelMeasurements


def to_quantized(
    model: str | Path, out: Path, scheme: QuantizationScheme, *, text: Path | None = None
) -> QuantizedExport:
    """Write `out`, a folder that every verb loads, and measure it on a text, by default what MODEL, a run, held out.

    The folder appears only once what is read back is what was written, to the bit, and is measured. Raises
    ConfigError for a model whose widths the scheme does not divide, that is of integers already, or an `out` that has
    something in it, and InvalidFileError for a model whose weights are no numbers.
    """
    out = new_folder(out)
    source = loading.resolve_model_path(model)
    before = loading.load(source)
    check_quantizable(before, model)
    measured_on, quantized_model = evaluation_text(before, source, text), copy.deepcopy(before)
    try:
        quantized.quantize(quantized_model, scheme)
    except ConfigError as error:
        raise ConfigError(f"{error}; {SCHEME_HINT}") from None
    results: list[QuantizedExport] = []

    def fill(folder: Path) -> None:
        huggingface.save(
            quantized_model,
            folder,
            quantized_model.tokenizer,
            dtype=torch.bfloat16,
            max_shard_bytes=None,
            **inherited_settings(source),
        )
        after = loading.load(folder)
        changed = quantized.changed_parameters(quantized_model, after)
        assert not changed, f"{changed[0]} was not written as it is"
        results.append(compare_quantized(before, after, source, out=folder, text=measured_on))

    atomic.write_dir_atomic(out, fill)
    return results[0]


def check_quantizable(model: LanguageModel, name: str | Path) -> None:
    """Refuse a model that could not be rounded or compared."""
    if model.quantization is not None:
        raise ConfigError(f"{name} is of integers already; quantise the model it was made from")
    context = model.config.max_position_embeddings
    if context < MIN_CONTEXT:
        raise ConfigError(
            f"{name} has a context of {context} tokens, and its speed is measured in {MIN_CONTEXT} or more"
        )
    for parameter, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InvalidFileError(f"{parameter} of {name} holds NaN or infinity; this model is nothing to hand on")


def evaluation_text(model: LanguageModel, source: Path, text: Path | None) -> EvaluationText:
    """A file, or what a run held out, or the documentation of Python's language; in windows as the run trained on."""
    corpus, length = run_corpus(source)
    window = min(length, model.config.max_position_embeddings)
    if text is None and corpus is not None:
        size = corpus.size(HELD_OUT)
        ids = np.array(corpus.tokens(HELD_OUT)[:MAX_TOKENS])
        return EvaluationText("what the run held out", ids, size["bytes"] * len(ids) / size["tokens"], window)
    content = "\n\n".join(topics.values()) if text is None else read_text(text)
    name = "the documentation of Python's language" if text is None else text.name
    ids = np.array(require_tokenizer(model).encode(content[: MAX_TOKENS * 16])[:MAX_TOKENS])
    if not len(ids):
        raise ConfigError(f"{name} is empty; --text names a file to measure on")
    return EvaluationText(name, ids, float(len(require_tokenizer(model).decode(ids.tolist()).encode())), window)


def run_corpus(source: Path) -> tuple[Corpus | None, int]:
    """What a checkpoint learned from, where that is there and held out plain text; the length of its run's windows."""
    source = source.resolve()
    run = source.parents[1] if source.parent.name == "checkpoints" else source
    if not (run / RECIPE).is_file():
        return None, MAX_WINDOW
    recipe = read_recipe(run / RECIPE)
    corpus = training_data(run, recipe, source)
    if isinstance(corpus, Corpus) and corpus.format == "text" and corpus.size(HELD_OUT)["tokens"]:
        return corpus, recipe.train.sequence_length
    return None, recipe.train.sequence_length


def compare_quantized(
    before: LanguageModel, after: LanguageModel, source: Path, *, out: Path, text: EvaluationText
) -> QuantizedExport:
    """Both sides of the table."""
    losses, agreement, worst = compare_predictions(before, after, text)
    speed = measure_speeds({"before": before, "after": after})
    costs: tuple[dict[str, Any], ...] = (
        model_bytes(before, loading.base_folder(source)) | {"top1_agreement": 1.0} | speed["before"],
        model_bytes(after, out) | {"top1_agreement": agreement} | speed["after"],
    )
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    per_byte = len(text.ids) / math.log(2) / text.text_bytes
    measurements = (
        ModelMeasurements(loss=loss, bits_per_byte=loss * per_byte, **side)
        for loss, side in zip(losses, costs, strict=True)
    )
    return QuantizedExport(files, text.name, len(text.ids), worst, *measurements)


@torch.inference_mode()
def compare_predictions(
    before: LanguageModel, after: LanguageModel, text: EvaluationText
) -> tuple[list[float], float, float]:
    """Loss of each; share of tokens after which both find the same likeliest; largest difference of logits."""
    losses, same, worst = [0.0, 0.0], 0, 0.0
    rows_per_batch = max(1, TOKENS // text.window)
    rows, targets = windows(text.ids, require_tokenizer(before).eos_id, text.window, stride=text.window)
    for row, target in zip(rows.split(rows_per_batch), targets.split(rows_per_batch), strict=True):
        labels = target[target != IGNORE_INDEX]
        logits = [model.logits(model.hidden_states(row)[target != IGNORE_INDEX]) for model in (before, after)]
        losses = [
            loss + F.cross_entropy(model_logits, labels, reduction="sum").item()
            for loss, model_logits in zip(losses, logits, strict=True)
        ]
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        worst = max(worst, (logits[0] - logits[1]).abs().max().item())
    if not all(map(math.isfinite, losses)):
        raise InvalidFileError("the model gives logits that are no numbers; its weights are damaged")
    count = len(text.ids)
    return [loss / count for loss in losses], same / count, worst


def model_bytes(model: LanguageModel, folder: Path) -> dict[str, int]:
    """Bytes of a model in the files that it is read from, and in memory."""
    if llama.is_gguf_file(folder):
        tensor_bytes = sum(tensor.nbytes for tensor in gguf.GGUFReader(folder).tensors.values())
    else:
        dtype = torch.bfloat16 if model.quantization else stored_dtype(folder)
        tensor_bytes = loading.weight_bytes(model.config, model.quantization, dtype)
    return {
        "bytes_on_disk": sum(path.stat().st_size for path in loading.weight_files(folder)),
        "tensor_bytes": tensor_bytes,
        "bytes_in_memory": sum(weight.nbytes for weight in model.parameters()),
    }


def measure_speeds(models: Mapping[str, LanguageModel]) -> dict[str, dict[str, float]]:
    """Tokens/s of each model, the median of rounds in turn, so that a machine that slows down slows all."""
    benchmarks: dict[str, Callable[[LanguageModel], float]] = {
        "prefill_tokens_per_second": prefill_speed,
        "decode_tokens_per_second": decode_speed,
    }
    speeds: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in benchmarks} for name in models}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            for metric, benchmark in benchmarks.items():
                speed = benchmark(model)
                speeds[name][metric] += [speed] if number else []
    return {
        name: {metric: statistics.median(rates) for metric, rates in measured.items()}
        for name, measured in speeds.items()
    }


@torch.inference_mode()
def prefill_speed(model: LanguageModel) -> float:
    """Tokens/s of a prompt, until what is likeliest next is known."""
    ids = torch.arange(min(PREFILL_TOKENS, model.config.max_position_embeddings // 2))[None] % model.config.vocab_size
    start = time.perf_counter()
    model.logits(model.hidden_states(ids)[:, -1]).argmax(-1).item()
    return ids.shape[1] / (time.perf_counter() - start)


def decode_speed(model: LanguageModel) -> float:
    """Tokens/s behind the second of an answer; with the first the matrices are laid out."""
    source = generate_tokens(model, [[0]], GREEDY_SAMPLER, max_new_tokens=DECODE_TOKENS + 2)
    next(source), next(source)
    start = time.perf_counter()
    count = sum(1 for _ in source)
    return count / (time.perf_counter() - start)
