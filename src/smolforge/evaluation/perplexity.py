"""How well a model predicts a text: loss, perplexity, bits per byte, token accuracy.

Every token is predicted once, the first after an end-of-text token. Windows overlap, so that all but the
first tokens have at least `sequence_length - stride` tokens before them.

    window 1   [. . . . . . . .]            all 8 count
    window 2           [. . . . . . . .]    the last 4 count (stride 4)

How a model that learns from pairs takes those it has not seen: loss, rewards, how often it prefers the chosen.

How well a model predicts what was held out of each source of a mixture, and of all together.

All together is a mean over sources, each with the share of the run's training tokens that it has over the whole
schedule: a figure of the same thing at every step, in every stage. What is held out may have other proportions, and
counts in none. Sources of which nothing was held out are left out, and the others' shares are of the rest.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from smolforge.data.batches import IGNORED, Batch
from smolforge.data.corpus import HELD_OUT, Corpus
from smolforge.data.mixture import Mixture
from smolforge.data.packing import PackedRows
from smolforge.data.preference_pairs import PairRows
from smolforge.device import moved
from smolforge.errors import InvalidFile
from smolforge.generation.stream import own
from smolforge.models.attention import packing
from smolforge.models.decoder import LanguageModel
from smolforge.training.objective import Objective

TOKENS = 2048
"""Tokens whose logits exist at the same time."""


def measure_corpus(
    model: LanguageModel,
    corpus: Corpus,
    sequence_length: int,
    max_tokens: int | None = None,
    stride: int | None = None,
    precision: AbstractContextManager | None = None,
    intra_document_masking: bool = False,
) -> dict[str, Any]:
    """loss, perplexity, bits_per_byte, accuracy, tokens over the held-out part, or its first `max_tokens`.

    Of conversations it is over what the assistant says, each seen by itself, in rows as they are trained on.
    Raises InvalidFile where nothing was held out.
    """
    size = corpus.size(HELD_OUT)
    if not size["tokens"]:
        raise InvalidFile(f"{corpus.folder} has no held-out text to measure on")
    if corpus.format == "pairs":
        raise InvalidFile(f"{corpus.folder} holds pairs, which only train measures: against the model it starts from")
    if corpus.format == "chat":
        rows = PackedRows(corpus, HELD_OUT, sequence_length, seed=0)
        count = rows.count if max_tokens is None else min(rows.count, max(1, max_tokens // sequence_length))
        result = count_up(model, (rows.batch(number, 1) for number in range(count)), precision)
        text_bytes = size["learned_bytes"] * result["tokens"] / size["learned_tokens"]
        return result | {"bits_per_byte": result["loss"] * result["tokens"] / math.log(2) / text_bytes}
    ids = corpus.tokens(HELD_OUT)[:max_tokens]
    result = measure(model, ids, corpus.facts["eos_id"], sequence_length, stride, precision, intra_document_masking)
    # Exact over the whole split; over a part, its bytes are taken in proportion to its tokens.
    text_bytes = size["bytes"] * result["tokens"] / size["tokens"]
    return result | {"bits_per_byte": result["loss"] * result["tokens"] / math.log(2) / text_bytes}


def measure_text(
    model: LanguageModel,
    text: str,
    sequence_length: int,
    stride: int | None = None,
    done: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """loss, perplexity, bits_per_byte (of UTF-8), accuracy, tokens of a text as one document."""
    tokenizer = own(model)
    ids = np.array(tokenizer.encode(text))
    result = measure(model, ids, tokenizer.eos_id, sequence_length, stride, done=done)
    return result | {"bits_per_byte": result["loss"] * len(ids) / math.log(2) / len(text.encode())}


def measure(
    model: LanguageModel,
    ids: np.ndarray,
    eos_id: int,
    sequence_length: int,
    stride: int | None = None,
    precision: AbstractContextManager | None = None,
    intra_document_masking: bool = False,
    done: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """loss (nats a token), perplexity, accuracy and tokens of a text given by its ids.

    With `intra_document_masking` nothing is seen of documents before, as a model that trained so knows them.
    `done` hears how many more tokens are counted.
    """
    whole = Batch(*windows(ids, eos_id, sequence_length, stride or sequence_length))
    batches = whole.split(max(1, TOKENS // sequence_length))
    return count_up(model, batches, precision, eos_id if intra_document_masking else None, done)


@torch.inference_mode()
def count_up(
    model: LanguageModel,
    batches: Iterable[Batch],
    precision: AbstractContextManager | None = None,
    separator: int | None = None,
    done: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """The same over the labels of batches; documents that end with a `separator` are kept apart."""
    device, training = model.head.device, model.training
    model.eval()
    loss, right, counted = 0.0, 0, 0
    for batch in batches:
        rows, targets, positions, _ = batch.each(lambda side: side.to(device))
        with precision or nullcontext():
            hidden = model.hidden(rows, *packing(rows, separator, positions))
            logits = model.logits(hidden[targets != IGNORED])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        flat = targets[targets != IGNORED]
        loss += F.cross_entropy(logits, flat, reduction="sum").item()
        right += int((logits.argmax(-1) == flat).sum())
        here = len(flat)
        counted += here
        done(here)
    model.train(training)
    mean = loss / counted
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "accuracy": right / counted, "tokens": counted}


@torch.inference_mode()
def loss_by_position(model: LanguageModel, ids: np.ndarray, eos_id: int, length: int) -> np.ndarray:
    """Loss in nats (n, length) of every whole window of a text, token by token.

    Its mean over windows says how well the model predicts with so many tokens before it, also beyond
    the length it was trained on.
    """
    device, losses = model.head.device, []
    inputs, labels = windows(ids, eos_id, length, length)
    whole = len(ids) // length
    for row, targets in zip(inputs[:whole], labels[:whole], strict=True):
        logits = model(row[None].to(device))[0].float()
        losses.append(F.cross_entropy(logits, targets.to(device), reduction="none").cpu())
    if not losses:
        raise InvalidFile(f"the text has {len(ids):,} tokens, less than one window of {length:,}")
    return torch.stack(losses).numpy()


def windows(ids: np.ndarray, eos_id: int, sequence_length: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (n, t) in which each id is the label that counts exactly once."""
    text = torch.from_numpy(np.concatenate([[eos_id], ids]).astype(np.int64))
    inputs, labels, done = [], [], 0
    while done < len(ids):
        start = max(0, done + stride - sequence_length) if done else 0
        part = text[start : start + sequence_length + 1]
        end = start + len(part) - 1
        row, target = torch.zeros(sequence_length, dtype=torch.int64), torch.full((sequence_length,), IGNORED)
        row[: len(part) - 1] = part[:-1]
        target[done - start : len(part) - 1] = part[1 + done - start :]
        inputs.append(row)
        labels.append(target)
        done = end
    return torch.stack(inputs), torch.stack(labels)


