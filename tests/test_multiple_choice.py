"""Items through one pass for all choices, held to each choice alone, and to lm-evaluation-harness."""

import json
import math
import random
from dataclasses import replace

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from smolforge.config.model import FAMILIES
from smolforge.errors import InvalidFileError
from smolforge.evaluation.multiple_choice import (
    DELIMITER,
    Item,
    ItemScore,
    Row,
    batch_by_length,
    encode_choices,
    score,
    summary,
)
from smolforge.testing import tiny_model, tiny_tokenizer
from smolforge.tokenizer import Tokenizer

MODEL, TOKENIZER = tiny_model(max_position_embeddings=512), tiny_tokenizer()
SPACES = [" ", "  ", "\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\r\n"]
WORDS = ["the", "model", "a", "token", ".", "7", "42", "'s"]
STRANGE = ["\u00e9", "e\u0301", "\u4f60\u597d", "\U0001f600", "\u200d", "\u05d0", "x\0", "<|endoftext|>"]
texts = st.lists(st.sampled_from(WORDS + STRANGE + SPACES), max_size=6).map("".join)
visible = texts.filter(str.strip)


@torch.inference_mode()
def score_slowly(model, item) -> ItemScore:
    """What `score` must return, the slow way: each choice alone after its query, nothing shared."""
    logprobs, greedy = [], []
    for query, text in item.pairs():
        ((context, continuation),) = encode_choices(model.tokenizer, [(query, DELIMITER + text)])
        logits, targets = (
            model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1],
            torch.tensor(continuation),
        )
        logprobs.append(logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item())
        greedy.append(bool((logits.argmax(-1) == targets).all()))
    return ItemScore(item, tuple(logprobs), tuple(greedy))


def questions(count: int, seed: int = 0) -> list[Item]:
    """Items of different lengths, whose choices share beginnings."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 30))]
        choices = {" ".join(draw.choice(WORDS + STRANGE) for _ in range(draw.randint(1, 8))) for _ in range(4)}
        made.append(Item(str(number), (" ".join(words),), tuple(sorted(choices)), 0))
    return made


MERGING = tokenizers.Tokenizer(
    models.BPE({"<|endoftext|>": 0, "a": 1, " ": 2, "b": 3, "a b": 4, "a ": 5}, [("a", " "), ("a ", "b")])
)


def logprobs(scores):
    return [value for each in scores for value in each.logprobs]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, st.lists(visible, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_score_equals_each_choice_alone(drawn):
    asked = [Item("x", (query,), tuple(choices), 0) for query, choices in drawn]
    fast, slow = score(MODEL, asked, batch_tokens=64), [score_slowly(MODEL, item) for item in asked]
    assert logprobs(fast) == pytest.approx(logprobs(slow), abs=1e-4)
    assert [each.greedy for each in fast] == [each.greedy for each in slow]


@settings(max_examples=200, deadline=None)
@given(texts, visible)
def test_encode_pairs_equals_lm_eval(query, choice):
    """Its `_encode_pair`, word by word; where it would refuse, there is still something to score."""
    ((context, continuation),) = encode_choices(TOKENIZER, [(query, " " + choice)])
    bare = query.rstrip()
    theirs = TOKENIZER.encode(query + " " + choice)[len(TOKENIZER.encode(bare)) :]
    assert context == (TOKENIZER.encode(bare) or [TOKENIZER.bos_id])
    assert continuation == (theirs or TOKENIZER.encode(query[len(bare) :] + " " + choice))
    assert continuation


def test_encode_pairs_handles_a_merge_over_the_border():
    """With a space that is a token before it is a word's: "a" and " " become one token with it."""
    merging = Tokenizer(MERGING, {"eos_token": "<|endoftext|>"})
    assert (merging.encode("a"), merging.encode("a b"), merging.encode(" b")) == ([1], [4], [2, 3])
    assert encode_choices(merging, [("a", " b"), ("a ", "b")]) == [([1], [2, 3]), ([1], [2, 3])]


def test_score_accepts_one_query_per_choice():
    """Winogrande's form: the same end behind different beginnings."""
    item = Item("w", ("the model reads a", "the model reads the"), ("token and a token", "token and a token"), 1)
    fast, slow = score(MODEL, [item])[0], score_slowly(MODEL, item)
    assert fast.logprobs == pytest.approx(slow.logprobs, abs=1e-4)
    assert fast.logprobs[0] != pytest.approx(fast.logprobs[1], abs=1e-3)


