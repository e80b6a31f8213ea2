"""Measure how well a model predicts a text: loss, perplexity, bits per byte, token accuracy.

Every token is predicted once, the first after BOS, or after an end-of-text token where the tokenizer adds no BOS.
Windows overlap, so that all but the first tokens have at least `sequence_length - stride` tokens before them.

    window 1   [. . . . . . . .]            all 8 count
    window 2           [. . . . . . . .]    the last 4 count (stride 4)

The metrics of a mixture are a mean over the validation splits of its sources, weighted by each source's share of the
run's training tokens over the whole schedule, so they mean the same at every step, in every stage. The sizes of the
validation splits do not matter. Sources without one are skipped, and the other shares are renormalized.
DPO pairs of the validation split have other metrics: loss, rewards, how often the model prefers the chosen answer.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from smolforge.data.batches import IGNORE_INDEX, Batch
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.data.mixture import Mixture
from smolforge.data.packing import PackedRows
from smolforge.data.preference_pairs import PairRows
from smolforge.device import to_device
from smolforge.errors import InvalidFileError
from smolforge.generation.stream import require_tokenizer
from smolforge.models.attention import packed_attention
from smolforge.models.decoder import LanguageModel
from smolforge.training.objective import Objective

TOKENS = 2048
"""Tokens whose logits exist at the same time."""


def measure_corpus(
    model: LanguageModel,
    corpus: Corpus,
    sequence_length: int,
    *,
    max_tokens: int | None = None,
    stride: int | None = None,
    precision: AbstractContextManager | None = None,
    intra_document_masking: bool = False,
) -> dict[str, Any]:
    """Return loss, perplexity, bits_per_byte, accuracy, tokens over the validation split, or its first `max_tokens`.

    Of conversations only the assistant's tokens count, each conversation seen by itself, packed as in training.
    Raises InvalidFileError if nothing was held out.
    """
    size = corpus.size(HELD_OUT)
    if not size["tokens"]:
        raise InvalidFileError(f"{corpus.folder} has no held-out text to measure on")
    if corpus.format == "pairs":
        raise InvalidFileError(
            f"{corpus.folder} holds pairs, which only train measures: against the model it starts from"
        )
    if corpus.format == "chat":
        rows = PackedRows(corpus, HELD_OUT, sequence_length, seed=0)
        count = rows.count if max_tokens is None else min(rows.count, max(1, max_tokens // sequence_length))
        result = evaluate_batches(model, (rows.batch(number, 1) for number in range(count)), precision)
        split_bytes, split_tokens = size["learned_bytes"], size["learned_tokens"]
    else:
        result = measure(
            model,
            corpus.tokens(HELD_OUT)[:max_tokens],
            corpus.metadata["eos_id"],
            sequence_length=sequence_length,
            stride=stride,
            precision=precision,
            intra_document_masking=intra_document_masking,
        )
        split_bytes, split_tokens = size["bytes"], size["tokens"]
    # Exact over the whole split; over a part, its bytes are taken in proportion to its tokens.
    text_bytes = split_bytes * result["tokens"] / split_tokens
    return result | {"bits_per_byte": result["loss"] * result["tokens"] / math.log(2) / text_bytes}


def measure_text(
    model: LanguageModel,
    text: str,
    sequence_length: int,
    *,
    stride: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Return loss, perplexity, bits_per_byte (of UTF-8), accuracy, tokens of a text as one document."""
    tokenizer = require_tokenizer(model)
    ids = np.array(tokenizer.encode(text))
    result = measure(
        model, ids, tokenizer.start_id, sequence_length=sequence_length, stride=stride, on_progress=on_progress
    )
    return result | {"bits_per_byte": result["loss"] * len(ids) / math.log(2) / len(text.encode())}


def measure(
    model: LanguageModel,
    ids: np.ndarray,
    eos_id: int,
    *,
    sequence_length: int,
    stride: int | None = None,
    precision: AbstractContextManager | None = None,
    intra_document_masking: bool = False,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Return loss (nats per token), perplexity, accuracy and tokens of a text given by its ids.

    With `intra_document_masking` attention stays inside each document, as in a model that trained so.
    `on_progress` is called with the number of tokens just counted.
    """
    batch = Batch(*windows(ids, eos_id, sequence_length, stride=stride or sequence_length))
    batches = batch.split(max(1, TOKENS // sequence_length))
    return evaluate_batches(
        model, batches, precision, separator=eos_id if intra_document_masking else None, on_progress=on_progress
    )


@torch.inference_mode()
def evaluate_batches(
    model: LanguageModel,
    batches: Iterable[Batch],
    precision: AbstractContextManager | None = None,
    *,
    separator: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Return the same over the labels of batches; documents that end with a `separator` do not see each other."""
    device, training = model.lm_head_weight.device, model.training
    model.eval()
    loss, num_correct, num_tokens = 0.0, 0, 0
    for batch in batches:
        rows, targets, positions, _ = batch.map(lambda side: side.to(device))
        with precision or nullcontext():
            hidden = model.hidden_states(rows, *packed_attention(rows, separator, positions))
            logits = model.logits(hidden[targets != IGNORE_INDEX])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        flat = targets[targets != IGNORE_INDEX]
        loss += F.cross_entropy(logits, flat, reduction="sum").item()
        num_correct += int((logits.argmax(-1) == flat).sum())
        batch_tokens = len(flat)
        num_tokens += batch_tokens
        on_progress(batch_tokens)
    model.train(training)
    mean = loss / num_tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),
        "accuracy": num_correct / num_tokens,
        "tokens": num_tokens,
    }


