"""What the model to start from says of every pair: log-probabilities made once, before the first step, and kept.

    init_from, corpus, lengths, dtype -> key -> CORPUS/reference/KEY/{reference.safetensors, manifest.json}

They stand beside the corpus, so that runs of the same pairs and the same beginning share them; whole or not at all. A
checkpoint names the key of those it was trained against, and goes on with no others.
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
from smolforge.config.base import replaced
from smolforge.data.corpus import HELD_OUT, SPLITS, Corpus
from smolforge.data.preference_pairs import PairRows
from smolforge.device import autocast
from smolforge.errors import InvalidFile
from smolforge.models.attention import packing
from smolforge.models.decoder import LanguageModel
from smolforge.runs.initial_model import initial_model
from smolforge.training.dpo import by_sequence
from smolforge.training.loss import label_log_probs

log = logging.getLogger("smolforge")
FILE = "reference.safetensors"
LogProbs = dict[str, np.ndarray]
"""Of each document (n,) of each split that has any."""
Report = Callable[[int, int], None]
"""Told how many pairs are done, and of how many."""


def place_of(recipe: Recipe, text: Corpus, base: str) -> Path:
    """Where the log-probabilities of a recipe's pairs are, or will be; `base` is the fingerprint of who says them."""
    facts = {
        "model": base,
        "shape": recipe.model.model_dump(mode="json"),
        "corpus": text.fingerprint,
        "lengths": recipe.dpo.lengths(recipe.train.sequence_length),
        "dtype": recipe.train.dtype,
    }
    return text.folder / "reference" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check_same_reference(place: Path | None, checkpoint: Path, facts: dict[str, Any]) -> None:
    """Raises InvalidFile for a checkpoint that was trained against other log-probabilities."""
    if place is not None and place.name != facts.get("reference"):
        raise InvalidFile(
            f"{checkpoint} was trained against another reference than init_from is now: its weights, or the pairs, "
            "are others. Bring those back, or start another --run"
        )


def make_unless_there(place: Path, recipe: Recipe, text: Corpus, device: torch.device, report: Report) -> None:
    """Let the model to start from read all pairs, unless that was done. Raises MissingResource for a full disk."""
    if is_sound(place):
        return
    model = initial_model(replaced(recipe, {"lora.rank": None}), text, filled_later=False).to(device).eval()
    splits = [rows_of(text, split, recipe) for split in SPLITS if text.size(split)["documents"]]
    told = counting(report, sum(rows.pairs for rows in splits))
    found = {rows.split: log_probs(model, rows, recipe, told) for rows in splits}
    atomic.make_folder(place.parent)
    atomic.write_whole(
        place, lambda folder: safetensors_writer.write(folder / FILE, found), facts={"reference": place.name}
    )


def counting(report: Report, of: int) -> Callable[[int], None]:
    """Hears of pairs done, and reports how many that are by now."""
    done = 0

    def more(pairs: int) -> None:
        nonlocal done
        done += pairs
        report(done, of)

    return more


def is_sound(place: Path) -> bool:
    """Whether they are there; damaged ones are taken away, to be made again."""
    if not place.exists():
        return False
    try:
        atomic.check(place)
    except InvalidFile as error:
        log.warning("%s; the reference is computed again", error)
        atomic.remove(place)
        return False
    return True


def read(place: Path) -> LogProbs:
    return {split: found.numpy() for split, found in load_file(place / FILE).items()}


def rows_of(text: Corpus, split: str, recipe: Recipe, known: LogProbs | None = None) -> PairRows:
    """A split's pairs as they are trained on; what is held out always in the same order."""
    length, seed = recipe.train.sequence_length, 0 if split == HELD_OUT else recipe.seed
    return PairRows(text, split, length, recipe.dpo.lengths(length), seed, known[split] if known else None)


@torch.no_grad()
def log_probs(model: LanguageModel, rows: PairRows, recipe: Recipe, told: Callable[[int], None]) -> torch.Tensor:
    """Of each document (n,), in fp32 at least; `told` hears of pairs done."""
    device, size = model.head.device, recipe.train.micro_rows
    found = torch.zeros(2 * rows.pairs, dtype=torch.float64 if recipe.train.dtype == "float64" else torch.float32)
    for start in range(0, rows.count, size):
        numbers = list(range(start, min(start + size, rows.count)))
        ids, labels, positions, _ = rows.batch_of(numbers).each(lambda side: side.to(device))
        assert positions is not None
        with autocast(recipe.train.dtype, device):
            hidden = model.hidden(ids, *packing(ids, None, positions))
            by_pair = by_sequence(label_log_probs(hidden, model.head, labels), positions).flatten(1).cpu()
        for number, values in zip(numbers, by_pair, strict=True):
            documents = rows.sequences(number)
            found[documents] = values[: len(documents)].to(found.dtype)
            told(len(documents) // 2)
    return found
