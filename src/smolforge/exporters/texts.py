"""Choose the texts of an export: what a model is measured on, and what its integers are chosen by.

MODEL of a run     measured on what the run held out, calibrated on what it trained on
any other          measured on a file, or the documentation of Python's language; calibrated on what the user names
"""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from smolforge.config.load import read_recipe
from smolforge.data.corpus import HELD_OUT, TRAIN, Corpus, Tokens
from smolforge.data.mixture import Mixture, PreparedData, open_prepared
from smolforge.data.prepare.documents import read_text
from smolforge.errors import ConfigError
from smolforge.evaluation.divergence import MeasuredText
from smolforge.exporters.provenance import training_data
from smolforge.generation.stream import require_tokenizer
from smolforge.models.decoder import LanguageModel
from smolforge.training.run_folder import RECIPE

MAX_WINDOW, MAX_TOKENS = 1024, 16_384
"""Of a text: tokens of a window at most (a run's are as long as it trained on), and of all that is read of it."""
CHARACTERS_PER_TOKEN = 16
"""Of a file, so many characters for each token are read; the rest is beyond `MAX_TOKENS`."""
NO_TEXT = "none"
PYTHON_DOCS = "the documentation of Python's language"
PIECE = 32
"""Tokens of a piece; texts that share more than half of their pieces are the same."""


@dataclass(frozen=True)
class CalibrationText:
    """What integers are chosen by."""

    name: str
    rows: Int[Tensor, "b t"]


def measured_text(model: LanguageModel, source: Path, text: Path | None) -> MeasuredText:
    """A file, or what a run held out, or the documentation of Python's language; in windows as the run trained on."""
    data, window = run_data(source, model)
    if text is None and isinstance(data, Corpus) and data.format == "text" and data.size(HELD_OUT)["tokens"]:
        size = data.size(HELD_OUT)
        ids = np.array(data.tokens(HELD_OUT)[:MAX_TOKENS])
        return MeasuredText("what the run held out", ids, size["bytes"] * len(ids) / size["tokens"], window)
    content = "\n\n".join(topics.values()) if text is None else read_text(text)
    name = PYTHON_DOCS if text is None else text.name
    ids = encode_start(model, content)
    if not len(ids):
        raise ConfigError(f"{name} is empty; --text names a file to measure on")
    return MeasuredText(name, ids, float(len(require_tokenizer(model).decode(ids.tolist()).encode())), window)


def calibration_text(model: LanguageModel, source: Path, calibrate: str | None) -> CalibrationText | None:
    """Return the text that integers are chosen by: a file, a prepared corpus, or what a run trained on.

    None where `calibrate` is "none". Raises ConfigError where there is no such text, or it is empty.
    """
    if calibrate == NO_TEXT:
        return None
    data, window = run_data(source, model)
    name = "what the run trained on" if calibrate is None else Path(calibrate).name
    if calibrate is not None:
        path = Path(calibrate)
        data = open_prepared(path) if path.is_dir() else encode_start(model, read_text(path))
    if data is None:
        raise ConfigError(
            f"{source.name} is of no run whose training text is still there; --calibrate names a text or a prepared "
            "corpus to choose the 4-bit integers by, or none, for the nearest"
        )
    texts = [data] if isinstance(data, np.ndarray) else [train_tokens(corpus, model) for corpus in corpora_of(data)]
    texts = [text for text in texts if len(text)]
    if not texts:
        raise ConfigError(f"{name} is empty; --calibrate names a text to choose integers by")
    return CalibrationText(name, spread_rows(texts, window))


def run_data(source: Path, model: LanguageModel) -> tuple[PreparedData | None, int]:
    """What a checkpoint learned from, where that is still there; the length of its run's windows, as the model fits."""
    source = source.resolve()
    run = source.parents[1] if source.parent.name == "checkpoints" else source
    if not (run / RECIPE).is_file():
        return None, min(MAX_WINDOW, model.config.max_position_embeddings)
    recipe = read_recipe(run / RECIPE)
    window = min(recipe.train.sequence_length, model.config.max_position_embeddings)
    return training_data(run, recipe, source), window


def corpora_of(data: PreparedData) -> list[Corpus]:
    return list(data.sources.values()) if isinstance(data, Mixture) else [data]


def train_tokens(corpus: Corpus, model: LanguageModel) -> Tokens:
    """The tokens of what was not held out. Raises ConfigError where another tokenizer made them."""
    if corpus.metadata["tokenizer"] != require_tokenizer(model).fingerprint:
        raise ConfigError(f"the tokens of {corpus.folder} were made with another tokenizer than this model's")
    return corpus.tokens(TRAIN)


def encode_start(model: LanguageModel, content: str) -> np.ndarray:
    """Return the first tokens of a text."""
    return np.array(require_tokenizer(model).encode(content[: MAX_TOKENS * CHARACTERS_PER_TOKEN])[:MAX_TOKENS])


def spread_rows(texts: list[Tokens | np.ndarray], window: int) -> Int[Tensor, "b t"]:
    """Return windows that lie evenly over texts, as many of each."""
    window = min(window, *map(len, texts))
    count = max(1, MAX_TOKENS // window // len(texts))
    rows = [
        np.asarray(text[start : start + window]).astype(np.int64)
        for text in texts
        for start in np.linspace(0, len(text) - window, min(count, len(text) // window)).astype(int).tolist()
    ]
    return torch.from_numpy(np.stack(rows))


def check_distinct(measured: MeasuredText, calibration: CalibrationText) -> None:
    """Refuse to measure on what integers were chosen by. Raises ConfigError."""
    size = min(PIECE, len(measured.ids))
    known = {row.tobytes() for ids in calibration.rows.numpy() if len(ids) >= size for row in pieces(ids, size, 1)}
    own = [piece.tobytes() for piece in pieces(measured.ids.astype(np.int64), size, size)]
    if 2 * sum(piece in known for piece in own) > len(own):
        raise ConfigError(
            f"{measured.name} is measured on, and --calibrate reads the same text ({calibration.name}); let one of "
            "--text and --calibrate name another, or the loss says nothing of other texts"
        )


def pieces(ids: np.ndarray, size: int, step: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(ids, size)[::step]
