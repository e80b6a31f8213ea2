"""Documents, corpora and batches: nothing lost, nothing twice, nothing leaked, nothing remembered."""

import json
from collections import Counter
from itertools import count, islice

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.config import Data
from smolforge.data.batches import IGNORE_INDEX, TokenWindows, iterate_batches, shuffled_index
from smolforge.data.corpus import HELD_OUT, TRAIN, Corpus, Tokens
from smolforge.data.prepare import merge
from smolforge.data.prepare.build import prepare
from smolforge.data.prepare.document_stream import documents
from smolforge.data.prepare.documents import python_docs
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.testing import sentences, tiny_tokenizer
from smolforge.tokenizer import Tokenizer, byte_symbols


def made(tmp_path, tokenizer, sources, **settings):
    return prepare(Data(sources=tuple(map(str, sources)), **settings), tmp_path / "corpus", tokenizer)


def texts_of(corpus, split):
    """Documents of a split, read back through the index."""
    ids = corpus.tokens(split)[:]
    ends = np.concatenate([np.fromfile(path, "<u8") for path in sorted((corpus.folder / split).glob("*.index"))])
    tokenizer = corpus.tokenizer()
    parts = np.split(ids, ends.astype(np.int64)[:-1])
    assert all(part[-1] == tokenizer.eos_id for part in parts)
    return [tokenizer.decode(part[:-1].tolist()) for part in parts]


# Documents


def test_documents_are_read_from_text_jsonl_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes("wíth\r\nends\r\n".encode())
    (tmp_path / "sub" / "b.md").write_text("two")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "x": 1}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\0\1")
    read = lambda source: [document.text for document in documents(str(source), Data())]  # noqa: E731
    assert read(tmp_path / "a.txt") == ["wíth\r\nends\r\n"]
    assert read(tmp_path) == ["wíth\r\nends\r\n", "two", "three", "four"]
    assert read(tmp_path / "**" / "*.md") == ["two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", b"a\0b", "x.txt is not text: it has a zero byte at 1"),
        ("x.txt", b"caf\xe9", "x.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2 has no text under the key 'text'"),
        ("x.jsonl", b'{"text": "a"}\n{nope}\n', "line 2 is not JSON"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "line 1 has half of a surrogate pair"),
        ("x.jsonl", b"[1]\n", "line 1 has no text under the key 'text'"),
        ("x.txt", b"", "is empty"),
        ("x.txt", b" \n \n", "nothing but white space"),
    ],
)
def test_prepare_names_invalid_sources(tmp_path, tokenizer, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidFileError, match=said):
        made(tmp_path, tokenizer, [tmp_path / name])
    assert not (tmp_path / "corpus").exists()


def test_documents_names_missing_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidFileError, match="there is no file, directory or match"):
        list(documents(str(tmp_path / "nope.txt"), Data()))
    with pytest.raises(InvalidFileError, match="there is no text in"):
        list(documents(str(tmp_path / "empty"), Data()))


def test_python_docs_contain_the_documentation():
    found = python_docs()
    groups = {document.group for document in found}
    assert sum(len(document.text) for document in found) > 1_500_000
    assert {"pydoc_data", "asyncio", "json"} <= groups
    assert not {"test", "site-packages"} & groups
    assert any("Event loop" in document.text for document in found if document.group == "asyncio")


# Corpora


def test_corpus_has_each_document_once_with_its_end(tmp_path, tokenizer):
    kept = [f"document {number} {sentences(1, number)}" for number in range(50)]
    lines = [{"text": text} for text in [*kept, kept[3], "   ", kept[7]]]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = made(tmp_path, tokenizer, [tmp_path / "x.jsonl"])
    found = texts_of(corpus, TRAIN) + texts_of(corpus, HELD_OUT)
    assert Counter(found) == Counter(kept)
    for split in (TRAIN, HELD_OUT):
        assert corpus.size(split)["bytes"] == sum(len(text.encode()) for text in texts_of(corpus, split))
        assert corpus.size(split)["documents"] == len(texts_of(corpus, split))


