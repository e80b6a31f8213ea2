"""Export a model with int8 or int4 weights, and measure what that costs and what it gains.

source -> quantize -> folder, read back bit-for-bit -> both on a text, and both timed in turn
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolforge import atomic
from smolforge.checkpoint import gguf, huggingface, loading
from smolforge.checkpoint.gguf import llama
from smolforge.config import Generation
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.divergence import Comparison, Predictions, compare_predictions
from smolforge.exporters import gptq
from smolforge.exporters.texts import CalibrationText, calibration_text, check_distinct, measured_text
from smolforge.exporters.transformers import inherited_settings, new_folder, stored_dtype
from smolforge.generation.samplers import make_sampler
from smolforge.generation.stream import generate_tokens
from smolforge.models import quantized
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import QuantizationScheme

GROUP_SIZES = (32, 64)
ROUNDS, PREFILL_TOKENS, DECODE_TOKENS = 5, 512, 32
"""How often prompts of how many tokens are read, and answers of how many given, after a round that does not count."""
GREEDY_SAMPLER = make_sampler(Generation(temperature=0))
SCHEME_HINT = "int8 asks for widths that 4 divides, int4 for 32; --to gguf --type q8_0 or q4_0 takes any, and experts"
MIN_CONTEXT = 4
"""Context in which there is an answer to be timed: the prompt, two tokens that do not count, and one that does."""


Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Takes what is done and its total, and gives a function that is called with each part."""


def no_progress(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class ModelMeasurements(Predictions):
    """One side of the table."""

    bytes_on_disk: int
    """Of the weights' files; of an adapter, those of its base."""
    tensor_bytes: int
    """What the tensors in them take by their shapes and types; the rest is the files' heads."""
    bytes_in_memory: int
    """Of the model as it is loaded, everything that is no integer in fp32."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class QuantizedExport:
    """What was written, and how it compares."""

    files: dict[str, int]
    """Name to bytes."""
    text: str
    tokens: int
    calibration: str | None
    """The text that chose the integers; None where they are the nearest."""
    calibration_tokens: int
    max_abs_logit_diff: float
    """Before and after, on all of the text."""
    before: ModelMeasurements
    after: ModelMeasurements


def to_quantized(
    model: str | Path,
    out: Path,
    scheme: QuantizationScheme,
    *,
    text: Path | None = None,
    calibrate: str | None = None,
    progress: Progress = no_progress,
) -> QuantizedExport:
    """Write `out`, a folder that every verb loads, and measure it on a text, by default what MODEL, a run, held out.

    4 bits are chosen by another text: `calibrate`, by default what the run trained on; "none" is rounding. The folder
    appears only once what is read back is what was written, to the bit, and is measured. Raises
    ConfigError for a model whose widths the scheme does not divide, that is of integers already, or an `out` that has
    something in it, and InvalidFileError for a model whose weights are no numbers.
    """
    out = new_folder(out)
    source = loading.resolve_model_path(model)
    before = loading.load(source)
    check_quantizable(before, model)
    measured_on = measured_text(before, source, text)
    calibration = calibration_text(before, source, calibrate) if scheme.bits == 4 else None
    if calibration is not None:
        check_distinct(measured_on, calibration)
    quantized_model = quantize_model(before, scheme, calibration, progress=progress)
    results: list[QuantizedExport] = []

    def fill(folder: Path) -> None:
        """Write and read back, compare and time."""
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
        with progress("measuring", len(measured_on.ids)) as advance:
            comparison = compare_predictions(before, after, measured_on, on_progress=advance)
        sides = measure_costs(before, after, source, out=folder, comparison=comparison, progress=progress)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        results.append(
            QuantizedExport(
                files,
                text=comparison.text,
                tokens=comparison.tokens,
                calibration=calibration.name if calibration else None,
                calibration_tokens=calibration.rows.numel() if calibration else 0,
                max_abs_logit_diff=comparison.max_abs_logit_diff,
                before=sides[0],
                after=sides[1],
            )
        )

    atomic.write_dir_atomic(out, fill)
    return results[0]


def quantize_model(
    original: LanguageModel, scheme: QuantizationScheme, text: CalibrationText | None, *, progress: Progress
) -> LanguageModel:
    """Return a copy with integers: the nearest, or what a text chooses. Raises ConfigError for what does not fit."""
    model, scheme = copy.deepcopy(original), dataclasses.replace(scheme, calibrated=text is not None)
    try:
        quantized.quantize(model, scheme)
    except ConfigError as error:
        raise ConfigError(f"{error}; {SCHEME_HINT}") from None
    if text is not None:
        with progress("calibrating", len(model.model.layers)) as advance:
            gptq.calibrate(model, original, text.rows, on_progress=advance)
    return model


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


def measure_costs(
    before: LanguageModel, after: LanguageModel, source: Path, *, out: Path, comparison: Comparison, progress: Progress
) -> list[ModelMeasurements]:
    """Return both sides of the table."""
    with progress("timing", ROUNDS + 1) as advance:
        speeds = measure_speeds({"before": before, "after": after}, on_progress=advance)
    return [
        ModelMeasurements(**vars(predictions), **model_bytes(model, folder), **speeds[name])
        for name, model, folder, predictions in (
            ("before", before, loading.base_folder(source), comparison.before),
            ("after", after, out, comparison.after),
        )
    ]


def model_bytes(model: LanguageModel, folder: Path) -> dict[str, Any]:
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


def measure_speeds(
    models: Mapping[str, LanguageModel], *, on_progress: Callable[[int], None] = lambda rounds: None
) -> dict[str, dict[str, Any]]:
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
        on_progress(1)
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