@torch.inference_mode()
def loss_by_position(model: LanguageModel, ids: np.ndarray, eos_id: int, *, length: int) -> np.ndarray:
    """Return the loss in nats (n, length) of every complete window of a text, token by token.

    Its mean over windows says how well the model predicts at each position, also beyond
    the length it was trained on.
    """
    if len(ids) < length:
        raise InvalidFileError(f"the text has {len(ids):,} tokens, less than one window of {length:,}")
    rows = torch.stack(windows(ids[: len(ids) // length * length], eos_id, length, stride=length), 1)
    losses = []
    for inputs, targets in rows.to(model.lm_head_weight.device):
        losses.append(F.cross_entropy(model(inputs[None])[0].float(), targets, reduction="none").cpu())
    return torch.stack(losses).numpy()


def windows(ids: np.ndarray, eos_id: int, sequence_length: int, *, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels (n, t) in which each id is a label that counts exactly once."""
    text = torch.from_numpy(np.concatenate([[eos_id], ids]).astype(np.int64))
    num_steps = max(0, math.ceil((len(ids) - sequence_length) / stride))
    padding = (0, sequence_length + num_steps * stride - len(ids))
    inputs, labels = (
        F.pad(text, padding, value=fill).unfold(0, sequence_length + 1, stride) for fill in (0, IGNORE_INDEX)
    )
    labels = labels[:, 1:].clone()
    labels[1:, : sequence_length - stride] = IGNORE_INDEX
    return inputs[:, :-1], labels


@torch.no_grad()
def measure_pairs(objective: Objective, rows: PairRows, max_tokens: int | None = None) -> dict[str, float]:
    """Return loss, reward_chosen, reward_rejected, reward_margin and reward_accuracy, each the mean over pairs.

    Over all rows, or the first that hold `max_tokens`, one at least.
    """
    model, training = objective.model, objective.model.training
    count = rows.count if max_tokens is None else min(rows.count, max(1, max_tokens // rows.sequence_length))
    sums: dict[str, float] = {}
    pairs = 0
    model.eval()
    for number in range(count):
        batch = rows.batch(number, 1)
        pairs += batch.num_targets
        metrics = objective(*batch.map(lambda side: to_device(side, model.lm_head_weight.device)))
        metrics.pop("objective")
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    model.train(training)
    return {name: value / pairs for name, value in sums.items()}


def measure_mixture(
    model: LanguageModel,
    mixture: Mixture,
    shares: Mapping[str, float],
    *,
    sequence_length: int,
    max_tokens: int | None = None,
    precision: AbstractContextManager | None = None,
    intra_document_masking: bool = False,
) -> dict[str, float]:
    """Return loss, perplexity, bits_per_byte, accuracy, and loss_NAME and bits_per_byte_NAME of each source.

    `max_tokens` are divided evenly among the sources.
    """
    measured = {name: corpus for name, corpus in mixture.sources.items() if corpus.size(HELD_OUT)["tokens"]}
    tokens_per_source = None if max_tokens is None else max(1, max_tokens // len(measured))
    results = {
        name: measure_corpus(
            model,
            corpus,
            sequence_length,
            max_tokens=tokens_per_source,
            precision=precision,
            intra_document_masking=intra_document_masking,
        )
        for name, corpus in measured.items()
    }
    total_share = sum(shares[name] for name in results)
    weights = {name: shares[name] / total_share if total_share else 1 / len(results) for name in results}
    loss, accuracy = (sum(weights[name] * results[name][key] for name in results) for key in ("loss", "accuracy"))
    bytes_per_token = sum(
        weights[name] * results[name]["loss"] / results[name]["bits_per_byte"] for name in results
    ) / math.log(2)
    by_source = {f"{key}_{name}": values[key] for name, values in results.items() for key in ("loss", "bits_per_byte")}
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "accuracy": accuracy,
        **by_source,
    }
