"""Compare a model's predictions of a text with those of the model that it was made from.

What llama.cpp's `llama-perplexity --kl-divergence` reports (https://github.com/ggml-org/llama.cpp/pull/6936), and the
loss: of 3 nats a token, 10 % more is 35 % more perplexity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smolforge.data.batches import IGNORE_INDEX
from smolforge.errors import InvalidFileError
from smolforge.evaluation.perplexity import TOKENS, windows
from smolforge.generation.stream import require_tokenizer
from smolforge.models.decoder import LanguageModel

TOKENS_AT_ONCE = 512
"""Tokens whose logits of both models exist at the same time."""


@dataclass(frozen=True)
class MeasuredText:
    """What predictions are compared on."""

    name: str
    ids: np.ndarray
    text_bytes: float
    window: int


@dataclass(frozen=True)
class Predictions:
    """How a model predicts a text, itself and beside the model before."""

    loss: float
    """Nats a token."""
    bits_per_byte: float
    perplexity_ratio: float
    """Perplexity, in times that of the model before."""
    kl_divergence: float
    """From the model before, mean over tokens, in nats."""
    top1_agreement: float
    """Share of tokens after which the most likely token is that of the model before."""


@dataclass(frozen=True)
class Comparison:
    """A model before and after."""

    text: str
    tokens: int
    before: Predictions
    after: Predictions
    max_abs_logit_diff: float


@torch.inference_mode()
def compare_predictions(
    before: LanguageModel,
    after: LanguageModel,
    text: MeasuredText,
    *,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Comparison:
    """Compare two models on a text. `on_progress` is called with the number of tokens just counted.

    Raises InvalidFileError where a model's loss is no number.
    """
    totals, worst, rows_per_batch = torch.zeros(4, dtype=torch.float64), 0.0, max(1, TOKENS // text.window)
    rows, targets = windows(text.ids, require_tokenizer(before).start_id, text.window, stride=text.window)
    for row, target in zip(rows.split(rows_per_batch), targets.split(rows_per_batch), strict=True):
        labels = target[target != IGNORE_INDEX]
        hidden = [model.hidden_states(row)[target != IGNORE_INDEX].split(TOKENS_AT_ONCE) for model in (before, after)]
        for part, of_before, of_after in zip(labels.split(TOKENS_AT_ONCE), *hidden, strict=True):
            logits = before.logits(of_before), after.logits(of_after)
            totals += compare_logits(*logits, labels=part)
            worst = max(worst, (logits[0] - logits[1]).abs().max().item())
        on_progress(len(labels))
    if not bool(totals.isfinite().all()):
        raise InvalidFileError("the model gives logits that are no numbers; its weights are damaged")
    count = len(text.ids)
    loss_before, loss_after, divergence, agreement = (totals / count).tolist()
    per_byte, ratio = count / math.log(2) / text.text_bytes, math.exp(min(loss_after - loss_before, 700))
    return Comparison(
        text.name,
        count,
        Predictions(loss_before, loss_before * per_byte, 1.0, 0.0, 1.0),
        Predictions(loss_after, loss_after * per_byte, ratio, divergence, agreement),
        worst,
    )


def compare_logits(
    before: Float[Tensor, "n v"], after: Float[Tensor, "n v"], *, labels: Int[Tensor, " n"]
) -> Float[Tensor, " 4"]:
    """Return the sums over tokens: each loss, the divergence, and how often both have the same most likely token."""
    log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
    return torch.stack(
        [
            F.nll_loss(log_before, labels, reduction="sum"),
            F.nll_loss(log_after, labels, reduction="sum"),
            F.kl_div(log_after, log_before, reduction="sum", log_target=True),
            (before.argmax(-1) == after.argmax(-1)).sum(),
        ]
    )
