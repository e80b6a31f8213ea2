"""Items that stand in a corpus: planted ones are found, no others, against a plain search."""

import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolforge import cli
from smolforge.config import Data
from smolforge.data.corpus import SPLITS, DocumentDecoder
from smolforge.data.prepare.build import prepare
from smolforge.evaluation.contamination import find_overlaps, words_of
from smolforge.evaluation.multiple_choice import Item
from smolforge.evaluation.tasks import Task
from smolforge.testing import sentences, tiny_tokenizer

FEW = [
    "a",
    "B",
    "b",
    "\u00e9",
    "E\u0301",
    "\u4f60",
    "it's",
    "\u00abso\u00bb",
    "-",
    "...",
    "\u0391\u03a3",
    "\u0130",
    "c\u2028d",
]
TEXTS = st.lists(st.sampled_from(FEW), max_size=12).map(" ".join) | st.text(max_size=20)


def plainly(item, documents, size):
    """(n-grams found, all) by comparing every n-gram with every place of every document."""
    plain = [
        "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS").split()
        for text in [f"{item.queries[0]} {item.choices[item.gold]}", *documents]
    ]
    words, length = plain[0], min(size, len(plain[0]))
    ngrams = [words[at : at + length] for at in range(len(words) - length + 1)] if words else []
    there = [text[at : at + length] for text in plain[1:] for at in range(len(text) - length + 1)]
    return sum(ngram in there for ngram in ngrams), len(ngrams)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, max_size=4), st.integers(1, 5), st.integers(1, 9))
def test_overlap_equals_a_plain_search(queries, documents, size, at_once):
    items = [Item(str(number), (query,), ("wrong", "b a"), 1) for number, query in enumerate(queries)]
    texts = []
    for document in documents:
        starts = range(0, max(1, len(document)), at_once)
        texts += [(document[at : at + at_once], at + at_once >= len(document)) for at in starts]
    found = find_overlaps([Task("one", items[:1], ""), Task("rest", items[1:] or items, "")], texts, size)
    expected = {item.id: plainly(item, documents, size) for item in items}
    for name, group in (("one", items[:1]), ("rest", items[1:] or items)):
        shared = {each.id: (each.matched, each.total) for each in found[name].shared}
        assert shared == {item.id: expected[item.id] for item in group if expected[item.id][0]}
        worst = [each.matched / each.total for each in found[name].shared]
        assert worst == sorted(worst, reverse=True)
        assert found[name].items == len(group)


def test_words_of_ignores_punctuation_and_case():
    assert words_of("It's  \u00abSO\u00bb, 3.5 % -- \u00c9t\u00e9!") == ["its", "so", "35", "\u00e9t\u00e9"]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=30), st.text(max_size=40))
def test_pieces_join_to_the_text(sizes, text):
    tokenizer = tiny_tokenizer()
    ids, pieces, told = tokenizer.encode(text), DocumentDecoder(tokenizer), ""
    for size in sizes:
        told += pieces.push(ids[:size], False)
        ids = ids[size:]
    assert told + pieces.push(ids, True) == tokenizer.decode(tokenizer.encode(text))


PLANTED = "One two three four five six seven eight nine ten eleven twelve, thirteen fourteen."


@pytest.fixture
def corpus(tmp_path):
    """An item is in one document, another begins at the end of a document and ends at the beginning of the next."""
    half = PLANTED.replace("e", "o").split()
    documents = [sentences(3), f"before. {PLANTED.upper()} behind", " ".join(half[:7]), " ".join(half[7:]), "so it"]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return prepare(Data(sources=(str(path),), held_out=0), tmp_path / "corpus", tiny_tokenizer())


@pytest.fixture
def items(tmp_path):
    half = PLANTED.replace("e", "o")
    lines = [
        {"id": "across", "query": half, "choices": ["x"], "gold": 0},
        {"id": "planted", "query": f"Question: {PLANTED[:-10]}", "choices": ["no", "fourteen"], "gold": 1},
        {"id": "short", "query": "So", "choices": ["it!", "no"], "gold": 0},
        {"id": "wrong", "query": "so", "choices": ["it", "is not there"], "gold": 1},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "mine.jsonl")


@pytest.mark.parametrize("at_once", [3, 1 << 16])
def test_overlap_finds_planted_items(corpus, items, at_once):
    from smolforge.evaluation.tasks import load_task

    texts = [(text, ends) for split in SPLITS for text, ends, _ in corpus.texts(split, at_once)]
    found = find_overlaps([load_task(items)], texts)["mine"]
    assert [each.id for each in found.shared] == ["short", "planted"]
    assert found.shared[1].ngram == re.sub(r"[,.]", "", PLANTED.lower()).removesuffix(" fourteen")
    assert (found.shared[1].matched, found.shared[1].total) == (2, 3)
    assert (found.size, found.items, found.short, found.share) == (13, 4, 2, 0.5)


def call(capsys, *words):
    code = cli.run(["inspect", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_inspect_tasks_reports_the_overlap(capsys, corpus, items, tmp_path):
    code, out, _ = call(capsys, corpus.folder, "--tasks", items, "--json")
    assert code == 0
    mine = json.loads(out)["overlap"]["mine"]
    assert (mine["share"], mine["ngram_words"], mine["ids"]) == (0.5, 13, ["short", "planted"])
    code, out, _ = call(capsys, corpus.folder, "--tasks", items)
    assert "mine: 2 of 4 items (50.0%) share 13 words in a row with this corpus; 2 have fewer words" in out
    assert '  planted: 2 of 3 n-grams, as "one two three' in out


@pytest.mark.parametrize(
    ("tasks", "code", "said"),
    [
        ("helaswag", 2, "Did you mean hellaswag?"),
        ("gone.jsonl", 3, "there is no file of items at gone.jsonl"),
        (",", 2, "there is no task to look for"),
    ],
)
def test_inspect_tasks_reports_mistakes_in_one_sentence(capsys, corpus, tasks, code, said):
    found, _, err = call(capsys, corpus.folder, "--tasks", tasks)
    assert (found, said in err) == (code, True)


def test_inspect_tasks_needs_a_corpus(capsys, items):
    code, _, err = call(capsys, "nano", "--tasks", items)
    assert code == 2
    assert "--tasks is for a prepared corpus; nano is none" in err
