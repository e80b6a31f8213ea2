"""A model -> one .gguf for llama.cpp and what is built on it, proven by reading it back before it appears.

tensors by llama.cpp's names -> a type for each -> file -> read back: every tensor to the bit, the tokenizer's ids
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from smolforge import atomic
from smolforge.checkpoint import gguf, loading
from smolforge.checkpoint.gguf import llama
from smolforge.config import ModelConfig
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.divergence import Comparison, MeasuredText, compare_predictions
from smolforge.exporters.quantize import Progress, no_progress, quantize_model
from smolforge.exporters.texts import NO_TEXT, calibration_text, check_distinct, measured_text
from smolforge.models.decoder import LanguageModel
from smolforge.models.quantized import QuantizationScheme, QuantizedWeight, quantized_layers
from smolforge.models.stats import parameter_counts
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.gguf_tokenizer import to_values
from smolforge.verification import HARD_TEXTS, sample_rows

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
"""What a whole file is called, by llama.cpp's numbers (enum llama_ftype)."""
LLAMA_QUANTIZE_TYPES = re.compile(r"q[2-6]_k(_[sml])?|iq4_(nl|xs)")
"""Those of llama-quantize that are read only."""
QUANTIZATION_VERSION = 2
CHECKED_TOKENS = 512
CALIBRATED_TYPES = ("q4_0", "q4_1")
"""Types whose integers a text can choose: a scale for each 32 and, in q4_1, a zero."""
SPECIAL = {"parse_special": True}


@dataclass(frozen=True)
class GGUFExport:
    """What was written, and what became of the model."""

    files: dict[str, int]
    """Name to bytes."""
    type: str
    tensors: dict[str, int]
    """How many tensors have which of ggml's types."""
    max_abs_logit_diff: float
    """The model as read back against the model as it was, both in fp32 here; 0 where nothing was rounded."""
    top1_agreement: float
    """In how many places of the same row the likeliest token stayed the same."""
    calibration: str | None
    """The text that chose the integers; None where they are llama-quantize's."""
    comparison: Comparison | None
    """On a text, where one is named."""


def to_gguf(
    model: str | Path,
    out: Path,
    kind: str = "f16",
    *,
    text: Path | None = None,
    calibrate: str = NO_TEXT,
    progress: Progress = no_progress,
) -> GGUFExport:
    """Write `out` in one of ggml's types, and say by how much that changed the model, on a `text` too.

    The file appears only if every tensor reads back as its type holds it, and the tokenizer gives the same ids. Of q4_0
    and q4_1, the text `calibrate` can choose the integers: those of `to_quantized` with groups of 32.

    Raises ConfigError for what llama.cpp does not have, an `out` that exists or a text that is empty, InvalidFileError
    where the check does not hold, MissingResourceError where the disk is full.
    """
    kind = check_file_type(kind)
    if calibrate != NO_TEXT and kind not in CALIBRATED_TYPES:
        raise ConfigError(f"a text can choose the integers of {' and '.join(CALIBRATED_TYPES)}, not of {kind}")
    out = out.resolve()
    if out.suffix != llama.SUFFIX:
        raise ConfigError(f"{out} should end in {llama.SUFFIX}")
    if out.exists():
        raise ConfigError(f"{out} is there already; name a new file, or delete it first")
    loaded = loading.load(model)
    if loaded.quantization is not None:
        raise ConfigError(f"{model} is of integers; export the model it was made from")
    if loaded.tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, which a .gguf holds beside the weights")
    source = loading.resolve_model_path(model)
    calibration = calibration_text(loaded, source, calibrate)
    measured_on = measured_text(loaded, source, text) if text or calibration else None
    integers: dict[str, QuantizedWeight] = {}
    if calibration is not None and measured_on is not None:
        check_distinct(measured_on, calibration)
        scheme = QuantizationScheme(4, 32, zero_point=kind == "q4_1")
        integers = quantized_layers(quantize_model(loaded, scheme, calibration, progress=progress))
    values, tensors = metadata_values(loaded, str(model), kind), llama.gguf_tensors(loaded)
    types = {name: choose_type(name, tensor.shape, kind, config=loaded.config) for name, tensor in tensors.items()}
    num_bytes = sum(types[name].nbytes(tensor.numel()) for name, tensor in tensors.items())
    checked: list[Any] = []

    def fill(path: Path) -> None:
        gguf.write(path, values, tensors, types=types, encoded=encode_integers(integers, loaded.config))
        after = loading.load(path)
        checked.extend(check_readback(loaded, after, types, integers=integers))
        checked.append(compare_on_text(loaded, after, measured_on, progress=progress))

    atomic.write_file_atomic(out, fill, num_bytes)
    type_counts = Counter(tensor_type.name for tensor_type in types.values())
    diff, agreement, comparison = checked
    name = calibration.name if calibration else None
    return GGUFExport({out.name: out.stat().st_size}, kind, dict(type_counts), diff, agreement, name, comparison)


def encode_integers(layers: Mapping[str, QuantizedWeight], config: ModelConfig) -> dict[str, UInt8[Tensor, "o b"]]:
    """Return the blocks of layers of 4-bit integers, a row of them each output, by llama.cpp's names."""
    return {
        llama.gguf_tensor_name(f"{name}.weight", config): llama.permute_rope(
            f"{name}.weight", gguf.encode_4_bits(layer.integers, layer.weight_scale, layer.zero), config
        )
        for name, layer in layers.items()
    }