def test_split_keeps_groups_together(tmp_path, tokenizer):
    lines = [
        {"text": f"{group} {sentences(3, 9 * number)}", "of": group}
        for number in range(90)
        for group in [f"g{number % 30}"]
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = made(tmp_path, tokenizer, [tmp_path / "x.jsonl"], group_key="of", held_out=0.2)
    group_of = lambda texts: {text.split()[0] for text in texts}  # noqa: E731
    train, held = group_of(texts_of(corpus, TRAIN)), group_of(texts_of(corpus, HELD_OUT))
    assert not train & held
    assert train | held == {f"g{number}" for number in range(30)}
    share = corpus.size(HELD_OUT)["bytes"] / (corpus.size(HELD_OUT)["bytes"] + corpus.size(TRAIN)["bytes"])
    assert 0.1 < share <= 0.21


@pytest.mark.parametrize("names", ["x", "xy"])
def test_split_keeps_few_groups_together_across_sources(tmp_path, tokenizer, names):
    for name, start in (("x", 0), ("y", 300)):
        lines = [{"text": f"g{n % 9} {sentences(2, start + 2 * n)}", "of": f"g{n % 9}"} for n in range(45)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = made(tmp_path, tokenizer, [tmp_path / f"{name}.jsonl" for name in names], group_key="of", held_out=0.3)
    train, held = ({text.split()[0] for text in texts_of(corpus, split)} for split in (TRAIN, HELD_OUT))
    assert held and not train & held
    assert train | held == {f"g{number}" for number in range(9)}


def test_split_of_a_single_file_holds_out_its_end(tmp_path, tokenizer, text_file):
    corpus = made(tmp_path, tokenizer, [text_file])
    (train,), (held,) = texts_of(corpus, TRAIN), texts_of(corpus, HELD_OUT)
    assert train + held == text_file.read_text()
    assert train.endswith("\n")
    assert len(held) / len(train + held) == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("text", ["Title\n" + "x" * 50_000, "字" * 10_000, "one word " * 5000])
def test_split_of_a_single_file_works_for_any_lines(tmp_path, tokenizer, text):
    (tmp_path / "x.txt").write_text(text)
    corpus = made(tmp_path, tokenizer, [tmp_path / "x.txt"])
    assert len(corpus.text(HELD_OUT)) / len(text) == pytest.approx(0.05, abs=0.03)
    assert corpus.text(TRAIN) + corpus.text(HELD_OUT) == text


@pytest.mark.parametrize("limit", [50, 1000, 2500])
def test_token_limit_holds_for_both_splits(tmp_path, tokenizer, text_file, limit):
    corpus = prepare(Data(sources=(str(text_file),), held_out=0.1), tmp_path / "corpus", tokenizer, max_tokens=limit)
    assert corpus.size(TRAIN)["tokens"] == limit * 9 // 10
    assert corpus.size(HELD_OUT)["tokens"] == limit // 10
    for split in (TRAIN, HELD_OUT):
        assert corpus.size(split)["bytes"] == sum(len(text.encode()) for text in texts_of(corpus, split))


def test_prepare_detects_changed_files(tmp_path, tokenizer, text_file):
    made(tmp_path, tokenizer, [text_file])
    text_file.write_text(sentences(310))
    with pytest.raises(ConfigError, match="from files that changed since"):
        made(tmp_path, tokenizer, [text_file])


def test_split_of_zero_holds_out_nothing(tmp_path, tokenizer, text_file):
    corpus = made(tmp_path, tokenizer, [text_file], held_out=0.0)
    assert corpus.size(HELD_OUT) == {"documents": 0, "tokens": 0, "bytes": 0}
    assert texts_of(corpus, TRAIN) == [text_file.read_text()]


def test_tokenizer_training_excludes_the_validation_split(tmp_path, text_file):
    text_file.write_text(sentences(400) + "zyxwzyxw " * 200)
    corpus = prepare(Data(sources=(str(text_file),), held_out=0.1), tmp_path / "corpus", None, vocab_size=400)
    assert "zyxw" in corpus.text(HELD_OUT)
    assert not any("zyx" in word for word in corpus.tokenizer().backend.get_vocab())


def test_prepare_reuses_the_same_corpus_and_refuses_others(tmp_path, tokenizer, text_file):
    first = made(tmp_path, tokenizer, [text_file])
    written = (first.folder / "train" / "00000.ds").stat().st_mtime_ns
    again = made(tmp_path, tokenizer, [text_file])
    assert (again.fingerprint, (again.folder / "train" / "00000.ds").stat().st_mtime_ns) == (first.fingerprint, written)
    with pytest.raises(ConfigError, match="made with other settings"):
        made(tmp_path, tokenizer, [text_file], held_out=0.2)


def test_corpus_detects_corrupted_files(tmp_path, tokenizer, text_file):
    corpus = made(tmp_path, tokenizer, [text_file])
    shard = corpus.folder / "train" / "00000.ds"
    index = shard.with_name("00000.ds.index")
    whole = index.read_bytes()
    index.write_bytes(whole[:-8])
    with pytest.raises(InvalidFileError, match=r"bytes of ends of documents where corpus\.json says"):
        Corpus.open(corpus.folder)
    index.write_bytes(whole)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(
        InvalidFileError, match=r"bytes of tokens where corpus\.json says .*; delete the corpus, and prepare it"
    ):
        Corpus.open(corpus.folder)
    (corpus.folder / "corpus.json").write_text("{}")
    with pytest.raises(InvalidFileError, match=r"corpus\.json is broken"):
        Corpus.open(corpus.folder)


def test_shards_are_read_by_datatrove(tmp_path, tokenizer, text_file, monkeypatch):
    from datatrove.utils.dataset import DatatroveFileDataset

    monkeypatch.setattr(merge, "SHARD_TOKENS", 1000)
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": sentences(4, 4 * n)}) for n in range(60)))
    corpus = made(tmp_path, tokenizer, [tmp_path / "x.jsonl"], held_out=0.0)
    shards = sorted((corpus.folder / "train").glob("*.ds"))
    assert len(shards) > 2
    ids, start = corpus.tokens(TRAIN)[:], 0
    for shard in shards:
        theirs = DatatroveFileDataset(str(shard), seq_len=15, token_size=2)
        for number in range(len(theirs)):
            assert theirs[number]["input_ids"].tolist() == ids[start : start + 16].tolist()
            start += 16
        start = (start - len(theirs) * 16) + shard.stat().st_size // 2


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 50), st.integers(0, 50))
def test_shards_read_as_one_array(lengths, start, length):
    whole = np.arange(sum(lengths), dtype="<u2")
    tokens = Tokens(np.split(whole, np.cumsum(lengths)[:-1]))
    assert tokens[start : start + length].tolist() == whole[start : start + length].tolist()


