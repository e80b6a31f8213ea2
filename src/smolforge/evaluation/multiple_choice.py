"""Score multiple-choice items: items in, log-probabilities and accuracies out.

A query and its choices are one row, so that the query is computed once:

    row        [ query . . . . | choice 0 . . | choice 1 . | choice 2 . . . ]
    positions    0 1 2 3 4 5     6 7 8          6 7          6 7 8 9
    sees         what is before  the query and itself: `attention.SharedPrefixAttention`

Borders and scores are lm-evaluation-harness's (`_encode_pair`, `process_results` of 0.4.13), with two names to
know: its `acc_norm` divides by characters, which is `acc_chars` here and the normalization of SmolLM2's own figures;
`acc_norm` here divides by bytes, which it calls `acc_bytes`. An item longer than the model's context is skipped, or
loses the beginning of its query as in the harness; results count both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from smolforge.errors import InvalidFileError
from smolforge.generation.stream import require_tokenizer
from smolforge.models.attention import SharedPrefixAttention
from smolforge.models.decoder import LanguageModel
from smolforge.tokenizer import Tokenizer

CPU_TOKENS, GPU_TOKENS = 256, 16384
"""Tokens in one forward pass, padding included: few keep a CPU busy, and less of them is padding."""
HEAD_TOKENS = 1024
"""Tokens whose logits exist at the same time."""
DELIMITER = " "
LongItems = Literal["skip", "truncate"]
"""What becomes of an item longer than the context: it is not scored, or its query loses its beginning."""


@dataclass(frozen=True)
class Item:
    """One question. `queries` has one text for all choices, or one for each.

    An item with a single choice asks for it word by word: it is right if greedy decoding gives that choice.
    """

    id: str
    queries: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    location: str = ""
    """Where it was read, for error messages."""

    def pairs(self) -> list[tuple[str, str]]:
        """(query, choice) of each choice."""
        return list(zip(self.queries * (len(self.choices) // len(self.queries)), self.choices, strict=True))


class Row(NamedTuple):
    """A query and those choices of one item that go on from it, as ids."""

    item: int
    context: list[int]
    continuations: dict[int, list[int]]  # by choice

    @property
    def length(self) -> int:
        """Tokens a model is given: the last of each choice is only predicted."""
        return len(self.context) + sum(len(ids) - 1 for ids in self.continuations.values())

    def flatten(self) -> list[tuple[int, int, int]]:
        """Return (id, position, branch) of each token."""
        tokens = [(token, position, 0) for position, token in enumerate(self.context)]
        for branch, ids in enumerate(self.continuations.values(), 1):
            tokens += [(token, position, branch) for position, token in enumerate(ids[:-1], len(self.context))]
        return tokens

    def targets(self) -> Iterator[tuple[int, int, int]]:
        """Yield (choice, position, token): each token of each choice, and the position in the row that predicts it."""
        context_length = end = len(self.context)
        for choice, ids in self.continuations.items():
            positions = [context_length - 1, *range(end, end + len(ids) - 1)]
            yield from ((choice, position, token) for position, token in zip(positions, ids, strict=True))
            end += len(ids) - 1


@dataclass(frozen=True)
class ItemScore:
    """Log-probability in nats of each choice behind its query, and whether greedy decoding gives it; of an item that is
    too long, none.
    """

    item: Item
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    truncated: bool = False
    """Whether a query lost its beginning."""

    @property
    def skipped(self) -> bool:
        return not self.logprobs

    def predictions(self) -> dict[str, int]:
        """Return the choice that each metric selects; of equal ones the first."""
        sizes = {
            "acc": [1] * len(self.logprobs),
            "acc_norm": [len(choice.encode()) for choice in self.item.choices],
            "acc_chars": [len(choice) for choice in self.item.choices],
        }
        return {name: int(np.argmax(np.array(self.logprobs) / lengths)) for name, lengths in sizes.items()}

    def correct(self) -> dict[str, bool]:
        """Return whether each metric selects the right choice."""
        if len(self.greedy) == 1:
            return dict.fromkeys(self.predictions(), self.greedy[0])
        return {name: choice == self.item.gold for name, choice in self.predictions().items()}

    def as_json(self) -> dict[str, Any]:
        """One line of a log."""
        plain = {"id": self.item.id, "gold": self.item.gold, "skipped": self.skipped, "truncated": self.truncated}
        if self.skipped:
            return plain
        plain |= {"logprobs": self.logprobs, "greedy": self.greedy}
        return {**plain, "predictions": self.predictions(), "right": self.correct()}


def summary(scores: Sequence[ItemScore]) -> dict[str, Any]:
    """Return each accuracy with its standard error, sqrt(p (1 - p) / (n - 1)) and None if n is 1, the number n of items
    that were scored, and how many were truncated or skipped.
    """
    scored, values = [score for score in scores if not score.skipped], {}
    n, truncated = len(scored), sum(score.truncated for score in scored)
    for name in ("acc", "acc_norm", "acc_chars"):
        mean = sum(score.correct()[name] for score in scored) / n
        values |= {name: mean, f"{name}_stderr": standard_error(mean, n)}
    return {**values, "n": n, "truncated": truncated, "skipped": len(scores) - n}


def standard_error(mean: float, n: int) -> float | None:
    """Return the standard error of a share of n items."""
    return math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


def encode_choices(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Return the ids of each query and of its continuation, with the border where the query's own encoding ends.

    Spaces at the end of the query go to the continuation. An empty query is the token that starts a text. If a merge
    over the border leaves nothing to score, the continuation is encoded by itself.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return [tokenizer.add_bos(ids) for ids in tokenizer.encode_batch(texts)]

    queries = [query.rstrip() for query, _ in pairs]
    continuations = [query[len(stripped) :] + text for stripped, (query, text) in zip(queries, pairs, strict=True)]
    contexts = dict(zip(distinct := list(dict.fromkeys(queries)), encode(distinct), strict=True))
    joined = encode([stripped + text for stripped, text in zip(queries, continuations, strict=True)])
    return [
        (contexts[stripped] or [tokenizer.prefix_id], joined_ids[len(contexts[stripped]) :] or tokenizer.encode(text))
        for stripped, text, joined_ids in zip(queries, continuations, joined, strict=True)
    ]


def score(
    model: LanguageModel,
    items: Sequence[Item],
    batch_tokens: int | None = None,
    *,
    long_items: LongItems = "skip",
    on_progress: Callable[[int], None] = lambda rows: None,
) -> list[ItemScore]:
    """Return the scores of items, in their order. `on_progress` is called with the number of rows just completed.

    Raises InvalidFileError where no item fits into the model's context, and for a model that gives NaN.
    """
    limit = model.config.max_position_embeddings
    rows, truncated = encode_items(require_tokenizer(model), items, limit, long_items=long_items)
    scores = log_probabilities(model, rows, batch_tokens, on_progress=on_progress)
    item_scores = []
    for number, item in enumerate(items):
        answers = [scores[number, choice] for choice in range(len(item.choices)) if (number, choice) in scores]
        logprobs, greedy = zip(*answers, strict=True) if answers else ((), ())
        item_scores.append(ItemScore(item, logprobs, greedy, truncated=number in truncated))
    return item_scores


def log_probabilities(
    model: LanguageModel,
    rows: Sequence[Row],
    batch_tokens: int | None = None,
    *,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> dict[tuple[int, int], tuple[float, bool]]:
    """Return by (item, choice) the log-probability in nats, and whether greedy decoding gives the choice.

    Raises InvalidFileError for a model that gives NaN.
    """
    scores: dict[tuple[int, int], tuple[float, bool]] = {}
    for batch in batch_by_length(rows, batch_tokens or tokens_at_once(model)):
        for item, choice, loss, hit in _forward(model, batch):
            logprob, greedy = scores.get((item, choice), (0.0, True))
            scores[item, choice] = logprob - loss, greedy and hit
        on_progress(len(batch))
    if any(math.isnan(logprob) for logprob, _ in scores.values()):
        raise InvalidFileError(
            "this model's log-probabilities are no numbers; `smolforge verify` says where it is broken"
        )
    return scores


def tokens_at_once(model: LanguageModel) -> int:
    """Tokens of one forward pass that keep the model's device busy."""
    return CPU_TOKENS if model.lm_head_weight.device.type == "cpu" else GPU_TOKENS


