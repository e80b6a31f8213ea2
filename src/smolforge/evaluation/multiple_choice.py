"""Which choice a model finds likeliest: items in, log-probabilities and accuracies out.

A query and its choices are one row, so that the query is computed once:

    row        [ query . . . . | choice 0 . . | choice 1 . | choice 2 . . . ]
    positions    0 1 2 3 4 5     6 7 8          6 7          6 7 8 9
    sees         what is before  the query and itself: `memory.Branches`

Borders and scores are lm-evaluation-harness's (`_encode_pair`, `process_results` of 0.4.13), with two names to
know: its `acc_norm` divides by characters, which is `acc_chars` here and the normalisation of SmolLM2's own figures;
`acc_norm` here divides by bytes, which it calls `acc_bytes`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smolforge.errors import InvalidFile
from smolforge.generation.stream import own
from smolforge.models.attention import Branches
from smolforge.models.decoder import LanguageModel
from smolforge.tokenizer import Tokenizer

CPU_TOKENS, GPU_TOKENS = 256, 16384
"""Tokens in one forward pass, padding included: a processor is busy with few, and then less of them is padding."""
HEAD_TOKENS = 1024
"""Tokens whose logits exist at the same time."""
DELIMITER = " "


@dataclass(frozen=True)
class Item:
    """One question. `queries` has one text for all choices, or one for each.

    An item with a single choice asks for it word by word: it is right if greedy decoding gives that choice.
    """

    id: str
    queries: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    place: str = ""
    """Where it was read, for what must be said of it."""

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

    def laid(self) -> tuple[list[int], list[int], list[int]]:
        """Id, position and branch of each token."""
        begun, given = len(self.context), [ids[:-1] for ids in self.continuations.values()]
        ids = [*self.context, *(token for branch in given for token in branch)]
        positions = [*range(begun), *(begun + place for branch in given for place in range(len(branch)))]
        numbers = [0] * begun + [number for number, branch in enumerate(given, 1) for _ in branch]
        return ids, positions, numbers

    def predicted(self) -> Iterator[tuple[int, int, int]]:
        """(choice, place, token): each token of each choice, and the place in the row that predicts it."""
        begun = end = len(self.context)
        for choice, ids in self.continuations.items():
            places = [begun - 1, *range(end, end + len(ids) - 1)]
            yield from ((choice, place, token) for place, token in zip(places, ids, strict=True))
            end += len(ids) - 1


@dataclass(frozen=True)
class Score:
    """Log-probability in nats of each choice behind its query, and whether greedy decoding gives it."""

    item: Item
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    def predictions(self) -> dict[str, int]:
        """The choice each way of counting takes; of equal ones the first."""
        sizes = {
            "acc": [1] * len(self.logprobs),
            "acc_norm": [len(choice.encode()) for choice in self.item.choices],
            "acc_chars": [len(choice) for choice in self.item.choices],
        }
        return {name: int(np.argmax(np.array(self.logprobs) / by)) for name, by in sizes.items()}

    def right(self) -> dict[str, bool]:
        """Whether each way of counting takes the right one."""
        if len(self.greedy) == 1:
            return dict.fromkeys(self.predictions(), self.greedy[0])
        return {name: choice == self.item.gold for name, choice in self.predictions().items()}

    def as_json(self) -> dict[str, Any]:
        """One line of a log."""
        plain = {"id": self.item.id, "gold": self.item.gold, "logprobs": self.logprobs, "greedy": self.greedy}
        return {**plain, "predictions": self.predictions(), "right": self.right()}


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Each accuracy with its standard error, sqrt(p (1 - p) / (n - 1)) and None where n is 1, and n."""
    n, found = len(scores), {}
    for name in ("acc", "acc_norm", "acc_chars"):
        mean = sum(score.right()[name] for score in scores) / n
        found |= {name: mean, f"{name}_stderr": standard_error(mean, n)}
    return {**found, "n": n}