def compare_on_text(
    before: LanguageModel, after: LanguageModel, text: MeasuredText | None, *, progress: Progress
) -> Comparison | None:
    if text is None:
        return None
    with progress("measuring", len(text.ids)) as advance:
        return compare_predictions(before, after, text, on_progress=advance)


def check_file_type(kind: str) -> str:
    """Return a type's name in lower case. Raises ConfigError for one that is not written here."""
    kind = kind.lower()
    if LLAMA_QUANTIZE_TYPES.fullmatch(kind):
        raise ConfigError(
            f"type {kind.upper()} is written by llama-quantize alone: export --type f16 --out in.gguf, then "
            f"llama-quantize in.gguf out.gguf {kind.upper()}, whose file every command here reads"
        )
    if kind not in FILE_TYPES:
        raise ConfigError(f"type is {kind!r}; it should be one of {', '.join(FILE_TYPES)}")
    return kind


def metadata_values(model: LanguageModel, name: str, kind: str) -> dict[str, gguf.MetadataValue]:
    """Everything a file says beside its tensors, in the order of llama.cpp's converter."""
    shape = llama.gguf_metadata(model.config)
    architecture = next(iter(shape)).partition(".")[0]
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name.partition("@")[0].rstrip("/").rpartition("/")[2],
        "general.size_label": size_label(model.config),
        **shape,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        **to_values(model.tokenizer, model.config.vocab_size),
    }


def size_label(config: ModelConfig) -> str:
    """Return 135M, or 8x47M: parameters at a glance; of a mixture, those of one expert."""
    from gguf import size_label as label_of

    experts = config.num_local_experts if config.model_type == "mixtral" else 1
    total = sum(parameter_counts(config).values())
    stacked = experts * 3 * config.num_hidden_layers * config.hidden_size * config.intermediate_size
    return label_of(total, total - stacked, stacked // experts, experts if experts > 1 else 0)


def choose_type(name: str, shape: tuple[int, ...], kind: str, *, config: ModelConfig) -> gguf.BlockType:
    """The type of a tensor in a file of some kind, as llama-quantize chooses it (llama-quant.cpp).

    Norms and routers stay fp32. Of 4 and 5 bits, the head (the embedding, where it is tied) has 8, and so have keys
    and values beside 8 experts. What does not divide into blocks is f16. Where llama-quantize has q6_K for the head
    (widths that 256 divides) it is q8_0 here, which is nearer.
    """
    if len(shape) == 1 or "_norm." in name or "ffn_gate_inp" in name:
        return gguf.BLOCK_TYPES["f32"]
    head_prefix = "token_embd." if config.tie_word_embeddings else "output."
    has_8_experts = config.has_experts and config.num_local_experts == 8
    if gguf.BLOCK_TYPES[kind].dtype is None and (
        name.startswith(head_prefix) or (has_8_experts and ("attn_k." in name or "attn_v." in name))
    ):
        kind = "q8_0"
    fits = shape[-1] % gguf.BLOCK_TYPES[kind].block_size == 0
    return gguf.BLOCK_TYPES[kind if fits else "f16"]


def check_readback(
    before: LanguageModel,
    after: LanguageModel,
    types: dict[str, gguf.BlockType],
    *,
    integers: Mapping[str, QuantizedWeight],
) -> tuple[float, float]:
    """Hold what was written to what was meant. Raises InvalidFileError where it is not that."""
    written = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        kind, layer = types[llama.gguf_tensor_name(name, before.config)], name.removesuffix(".weight")
        if not bool(weight.isfinite().all()):
            raise InvalidFileError(f"{name} holds NaN or infinity; this model is nothing to hand on")
        expected = kind.round_trip(weight) if layer not in integers else integers[layer].weight
        if not bool(expected.isfinite().all()):
            raise InvalidFileError(f"{name} has values that {kind.name} cannot hold; --type f32 or bf16 can")
        assert torch.equal(expected, written[name]), f"{name} was not written as it is"
    check_gguf_tokenizer(before.tokenizer, after.tokenizer)
    row = sample_rows(before, min(CHECKED_TOKENS, before.config.max_position_embeddings))[-1]
    with torch.inference_mode():
        ids = torch.tensor([row])
        logits_before, logits_after = before(ids), after(ids)
    agreement = (logits_before.argmax(-1) == logits_after.argmax(-1)).float().mean().item()
    return (logits_before - logits_after).abs().max().item(), agreement


def check_gguf_tokenizer(before: Tokenizer, after: Tokenizer | None) -> None:
    """Raises InvalidFileError where what was read back gives other ids than what was there."""
    assert after is not None
    added = [token.content for token in before.backend.get_added_tokens_decoder().values()]
    texts = [*HARD_TEXTS, *(f"a {token} b" for token in added), *(f"a{token}b" for token in added)]
    for text in texts:
        if any(before.encode_prompt(text, **words) != after.encode_prompt(text, **words) for words in ({}, SPECIAL)):
            raise InvalidFileError(f"a .gguf cannot say what this tokenizer does with {text[:40]!r}; nothing was kept")