def encode_items(
    tokenizer: Tokenizer, items: Sequence[Item], limit: int, *, long_items: LongItems = "skip"
) -> tuple[list[Row], set[int]]:
    """Return the rows of each item, and the numbers of those that were truncated to `limit`, the model's context.

    An item has one row, several where its choices have queries of their own or lose some of it, and none where it is
    skipped. Raises InvalidFileError where that is all of them.
    """
    pairs = iter(encode_choices(tokenizer, [(q, DELIMITER + text) for item in items for q, text in item.pairs()]))
    rows: dict[tuple[int, tuple[int, ...]], Row] = {}
    truncated: set[int] = set()
    for number, item in enumerate(items):
        encoded = [next(pairs) for _ in item.choices]
        fitting = [fit_context(context, continuation, limit) for context, continuation in encoded]
        is_long = any(len(fit) < len(context) for fit, (context, _) in zip(fitting, encoded, strict=True))
        if not all(fitting) or (is_long and long_items == "skip"):
            continue
        truncated |= {number} if is_long else set()
        for choice, (context, (_, continuation)) in enumerate(zip(fitting, encoded, strict=True)):
            row = rows.setdefault((number, tuple(context)), Row(number, context, {}))
            row.continuations[choice] = continuation
    if not rows:
        where = f"{items[0].location or items[0].id}, as every item here,"
        hint = "" if long_items == "truncate" else "; evaluate --long-items truncate leaves out the beginning of each"
        raise InvalidFileError(f"{where} is longer than this model's context of {limit:,} tokens{hint}")
    return list(rows.values()), truncated


