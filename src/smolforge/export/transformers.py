"""A model -> a clean folder that Transformers loads, proven by loading it there before the folder appears."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolforge import commit
from smolforge.checkpoint import families, llama_cpp, nanotron, resolve, weights
from smolforge.config import Generation
from smolforge.errors import InvalidFile, SettingError
from smolforge.model import LanguageModel
from smolforge.verification import checks, prompts, rows
from smolforge.verification.oracle import Oracle, difference, require

CHECKED_TOKENS = 512
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
CARRIED = (*SPECIAL, *Generation.model_fields, "do_sample")
"""What is said again of a source's generation_config.json."""


@dataclass(frozen=True)
class Exported:
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
    max_shard_bytes: int | None = None,
    describe: Callable[[Path], None] = lambda _: None,
) -> Exported:
    """Write `out` in a dtype (by default the files' own), in shards where they would be larger than so many bytes.

    `describe` may add to the new folder what tells of the model, such as its card.
    The folder appears only if AutoModelForCausalLM loads it with equal logits and equal greedy text. Raises
    SettingError where `out` has something in it, InvalidFile where the check does not hold, MissingResource
    where Transformers is not installed or the disk is full.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} is there already; name a new folder, or delete it first")
    require()
    source = resolve.find(model)
    loaded = resolve.load(source)
    if loaded.scheme is not None:
        raise SettingError(f"{model} is of integers; export the model it was made from")
    if loaded.config.own_classes:
        names = ", ".join(loaded.config.own_classes.values())
        raise SettingError(f"{model} has classes of your own ({names}), which Transformers does not have")
    target = resolve.torch_dtype(dtype) if dtype else stored_dtype(resolve.plain(source))
    checked: list[Any] = []

    def fill(folder: Path) -> None:
        weights.save(loaded, folder, loaded.tokenizer, target, max_shard_bytes, **carried(source))
        checked.append(_check(loaded, folder, target))
        describe(folder)

    commit.write_whole(out, fill)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return Exported(files, str(target).removeprefix("torch."), *checked[0])


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a folder's embedding."""
    if llama_cpp.is_file(folder):
        return llama_cpp.stored_dtype(folder)
    if nanotron.is_checkpoint(folder):
        return nanotron.stored_dtype(folder)
    with weights.Tensors(folder) as tensors:
        return tensors[weights.EMBEDDING].dtype


def carried(source: Path) -> dict[str, dict[str, Any]]:
    """What the source says about special tokens and generation, to be said again; nothing where its tokenizer says it
    all: that of a .gguf, or one that an adapter brings.
    """
    plain = resolve.plain(source)
    if llama_cpp.is_file(plain) or resolve.with_tokenizer(source) != plain:
        return {}
    source = plain
    config = families.read_json(source / (nanotron.CONFIG if nanotron.is_checkpoint(source) else weights.CONFIG))
    path = source / weights.GENERATION
    generation = families.read_json(path) if path.is_file() else {}
    return {
        "special": {name: config[name] for name in SPECIAL if name in config},
        "generation": {name: value for name, value in generation.items() if name in CARRIED},
    }


def _check(before: LanguageModel, folder: Path, dtype: torch.dtype) -> tuple[float, float, bool]:
    """Compare the weights before and after, and Transformers on the new folder with this code on it."""
    after = resolve.load(folder)
    written = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InvalidFile(f"{name} holds NaN or infinity; this model is nothing to hand on")
        wanted = weight.to(dtype)
        if not bool(wanted.isfinite().all()):
            raise InvalidFile(f"{name} has values that {dtype} cannot hold; --dtype bfloat16 or float32 can")
        assert torch.equal(wanted.float(), written[name]), f"{name} was not written as it is"
    if after.tokenizer is not None and after.tokenizer.template is not None:
        with suppress(SettingError):  # a template may refuse a conversation, but must be one
            after.tokenizer.chat([{"role": "user", "content": "Hello"}])
    oracle = Oracle(folder, torch.float32)
    row = rows(after, min(CHECKED_TOKENS, after.config.max_position_embeddings))[-1]
    found = difference(after, oracle, row)
    with torch.inference_mode():
        ids = torch.tensor([row])
        rounding = (after.logits(after.hidden(ids)) - before.logits(before.hidden(ids))).abs().max().item()
    text = checks.greedy(after, oracle, prompts(after))
    if not found.holds or not text.holds:
        raise InvalidFile(
            f"what was written does not say the same in Transformers: logits differ by {found.max_abs_diff:.1e} "
            f"(allowed {found.allowed:.1e}), {text.said}; nothing was kept"
        )
    return found.max_abs_diff, rounding, text.holds