# Batches


@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 5))
def test_shuffled_index_is_a_permutation(count, seed, epoch):
    order = [shuffled_index(place, count, seed, epoch=epoch) for place in range(count)]
    assert sorted(order) == list(range(count))


def test_shuffled_index_differs_by_epoch_and_seed():
    orders = {
        tuple(shuffled_index(place, 100, seed, epoch=epoch) for place in range(100))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 20), st.integers(0, 99))
def test_token_windows_predict_each_token_once_per_epoch(total, length, seed):
    if total <= length:
        return
    windows = TokenWindows(Tokens([np.arange(total)]), length, seed)
    seen: Counter[int] = Counter()
    for position in range(windows.count):
        ids, labels = windows.window(position)
        counted = labels != IGNORE_INDEX
        assert (labels[counted] == ids[counted] + 1).all()
        seen.update(labels[counted].tolist())
    assert seen == Counter(range(1, total))


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_do_not_depend_on_workers_or_restarts(workers):
    windows = TokenWindows(Tokens([np.arange(1000)]), 16, seed=5)
    straight = list(islice(iterate_batches(windows, count(), 3, num_workers=0), 60))
    for first in (0, 7, 41):
        for batch, expected in zip(
            iterate_batches(windows, count(first), 3, num_workers=workers), straight[first:], strict=False
        ):
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(batch.labels, expected.labels)


