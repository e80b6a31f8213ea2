"""Export a model to a folder that Transformers loads, or its LoRA adapter to a folder in peft's format.

Each is checked before the folder appears: the model by loading it in Transformers, the adapter by merging it into its
base again.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolforge import atomic
from smolforge.checkpoint import families, huggingface, loading, nanotron, peft_adapter
from smolforge.checkpoint.gguf import llama
from smolforge.config import Generation
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.models.decoder import LanguageModel
from smolforge.tokenizer import FILES
from smolforge.verification import checks, sample_prompt_ids, sample_rows
from smolforge.verification.transformers_reference import Oracle, compare_models, require_transformers, tolerance

CHECKED_TOKENS = 512
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
INHERITED_KEYS = (*SPECIAL, *Generation.model_fields, "do_sample")
"""What is said again of a source's generation_config.json."""


@dataclass(frozen=True)
class TransformersExport:
    """What was written, and how it compares."""

    files: dict[str, int]
    """Name to bytes."""
    dtype: str
    max_abs_logit_diff: float
    """Transformers on the new folder against this code on it, in fp32."""
    rounding_logit_diff: float
    """The same model before and after the change of dtype; 0 where nothing was rounded."""
    greedy_match: bool


def to_transformers(
    model: str | Path,
    out: Path,
    dtype: str | None = None,
    *,
    max_shard_bytes: int | None = None,
    describe: Callable[[Path], None] = lambda _: None,
) -> TransformersExport:
    """Write `out` in a dtype (by default the files' own), in shards where they would be larger than so many bytes.

    `describe` may add to the new folder what tells of the model, such as its card.
    The folder appears only if AutoModelForCausalLM loads it with equal logits and equal greedy text. Raises
    ConfigError where `out` has something in it, InvalidFileError where the check does not hold, MissingResourceError
    where Transformers is not installed or the disk is full.
    """
    out = new_folder(out)
    require_transformers()
    source = loading.resolve_model_path(model)
    loaded = loading.load(source)
    if loaded.quantization is not None:
        raise ConfigError(f"{model} is of integers; export the model it was made from")
    if loaded.config.custom_classes:
        names = ", ".join(loaded.config.custom_classes.values())
        raise ConfigError(f"{model} has classes of your own ({names}), which Transformers does not have")
    target = loading.torch_dtype(dtype) if dtype else stored_dtype(loading.base_folder(source))
    checked: list[Any] = []

    def fill(folder: Path) -> None:
        huggingface.save(
            loaded,
            folder,
            loaded.tokenizer,
            dtype=target,
            max_shard_bytes=max_shard_bytes,
            **inherited_settings(source),
        )
        checked.append(_check_export(loaded, folder, target))
        describe(folder)

    atomic.write_dir_atomic(out, fill)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return TransformersExport(files, str(target).removeprefix("torch."), *checked[0])


def new_folder(out: Path) -> Path:
    """Return the absolute path of a folder to write. Raises ConfigError where it has something in it."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name a new folder, or delete it first")
    return out


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a folder's embedding."""
    if llama.is_gguf_file(folder):
        return llama.stored_dtype(folder)
    if nanotron.is_checkpoint(folder):
        return nanotron.stored_dtype(folder)
    with huggingface.SafetensorsReader(folder) as tensors:
        return tensors[huggingface.EMBEDDING].dtype


def inherited_settings(source: Path) -> dict[str, dict[str, Any]]:
    """What the source says about special tokens and generation, to be said again; nothing where its tokenizer says it
    all: that of a .gguf, or one that an adapter brings.
    """
    plain = loading.base_folder(source)
    if llama.is_gguf_file(plain) or loading.tokenizer_folder(source) != plain:
        return {}
    source = plain
    config = families.read_json(source / (nanotron.CONFIG if nanotron.is_checkpoint(source) else huggingface.CONFIG))
    path = source / huggingface.GENERATION
    generation = families.read_json(path) if path.is_file() else {}
    return {
        "special": {name: config[name] for name in SPECIAL if name in config},
        "generation": {name: value for name, value in generation.items() if name in INHERITED_KEYS},
    }


def _check_export(before: LanguageModel, folder: Path, dtype: torch.dtype) -> tuple[float, float, bool]:
    """Compare the weights before and after, and Transformers on the new folder with this code on it."""
    after = loading.load(folder)
    written = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InvalidFileError(f"{name} holds NaN or infinity; this model is nothing to hand on")
        expected = weight.to(dtype)
        if not bool(expected.isfinite().all()):
            raise InvalidFileError(f"{name} has values that {dtype} cannot hold; --dtype bfloat16 or float32 can")
        assert torch.equal(expected.float(), written[name]), f"{name} was not written as it is"
    if after.tokenizer is not None and after.tokenizer.template is not None:
        with suppress(ConfigError):  # a template may refuse a conversation, but must be one
            after.tokenizer.chat([{"role": "user", "content": "Hello"}])
    oracle = Oracle(folder, torch.float32)
    row = sample_rows(after, min(CHECKED_TOKENS, after.config.max_position_embeddings))[-1]
    logits_check = compare_models(after, oracle, row)
    with torch.inference_mode():
        ids = torch.tensor([row])
        rounding = (
            (after.logits(after.hidden_states(ids)) - before.logits(before.hidden_states(ids))).abs().max().item()
        )
    text_check = checks.check_greedy(after, oracle, sample_prompt_ids(after))
    if not logits_check.holds or not text_check.holds:
        raise InvalidFileError(
            f"what was written does not say the same in Transformers: logits differ by {logits_check.max_abs_diff:.1e} "
            f"(allowed {logits_check.allowed:.1e}), {text_check.message}; nothing was kept"
        )
    return logits_check.max_abs_diff, rounding, text_check.holds


def to_adapter(model: str | Path, out: Path) -> tuple[dict[str, int], float]:
    """Write `out`; returns its files' sizes, and by how much logits differ from those of the model as it was saved.

    The folder appears only if its base, with the adapter added, says the same. Raises ConfigError for a model that has
    no adapter or an `out` that has something in it, InvalidFileError where the check does not hold.
    """
    out = new_folder(out)
    source = loading.resolve_model_path(model)
    if not peft_adapter.is_adapter(source / peft_adapter.FOLDER):
        raise ConfigError(f"{model} has no adapter: it was not trained with --lora.rank")
    worst: list[float] = []

    def fill(folder: Path) -> None:
        for path in [*(source / peft_adapter.FOLDER).iterdir(), *tokenizer_files(source)]:
            shutil.copyfile(path, folder / path.name)
        worst.append(adapter_difference(source, folder))

    atomic.write_dir_atomic(out, fill)
    return {path.name: path.stat().st_size for path in sorted(out.iterdir())}, worst[0]


def tokenizer_files(source: Path) -> list[Path]:
    """Those of a folder, its chat template among them: tuning may have brought one that the base has not."""
    return [path for name in FILES if (path := source / name).is_file()]


@torch.inference_mode()
def adapter_difference(source: Path, folder: Path) -> float:
    """Largest difference of logits. Raises InvalidFileError where it is more than rounding."""
    saved, merged = loading.load(source), loading.load(folder)
    row = sample_rows(saved, min(CHECKED_TOKENS, saved.config.max_position_embeddings))[-1]
    ids = torch.tensor([row])
    expected = saved(ids)
    worst = (merged(ids) - expected).abs().max().item()
    if worst > tolerance(expected.abs().max().item()):
        raise InvalidFileError(
            f"{source}: its adapter on {peft_adapter.base_model_of(folder)} differs from it by {worst:.1e}"
        )
    return worst