@torch.no_grad()
def measure_pairs(objective: Objective, rows: PairRows, max_tokens: int | None = None) -> dict[str, float]:
    """loss, reward_chosen, reward_rejected, reward_margin and reward_accuracy, each the mean over pairs.

    Of all rows, or of the first that hold `max_tokens`, one at least.
    """
    model, training = objective.model, objective.model.training
    count = rows.count if max_tokens is None else min(rows.count, max(1, max_tokens // rows.sequence_length))
    sums: dict[str, float] = {}
    pairs = 0
    model.eval()
    for number in range(count):
        batch = rows.batch(number, 1)
        pairs += batch.counted
        found = objective(*batch.each(lambda side: moved(side, model.head.device)))
        found.pop("objective")
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    model.train(training)
    return {name: value / pairs for name, value in sums.items()}


def measure_mixture(
    model: LanguageModel,
    mixture: Mixture,
    shares: Mapping[str, float],
    sequence_length: int,
    max_tokens: int | None = None,
    precision: AbstractContextManager | None = None,
    intra_document_masking: bool = False,
) -> dict[str, float]:
    """loss, perplexity, bits_per_byte, accuracy, and loss_NAME and bits_per_byte_NAME of each source.

    `max_tokens` are divided evenly among the sources.
    """
    measured = {name: corpus for name, corpus in mixture.sources.items() if corpus.size(HELD_OUT)["tokens"]}
    each = None if max_tokens is None else max(1, max_tokens // len(measured))
    found = {
        name: measure_corpus(model, corpus, sequence_length, each, None, precision, intra_document_masking)
        for name, corpus in measured.items()
    }
    whole = sum(shares[name] for name in found)
    parts = {name: shares[name] / whole if whole else 1 / len(found) for name in found}
    loss, accuracy = (sum(parts[name] * found[name][key] for name in found) for key in ("loss", "accuracy"))
    bytes_a_token = sum(parts[name] * found[name]["loss"] / found[name]["bits_per_byte"] for name in found) / math.log(
        2
    )
    told = {f"{key}_{name}": values[key] for name, values in found.items() for key in ("loss", "bits_per_byte")}
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) / bytes_a_token,
        "accuracy": accuracy,
        **told,
    }
