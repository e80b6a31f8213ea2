"""Log-probabilities of every pair by the reference model of DPO: computed once, before the first step, and kept.

    init_from, corpus, lengths, dtype -> key -> CORPUS/reference/KEY/{reference.safetensors, manifest.json}

They are beside the corpus, written atomically, so that runs of the same pairs and base model share them. A checkpoint
names the key of those it was trained against, and resumes with no others.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from smolforge import atomic
from smolforge.checkpoint import safetensors_writer
from smolforge.config import Recipe
from smolforge.config.base import replace_settings
from smolforge.config.model import RopeScaling
from smolforge.data.corpus import HELD_OUT, SPLITS, Corpus
from smolforge.data.preference_pairs import PairRows
from smolforge.device import autocast
from smolforge.errors import InvalidFileError
from smolforge.models.attention import packed_attention
from smolforge.models.decoder import LanguageModel
from smolforge.runs.initial_model import initial_model
from smolforge.training.dpo import sum_by_sequence
from smolforge.training.loss import label_log_probs

log = logging.getLogger("smolforge")
FILE = "reference.safetensors"
LogProbs = dict[str, np.ndarray]
"""Of each document (n,) of each split that has any."""
Report = Callable[[int, int], None]
"""Told how many pairs are done, and of how many."""


def path_for(recipe: Recipe, text: Corpus, base: str) -> Path:
    """Return where the log-probabilities of a recipe's pairs are, or will be; `base` is the reference's fingerprint."""
    added = {"rope_scaling"} if recipe.model.rope_scaling == RopeScaling() else set()  # a later setting, at its default
    key = {
        "model": base,
        "shape": recipe.model.model_dump(mode="json", exclude=added),
        "corpus": text.fingerprint,
        "lengths": recipe.dpo.lengths(recipe.train.sequence_length),
        "dtype": recipe.train.dtype,
    }
    return text.folder / "reference" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def check_same_reference(path: Path | None, checkpoint: Path, metadata: dict[str, Any]) -> None:
    """Raise InvalidFileError for a checkpoint that was trained against other log-probabilities."""
    if path is not None and path.name != metadata.get("reference"):
        raise InvalidFileError(
            f"{checkpoint} was trained against another reference than init_from is now: its weights, or the pairs, "
            "are others. Bring those back, or start another --run"
        )


def compute_unless_there(path: Path, recipe: Recipe, text: Corpus, *, device: torch.device, report: Report) -> None:
    """Compute the log-probabilities of all pairs, unless they exist. Raises MissingResourceError for a full disk."""
    if is_valid_reference(path):
        return
    model = initial_model(replace_settings(recipe, {"lora.rank": None}), text, filled_later=False).to(device).eval()
    splits = [rows_of(text, split, recipe) for split in SPLITS if text.size(split)["documents"]]
    on_pairs = progress_counter(report, sum(rows.pairs for rows in splits))
    logprobs = {rows.split: log_probs(model, rows, recipe, on_pairs=on_pairs) for rows in splits}
    atomic.make_dir_durable(path.parent)
    atomic.write_dir_atomic(
        path, lambda folder: safetensors_writer.write(folder / FILE, logprobs), metadata={"reference": path.name}
    )


def progress_counter(report: Report, total: int) -> Callable[[int], None]:
    """Return a function that adds up pairs and reports (completed, total)."""
    completed = 0

    def more(pairs: int) -> None:
        nonlocal completed
        completed += pairs
        report(completed, total)

    return more


def is_valid_reference(path: Path) -> bool:
    """Whether the log-probabilities exist. Corrupted ones are deleted, to be computed again."""
    if not path.exists():
        return False
    try:
        atomic.check_manifest(path)
    except InvalidFileError as error:
        log.warning("%s; the reference is computed again", error)
        atomic.remove_dir_atomic(path)
        return False
    return True


def read(path: Path) -> LogProbs:
    """Read the log-probabilities (n,) of each split's documents."""
    return {split: tensor.numpy() for split, tensor in load_file(path / FILE).items()}


def rows_of(text: Corpus, split: str, recipe: Recipe, *, ref_logprobs: LogProbs | None = None) -> PairRows:
    """Return a split's pairs as rows to train on; the validation split always in the same order."""
    length, seed = recipe.train.sequence_length, 0 if split == HELD_OUT else recipe.seed
    return PairRows(
        text,
        split,
        length,
        lengths=recipe.dpo.lengths(length),
        seed=seed,
        reference=ref_logprobs[split] if ref_logprobs else None,
    )


@torch.no_grad()
def log_probs(model: LanguageModel, rows: PairRows, recipe: Recipe, *, on_pairs: Callable[[int], None]) -> torch.Tensor:
    """Return the log-probability (n,) of each document, in fp32 at least; `on_pairs` is called with pairs completed."""
    device, size = model.lm_head_weight.device, recipe.train.sequences_per_micro_batch
    logprobs = torch.zeros(2 * rows.pairs, dtype=torch.float64 if recipe.train.dtype == "float64" else torch.float32)
    for start in range(0, rows.count, size):
        numbers = list(range(start, min(start + size, rows.count)))
        ids, labels, positions, _ = rows.batch_of(numbers).map(lambda side: side.to(device))
        assert positions is not None
        with autocast(recipe.train.dtype, device):
            hidden = model.hidden_states(ids, *packed_attention(ids, None, positions))
            by_pair = sum_by_sequence(label_log_probs(hidden, model.lm_head_weight, labels), positions).flatten(1).cpu()
        for number, values in zip(numbers, by_pair, strict=True):
            documents = rows.sequences(number)
            logprobs[documents] = values[: len(documents)].to(logprobs.dtype)
            on_pairs(len(documents) // 2)
    return logprobs