def standard_error(mean: float, n: int) -> float | None:
    """Of a share of n items."""
    return math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Ids of each query and of what follows it, with the border where the query's own encoding ends.

    Spaces at the end of the query go to what follows. A query of nothing is the token a text begins with. Where
    a merge over the border leaves nothing to score, what follows is encoded by itself.
    """
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    bare = [query.rstrip() for query, _ in pairs]
    behind = [query[len(cut) :] + text for cut, (query, text) in zip(bare, pairs, strict=True)]
    contexts = dict(zip(distinct := list(dict.fromkeys(bare)), tokenizer.encode_batch(distinct), strict=True))
    wholes = tokenizer.encode_batch([cut + text for cut, text in zip(bare, behind, strict=True)])
    return [
        (contexts[cut] or [begin], whole[len(contexts[cut]) :] or tokenizer.encode(text))
        for cut, text, whole in zip(bare, behind, wholes, strict=True)
    ]


def score(
    model: LanguageModel,
    items: Sequence[Item],
    batch_tokens: int | None = None,
    scored: Callable[[int], None] = lambda rows: None,
) -> list[Score]:
    """The scores of items, in their order. `scored` hears how many more rows are done.

    Raises InvalidFile for an item longer than the model's context, and for a model that gives no numbers.
    """
    rows = encoded(own(model), items, model.config.max_position_embeddings)
    found = log_probabilities(model, rows, batch_tokens, scored)
    answers = [[found[number, choice] for choice in range(len(item.choices))] for number, item in enumerate(items)]
    return [Score(item, *map(tuple, zip(*answer, strict=True))) for item, answer in zip(items, answers, strict=True)]


def log_probabilities(
    model: LanguageModel,
    rows: Sequence[Row],
    batch_tokens: int | None = None,
    scored: Callable[[int], None] = lambda rows: None,
) -> dict[tuple[int, int], tuple[float, bool]]:
    """In nats, of each continuation by (item, choice), and whether it is what greedy decoding gives.

    Raises InvalidFile for a model that gives no numbers.
    """
    found: dict[tuple[int, int], tuple[float, bool]] = {}
    for batch in batches(rows, batch_tokens or tokens_at_once(model)):
        for item, choice, loss, hit in _forward(model, batch):
            logprob, greedy = found.get((item, choice), (0.0, True))
            found[item, choice] = logprob - loss, greedy and hit
        scored(len(batch))
    if any(math.isnan(logprob) for logprob, _ in found.values()):
        raise InvalidFile("this model's log-probabilities are no numbers; `smolforge verify` says where it is broken")
    return found


def tokens_at_once(model: LanguageModel) -> int:
    """Tokens of one forward pass that keep the model's device busy."""
    return CPU_TOKENS if model.head.device.type == "cpu" else GPU_TOKENS


def encoded(tokenizer: Tokenizer, items: Sequence[Item], limit: int) -> list[Row]:
    """The rows of each item: one, unless its choices have queries of their own.

    Raises InvalidFile where one is longer than `limit`, the model's context.
    """
    pairs = iter(encode_pairs(tokenizer, [(q, DELIMITER + text) for item in items for q, text in item.pairs()]))
    rows: dict[tuple[int, tuple[int, ...]], Row] = {}
    for number, item in enumerate(items):
        for choice in range(len(item.choices)):
            context, continuation = next(pairs)
            length = len(context) + len(continuation) - 1
            if length > limit:
                raise InvalidFile(
                    f"{item.place or item.id}: query and choice {choice} have {length:,} tokens, more than this "
                    f"model's context of {limit:,}"
                )
            row = rows.setdefault((number, tuple(context)), Row(number, context, {}))
            row.continuations[choice] = continuation
    return list(rows.values())


def batches(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together, the longest first, so that memory runs out at once or never."""
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
    """(item, choice, loss in nats, whether it is the likeliest) of every token of every choice in these rows."""
    laid = torch.zeros(3, len(rows), rows[0].length, dtype=torch.int64)
    owners, sources, targets = [], [], []
    for number, row in enumerate(rows):
        laid[:, number, : row.length] = torch.tensor(row.laid())
        for choice, place, token in row.predicted():
            owners.append((row.item, choice))
            sources.append((number, place))
            targets.append(token)
    device = model.head.device
    ids, positions, branch = laid.to(device)
    hidden = model.hidden(ids, positions, Branches(branch))[tuple(torch.tensor(sources, device=device).T)]
    wanted = torch.tensor(targets, device=device)
    found = [_judged(model, *part) for part in zip(hidden.split(HEAD_TOKENS), wanted.split(HEAD_TOKENS), strict=True)]
    losses, hits = (torch.cat(each).tolist() for each in zip(*found, strict=True))
    for owner, loss, hit in zip(owners, losses, hits, strict=True):
        yield *owner, loss, hit


def _judged(
    model: LanguageModel, states: Float[Tensor, "n c"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Loss of each target, and whether it is the likeliest token."""
    logits = model.logits(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@torch.inference_mode()
def score_slowly(model: LanguageModel, item: Item) -> Score:
    """What `score` must give: each choice alone behind its query, the whole row computed, nothing shared."""
    logprobs, greedy = [], []
    for query, text in item.pairs():
        ((context, continuation),) = encode_pairs(own(model), [(query, DELIMITER + text)])
        logits = model(torch.tensor([context + continuation], device=model.head.device))[0, len(context) - 1 : -1]
        wanted = torch.tensor(continuation, device=model.head.device)
        logprobs.append(logits.double().log_softmax(-1).gather(1, wanted[:, None]).sum().item())
        greedy.append(bool((logits.argmax(-1) == wanted).all()))
    return Score(item, tuple(logprobs), tuple(greedy))