def fit_context(context: list[int], continuation: list[int], limit: int) -> list[int]:
    """Return the end of a context that fits before its continuation, whose last token is only predicted; [] if none."""
    return context[-(limit + 1 - len(continuation)) :] if len(continuation) <= limit else []


def batch_by_length(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length, the longest first, so that memory runs out at once or never."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        if batch and batch[0].length * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _forward(model: LanguageModel, rows: Sequence[Row]) -> Iterator[tuple[int, int, float, bool]]:
    """Yield (item, choice, loss in nats, whether it is the argmax) of every token of every choice in these rows."""
    inputs = torch.zeros(3, len(rows), rows[0].length, dtype=torch.int64)
    owners, sources, targets = [], [], []
    for number, row in enumerate(rows):
        inputs[:, number, : row.length] = torch.tensor(row.flatten()).T
        for choice, position, token in row.targets():
            owners.append((row.item, choice))
            sources.append((number, position))
            targets.append(token)
    device = model.lm_head_weight.device
    ids, positions, branch = inputs.to(device)
    hidden = model.hidden_states(ids, positions, SharedPrefixAttention(branch))[
        tuple(torch.tensor(sources, device=device).T)
    ]
    target_ids = torch.tensor(targets, device=device)
    losses, hits = [], []
    for states, ids_of_chunk in zip(hidden.split(HEAD_TOKENS), target_ids.split(HEAD_TOKENS), strict=True):
        logits = model.logits(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, ids_of_chunk, reduction="none"))
        hits.append(logits.argmax(-1) == ids_of_chunk)
    for owner, loss, hit in zip(owners, torch.cat(losses).tolist(), torch.cat(hits).tolist(), strict=True):
        yield *owner, loss, hit