@pytest.mark.parametrize("changes", [{"model_type": name} for name in FAMILIES if name != "llama"])
def test_score_works_for_every_family(changes):
    model = tiny_model(**changes)
    asked = questions(6)
    slow = [score_slowly(model, item) for item in asked]
    assert logprobs(score(model, asked)) == pytest.approx(logprobs(slow), abs=1e-4)


def test_score_does_not_depend_on_batch_size_or_order():
    asked = questions(40)
    found = score(MODEL, asked)
    for size in (1, 97, 100_000):
        assert logprobs(score(MODEL, asked, size)) == pytest.approx(logprobs(found), abs=1e-4)
    shuffled = random.Random(1).sample(asked, len(asked))
    again = {each.item.id: each.logprobs for each in score(MODEL, shuffled)}
    assert [each.item for each in found] == asked
    assert [again[item.id] for item in asked] == [pytest.approx(each.logprobs, abs=1e-4) for each in found]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200))
def test_batches_have_each_row_once_within_the_limit(lengths, tokens):
    rows = [Row(number, [1] * length, {0: [1]}) for number, length in enumerate(lengths)]
    made = list(batch_by_length(rows, tokens))
    assert sorted(row.item for batch in made for row in batch) == list(range(len(rows)))
    assert all(len(batch) == 1 or len(batch) * max(row.length for row in batch) <= tokens for batch in made)


def test_score_normalizations_equal_hand_results():
    """-6 over 1, 3, 2; -5 over 1, 1, 1; -8 over 1, 4, 4."""
    item = Item("n", ("q",), ("\u00e9\u0041", "b", "word"), 2)
    found = ItemScore(item, (-6.0, -5.0, -8.0), (False, False, False))
    assert found.predictions() == {"acc": 1, "acc_norm": 0, "acc_chars": 2}
    assert found.correct() == {"acc": False, "acc_norm": False, "acc_chars": True}
    assert ItemScore(item, (-2.0, -2.0, -2.0), (False,) * 3).predictions()["acc"] == 0


def test_standard_error_is_the_sample_deviation_over_root_n():
    item = Item("n", ("q",), ("a", "b"), 0)
    scores = [ItemScore(item, (-1.0, -2.0) if right else (-2.0, -1.0), (False, False)) for right in (1, 0, 0, 1, 1)]
    found = summary(scores)
    values = [1, 0, 0, 1, 1]
    deviation = math.sqrt(sum((value - 0.6) ** 2 for value in values) / 4)
    assert found["acc"] == 0.6
    assert found["acc_stderr"] == pytest.approx(deviation / math.sqrt(5))
    assert found["n"] == 5
    assert summary(scores[:1])["acc_stderr"] is None


def test_single_choice_is_right_if_greedy_decoding_gives_it():
    """LAMBADA's form."""
    likely = ItemScore(Item("l", ("the model",), ("reads",), 0), (-1.0,), (True,))
    assert likely.correct() == dict.fromkeys(("acc", "acc_norm", "acc_chars"), True)
    assert not any(replace(likely, greedy=(False,)).correct().values())


@pytest.mark.parametrize("query", ["the model reads a", "", "7: a token and"])
def test_greedy_flag_equals_greedy_decoding(query):
    """A model that always says the token it was taught to like."""
    model = tiny_model()
    ((context, liked),) = encode_choices(TOKENIZER, [(query, " the")])
    assert len(liked) == 1
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor([context]))[0, -1]
        model.model.embed_tokens.weight[liked[0]] = hidden
    found = score(model, [Item("g", (query,), ("the", "a", "the model"), 0)])[0]
    expected = int(model(torch.tensor([context]))[0, -1].argmax()) == liked[0]
    assert expected
    assert found.greedy[:2] == (True, False)
    assert found.greedy == score_slowly(model, found.item).greedy


def test_score_refuses_an_item_beyond_the_context():
    item = Item("long", ("the model " * 600,), ("a", "b"), 0, "items.jsonl, line 3")
    with pytest.raises(InvalidFileError, match="items.jsonl, line 3, as every item here, is longer .* 512"):
        score(MODEL, [item])


def test_score_refuses_a_model_with_nan():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InvalidFileError, match="are no numbers"):
        score(model, questions(2))


@pytest.mark.long
def test_score_equals_each_choice_alone_on_hellaswag(shared):
    lines = (shared / "hellaswag" / "hellaswag_val_1000.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    model = tiny_model(max_position_embeddings=2048)
    asked = [Item(str(row["id"]), (row["query"],), tuple(row["choices"]), row["gold"]) for row in rows]
    slow = [score_slowly(model, item) for item in asked]
    fast = score(model, asked)
    assert logprobs(fast) == pytest.approx(logprobs(slow), abs=1e-3)
    assert [each.predictions() for each in fast] == [each.predictions() for each in slow]