def test_token_windows_refuse_a_corpus_below_one_window():
    with pytest.raises(InvalidFileError, match="the corpus has 16 training tokens, which is less than one window"):
        TokenWindows(Tokens([np.arange(16)]), 16, 0)


def test_lost_bytes_are_counted_and_logged(tmp_path, caplog):
    """With a vocabulary like the published one, which has no symbol for some control characters."""
    pipeline = json.loads(tiny_tokenizer().backend.to_str())
    symbol = byte_symbols()[0x04]
    pipeline["model"]["vocab"] = {
        token: number for token, number in pipeline["model"]["vocab"].items() if token != symbol
    }
    poorer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(pipeline)))
    assert poorer.missing_bytes == b"\x04"
    source = tmp_path / "text.txt"
    source.write_text(sentences(30) + "\x04 and \x04\n")
    made = prepare(Data(sources=(str(source),), held_out=0), tmp_path / "corpus", poorer)
    assert made.metadata["lost_bytes"] == {"04": 2}
    assert "2 bytes of the text (04) have no symbol in this tokenizer and are left out" in caplog.text


GOLDEN = {
    "lines": "df8f41ad7b4e4472",
    "groups": "72f205f5bdaa23cd",
    "tail": "cfe8f9cf71d133c6",
    "limit": "66b37901b709ecce",
    "trained": "22198b2d6427ad79",
    "chat": "b8cbcf92df19838e",
    "pairs": "80181d4a0357e22d",
}
"""Fingerprints that corpora of these sources had before sources were read in parts."""


def golden_cases(folder):
    """Settings, ids of a tokenizer to train, and a limit, by name."""
    lines = [{"text": sentences(3, n % 50) + f" {n % 50}", "of": f"g{n % 30}"} for n in range(90)]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"text": "  ", "of": "g1"}])))
    (folder / "one.txt").write_text(sentences(300))
    (folder / "texts").mkdir()
    for n in range(25):
        (folder / "texts" / f"{n}.md").write_text(sentences(4, n) + f"\n\nnumber {n}\n")
    chats = [{"prompt": f"say {n % 28}", "completion": sentences(1, n % 28)} for n in range(40)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    pairs = [{"prompt": f"say {n}", "chosen": sentences(1, n), "rejected": "no"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    sources = lambda *names: {"sources": tuple(str(folder / name) for name in names)}  # noqa: E731
    return {
        "lines": (sources("x.jsonl"), None, None),
        "groups": (sources("x.jsonl") | {"group_key": "of", "held_out": 0.2}, None, None),
        "tail": (sources("one.txt"), None, None),
        "limit": (sources("texts", "one.txt") | {"held_out": 0.1}, None, 2500),
        "trained": (sources("texts", "x.jsonl"), 400, None),
        "chat": (sources("chat.jsonl") | {"format": "chat"}, None, 700),
        "pairs": (sources("pairs.jsonl") | {"format": "pairs"}, None, None),
    }


def test_corpus_fingerprints_equal_earlier_versions(tmp_path, tokenizer):
    for name, (data, vocab, limit) in golden_cases(tmp_path).items():
        corpus = prepare(
            Data(**data), tmp_path / name, None if vocab else tokenizer, vocab_size=vocab or 0, max_tokens=limit
        )
        assert corpus.fingerprint.startswith(GOLDEN[name]), name
        asked = corpus.metadata["request"]["data"]
        assert asked.keys() == {"sources", "format", "text_key", "group_key", "held_out"}, "a run of before finds it"
