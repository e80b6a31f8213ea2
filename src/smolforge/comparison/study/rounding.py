"""What a run's model loses on held-out text when its matrices are rounded to 4 bits: OUT/rounded/RUN.json."""

import json
from pathlib import Path

from smolforge import commit
from smolforge.checkpoint.resolve import load
from smolforge.comparison.history import History
from smolforge.data.corpus import Corpus
from smolforge.evaluation.text import measure_corpus
from smolforge.quantized import Scheme, quantize

METRIC, BEFORE = "loss_added_by_int4", "validation_loss"
TOKENS = 65_536
"""Held-out tokens at most: what rounding adds is small beside what texts differ by."""


def added(run: History, corpus: Corpus, group_size: int, kept: Path) -> float:
    """Nats a token, the embedding as it was. Asked once, then kept.

    Raises SettingError where groups do not divide the model's widths.
    """
    try:
        stored = json.loads(kept.read_text("utf-8"))
        if stored["group_size"] == group_size:
            return float(stored["after"] - stored["before"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet
    model, length = load(run.path), run.recipe.train.sequence_length
    before = measure_corpus(model, corpus, length, TOKENS)["loss"]
    quantize(model, Scheme(4, group_size))
    after = measure_corpus(model, corpus, length, TOKENS)["loss"]
    commit.make_folder(kept.parent)
    commit.replace(kept, json.dumps({"group_size": group_size, "before": before, "after": after}, indent=2) + "\n")
    return float(after - before)
