"""Sources of every kind: the same documents whatever they are packed in, and a sentence for what is broken."""

import gzip
import http.server
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pyarrow as arrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from test_data import texts_of

from smolforge.config import Data
from smolforge.config.base import validate_settings
from smolforge.data.corpus import HELD_OUT, TRAIN, Corpus
from smolforge.data.prepare import build, jobs, merge
from smolforge.data.prepare.build import prepare, work_folder
from smolforge.data.prepare.dedup import is_first_occurrence
from smolforge.data.prepare.document_stream import documents
from smolforge.data.sources import hub as streamed
from smolforge.data.sources import jsonl, parquet, remote_text, stamp, text
from smolforge.data.sources import size as size_of
from smolforge.data.sources.columns import row_filter as condition
from smolforge.data.sources.types import SourceRow
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.testing import disk, sentences, tiny_tokenizer
from smolforge.tokenizer import Tokenizer
from smolforge.tokenizer.chat import CHATML

NAME = "org/texts"


def records(count=60):
    return [
        {"text": f"{number} {sentences(2, number)}", "score": number % 5, "of": number % 7} for number in range(count)
    ]


def packed(rows=None):
    return "\n".join(map(json.dumps, records() if rows is None else rows)).encode()


def table(path, rows=None, **settings):
    arrow.parquet.write_table(arrow.Table.from_pylist(records() if rows is None else rows), path, **settings)
    return path


def made(folder, tokenizer, *sources, limit=None, workers=1, **settings):
    data = Data(sources=tuple(map(str, sources)), **settings)
    return prepare(data, folder, tokenizer, max_tokens=limit, workers=workers)


def all_texts(corpus):
    return texts_of(corpus, TRAIN) + texts_of(corpus, HELD_OUT)


# What is read


def write(path, content):
    path.write_bytes(content)
    return path


def gz(content):
    return gzip.compress(content, mtime=0)


def test_prepare_gives_the_same_corpus_for_gzip_zstd_and_parquet(tmp_path, tokenizer):
    raw = packed()
    half = len(raw) // 2
    found = [
        write(tmp_path / "a.jsonl.gz", gz(raw[:half]) + gz(raw[half:])),
        write(tmp_path / "b.jsonl.zst", zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])),
        table(tmp_path / "c.parquet", row_group_size=7),
    ]
    corpora = [made(tmp_path / f"corpus{number}", tokenizer, path) for number, path in enumerate(found)]
    assert Counter(all_texts(corpora[0])) == Counter(row["text"] for row in records())
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    together = made(tmp_path / "together", tokenizer, tmp_path / "*.*")
    assert together.fingerprint == corpora[0].fingerprint, "the same again is left out"
    assert together.metadata["dropped"]["repeated"] == 120


def test_split_holds_out_the_same_texts_in_every_source(tmp_path, tokenizer):
    whole = made(tmp_path / "a", tokenizer, table(tmp_path / "a.parquet"), held_out=0.3)
    part = made(tmp_path / "b", tokenizer, table(tmp_path / "b.parquet", records()[20:40]), held_out=0.3)
    assert 5 < len(texts_of(whole, HELD_OUT)) < 30
    assert set(texts_of(part, HELD_OUT)) == set(texts_of(whole, HELD_OUT)) & {row["text"] for row in records()[20:40]}


def test_split_keeps_groups_of_a_table_together(tmp_path, tokenizer):
    corpus = made(tmp_path / "a", tokenizer, table(tmp_path / "a.parquet"), held_out=0.4, group_key="of")
    group_of = {row["text"]: row["of"] for row in records()}
    train, held = ({group_of[each] for each in texts_of(corpus, split)} for split in (TRAIN, HELD_OUT))
    assert not train & held
    assert train | held == set(range(7))


def test_columns_build_the_text_and_filter_rows(tmp_path):
    rows = [{"title": "A", "text": "x", "meta": {"score": 3.5}}, {"title": None, "text": "y", "meta": {"score": 2}}]
    rows[0]["parts"], rows[1]["parts"] = ["a", None, "b"], []
    read = lambda **settings: [  # noqa: E731
        each.text for each in documents(str(table(tmp_path / "a.parquet", rows)), Data(**settings))
    ]
    assert read() == ["x", "y"]
    assert read(text_template="{title}: {text}!") == ["A: x!", ": y!"]
    assert read(filters=("meta.score >= 3",)) == ["x"]
    assert read(filters=("meta.score < 3", "text == y")) == ["y"]
    assert read(filters=("title != B",)) == ["x"], "nothing is unequal to what is not there"
    assert read(text_key="title") == ["A", ""]
    assert read(text_key="parts") == ["a\nb", ""], "texts between pictures are one"
    assert read(text_template="{title}{text}", min_characters=2) == ["Ax"]
    assert read(text_template="{title}{text}", max_characters=1) == ["y"]


@pytest.mark.parametrize(
    ("said", "value", "holds"),
    [
        ("a >= 3", 3, True), ("a >= 3", 2.9, False), ("a<0.5", 0.4, True), ("a == en", "en", True),
        ("a == 'e n'", "e n", True), ("a != en", "de", True), ("a == 3", True, False), ("a == true", True, True),
        ("a > 3", None, False),
    ],
)  # fmt: skip
def test_filters_compare_values(said, value, holds):
    assert condition(said)(SourceRow({"a": value}, "x", "x")) is holds


def test_data_config_refuses_contradictory_settings():
    for settings, said in [
        ({"filters": ["score"]}, "it should be a list of a condition such as int_score >= 3"),
        ({"text_template": "no column"}, "text with the name of a column in it"),
        ({"encoding_key": "x"}, "encoding_key is of what text_url fetches"),
        ({"min_characters": 9, "max_characters": 5}, "max_characters (5) is below min_characters (9)"),
        ({"text_template": "{a}", "text_url": "http://x/{a}"}, "both say what the text is"),
    ]:
        with pytest.raises(ConfigError) as error:
            validate_settings(Data, settings)
        assert said in str(error.value)


def test_large_text_in_pieces_gives_the_same_tokens(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + (sentences(700) + "\n\n  end\n\n" + sentences(50)).encode())
    for held_out in (0.0, 0.05):
        whole = made(tmp_path / f"whole{held_out}", tokenizer, path, held_out=held_out)
        with monkeypatch.context() as patch:
            patch.setattr(text, "LARGE_BYTES", 1000)
            patch.setattr(text, "PIECE_BYTES", 900)
            patch.setattr(jobs, "CHUNK_CHARACTERS", 5000)
            patch.setattr(jobs, "BATCH_CHARACTERS", 1000)
            assert len(list(text.pieces(path))) > 20
            pieces = made(tmp_path / f"pieces{held_out}", tokenizer, path, held_out=held_out)
        assert pieces.fingerprint == whole.fingerprint
        assert pieces.metadata["splits"] == whole.metadata["splits"]


@pytest.mark.parametrize("limit", [400, 1000, 2500])
def test_large_text_ends_at_the_token_limit(tmp_path, tokenizer, monkeypatch, limit):
    path = write(tmp_path / "a.txt", sentences(700).encode())
    whole = made(tmp_path / "whole", tokenizer, path, limit=limit)
    monkeypatch.setattr(text, "LARGE_BYTES", 1000)
    monkeypatch.setattr(text, "PIECE_BYTES", 900)
    pieces = made(tmp_path / "pieces", tokenizer, path, limit=limit)
    assert pieces.fingerprint == whole.fingerprint
    assert pieces.metadata["splits"] == whole.metadata["splits"]
    for split in (TRAIN, HELD_OUT):
        assert pieces.ends(split).tolist() == whole.ends(split).tolist() == [whole.size(split)["tokens"]]


def test_large_text_length_limits_apply_to_the_whole_text(tmp_path, tokenizer, monkeypatch):
    large, small = sentences(300), sentences(3, 900)
    for name, content in (("a", large), ("b", small)):
        write(tmp_path / f"{name}.txt", content.encode())
    monkeypatch.setattr(text, "LARGE_BYTES", 1000)
    monkeypatch.setattr(text, "PIECE_BYTES", 900)
    without = made(tmp_path / "without", tokenizer, tmp_path / "*.txt", max_characters=len(large) - 1)
    assert "".join(all_texts(without)) == small
    assert without.metadata["dropped"]["too_long"] == 1
    limits = {"min_characters": 100, "max_characters": len(large)}
    alone = made(tmp_path / "alone", tokenizer, tmp_path / "a.txt", held_out=0.0, **limits)
    assert texts_of(alone, TRAIN) == [large], "its last piece is a line"


def test_large_text_pieces_stay_in_one_shard(tmp_path, tokenizer, monkeypatch):
    sources = [write(tmp_path / f"{name}.txt", sentences(lines).encode()) for name, lines in (("a", 300), ("b", 60))]
    monkeypatch.setattr(text, "LARGE_BYTES", 1000)
    monkeypatch.setattr(text, "PIECE_BYTES", 900)
    monkeypatch.setattr(jobs, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(jobs, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(merge, "SHARD_TOKENS", 600)
    corpus = made(tmp_path / "corpus", tokenizer, *sources, held_out=0.0)
    assert len(list((corpus.folder / TRAIN).glob("*.ds"))) == 2
    ids, ends = corpus.tokens(TRAIN)[:], corpus.ends(TRAIN)
    assert np.flatnonzero(ids == tokenizer.eos_id).tolist() == (ends - 1).tolist()
    assert [tokenizer.decode(each[:-1].tolist()) for each in np.split(ids, ends[:-1])] == [
        sentences(300),
        sentences(60),
    ]


@pytest.mark.parametrize("letters", ["ж", "字。", "あ\u3000", "a\u00a0", "\u2003x", "é\r", "\ufeff"])
def test_large_text_is_never_cut_inside_a_token_in_any_script(tmp_path, tokenizer, monkeypatch, letters):
    lines = [f"{letters * (1 + number % 3)}\nw{letters[::-1]}\n" for number in range(300)]
    path = write(tmp_path / "a.txt", "".join(lines).encode())
    monkeypatch.setattr(text, "PIECE_BYTES", 90)
    found = [piece.decode() for piece, _ in text.pieces(path)]
    assert "".join(found) == "".join(lines)
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str
    assert [word for piece in found for word, _ in words(piece)] == [word for word, _ in words("".join(lines))]
    assert len(found) > 20


@pytest.mark.parametrize("line", [" = A title = \r\n \r\n", "A line.\r\n", "A paragraph.\n\n", " a , b \n"])
def test_large_text_is_cut_at_any_line_ending(tmp_path, tokenizer, monkeypatch, line):
    path = write(tmp_path / "a.txt", (line * 300).encode())
    monkeypatch.setattr(text, "PIECE_BYTES", 90)
    found = [piece.decode() for piece, _ in text.pieces(path)]
    assert "".join(found) == line * 300
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str
    assert [word for piece in found for word, _ in words(piece)] == [word for word, _ in words(line * 300)]
    assert len(found) > 20


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 40), st.integers(0, 9))
def test_jsonl_parts_read_each_line_once(tmp_path_factory, lengths, part_bytes, end):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(b"x" * length for length in lengths) + b"\n" * (end % 2))
    size = path.stat().st_size
    found = [
        line.strip()
        for start in range(0, size, part_bytes)
        for _, line in jsonl.read_lines(path, start, min(start + part_bytes, size))
    ]
    assert found == [b"x" * length for length in lengths if length]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=40), st.integers(1, 7))
def test_dedup_keeps_the_first_of_equal_digests(pairs, compared):
    from smolforge.data.prepare import dedup

    digests = np.array(pairs, "<u8").reshape(-1, 2)
    before = dedup.DIGESTS_PER_SORT
    dedup.DIGESTS_PER_SORT = compared
    try:
        found = is_first_occurrence(digests)
    finally:
        dedup.DIGESTS_PER_SORT = before
    assert found.tolist() == [pair not in pairs[:place] for place, pair in enumerate(pairs)]


# Tokens that are ready


def test_datatrove_tokens_are_used_unchanged(tmp_path, tokenizer):
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer.save(tmp_path / "tokenizer")
    step = DocumentTokenizer(
        str(tmp_path / "theirs"),
        tokenizer_name_or_path=str(tmp_path / "tokenizer" / "tokenizer.json"),
        eos_token=tokenizer.eos_token,
        shuffle_documents=False,
    )
    texts = [row["text"] for row in records(30)]
    step.run((Document(each, str(number)) for number, each in enumerate(texts)), 0, 1)
    corpus = made(tmp_path / "corpus", tokenizer, tmp_path / "theirs", held_out=0.2)
    assert Counter(all_texts(corpus)) == Counter(texts)
    assert sum(corpus.size(split)["bytes"] for split in (TRAIN, HELD_OUT)) == sum(len(each.encode()) for each in texts)
    with pytest.raises(ConfigError, match="was made with another tokenizer"):
        made(tmp_path / "other", tiny_tokenizer(300), tmp_path / "theirs")
    with pytest.raises(ConfigError, match="--tokenizer names the tokenizer that made them"):
        made(tmp_path / "other", None, tmp_path / "theirs")
    shard = next((tmp_path / "theirs").glob("*.ds"))
    ids = np.fromfile(shard, "<u2")
    ids[3] = len(tokenizer)
    whole = shard.read_bytes()
    write(shard, ids.tobytes())
    with pytest.raises(InvalidFileError, match=r"document 0 has id \d+, and the tokenizer has [\d,]+; name its own"):
        made(tmp_path / "other", tokenizer, tmp_path / "theirs")
    write(shard, whole)
    write(shard, shard.read_bytes()[:-2])
    with pytest.raises(InvalidFileError, match="is damaged: it has not as many tokens"):
        made(tmp_path / "other", tokenizer, tmp_path / "theirs")


# What is broken


def cut_parquet(path):
    return write(path, table(path).read_bytes()[:-50])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", gz(packed())[:-100], "a.jsonl.gz is broken and cannot be unpacked"),
        ("a.jsonl.gz", b"no gzip at all", "cannot be unpacked (Not a gzipped file"),
        ("a.jsonl.zst", zstandard.compress(packed())[:-100], "cannot be unpacked (its end is missing)"),
        ("a.jsonl.zst", random.Random(0).randbytes(5000), "a.jsonl.zst is broken and cannot be unpacked"),
        ("a.jsonl.gz", gz(b'{"text": "caf\xe9"}\n'), "line 1 is not UTF-8 text: byte 13 of it is 0xe9"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1 is not UTF-8 text: byte 13 of it is 0xe9"),
        ("a.jsonl.gz", gz(b""), "is empty"),
        ("a.jsonl", b'{"text": "' + b"a" * 5000 + b'"}\n', "has a line of more than 0 MiB"),
        ("a.txt", b"a" * 9000, "has more than 0 MiB without a line end"),
        ("a.jsonl", packed([{"body": "x", "id": 1}]), "line 1 has no text under the key 'text'"),
        ("a.parquet", b"PAR1 no table", "a.parquet is no parquet file, or a broken one"),
    ],
)  # fmt: skip
def test_prepare_names_corrupted_files(tmp_path, tokenizer, monkeypatch, name, content, said):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 4000)
    monkeypatch.setattr(text, "LONGEST_LINE", 4000)
    monkeypatch.setattr(text, "LARGE_BYTES", 4000)
    monkeypatch.setattr(text, "PIECE_BYTES", 1000)
    with pytest.raises(InvalidFileError) as error:
        made(tmp_path / "corpus", tokenizer, write(tmp_path / name, content))
    assert said in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is left"


def test_parquet_errors_name_the_file_or_key(tmp_path, tokenizer):
    whole = table(tmp_path / "a.parquet", row_group_size=10).read_bytes()
    for content in (whole[:-50], whole[:200] + bytes(200) + whole[400:]):
        with pytest.raises(InvalidFileError, match=r"a\.parquet"):
            made(tmp_path / "corpus", tokenizer, write(tmp_path / "a.parquet", content))
    with pytest.raises(
        InvalidFileError, match=r"row 0 has no text under the key 'body'.*\(there are text, score, of\)"
    ):
        made(tmp_path / "corpus", tokenizer, table(tmp_path / "a.parquet"), text_key="body")
    with pytest.raises(InvalidFileError, match=r"has no key 'scor' \(data.filters\); it has .* Did you mean score\?"):
        made(tmp_path / "corpus", tokenizer, tmp_path / "a.parquet", filters=("scor > 1",))
    with pytest.raises(InvalidFileError, match=r"nothing but white space \(left out: 60 filtered\)"):
        made(tmp_path / "corpus", tokenizer, tmp_path / "a.parquet", filters=("score > 9",))
    with pytest.raises(ConfigError, match="compares 'en' .* with|compares"):
        made(tmp_path / "corpus", tokenizer, tmp_path / "a.parquet", filters=("score > low",))


# Work that goes on


@pytest.fixture
def small_parts(monkeypatch):
    """Parts and chunks of a few documents."""
    monkeypatch.setattr(parquet, "PART_BYTES", 1500)
    monkeypatch.setattr(jobs, "CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(jobs, "BATCH_CHARACTERS", 100)


def test_prepare_resumes_after_an_error_without_repeating_work(tmp_path, tokenizer, small_parts, monkeypatch):
    source = table(tmp_path / "a.parquet", records(200), row_group_size=20)
    whole = made(tmp_path / "whole", tokenizer, source)
    write_chunk, written = jobs.write_chunk, []

    def failing(*given, **named):
        if len(written) == 7:
            raise MissingResourceError("the disk is full")
        written.append(given)
        write_chunk(*given, **named)

    monkeypatch.setattr(jobs, "write_chunk", failing)
    with pytest.raises(MissingResourceError):
        made(tmp_path / "corpus", tokenizer, source)
    assert not (tmp_path / "corpus").exists()
    there = {path: path.stat().st_mtime_ns for path in work_folder(tmp_path / "corpus").rglob("facts.json")}
    assert len(there) == 7
    read, parts = [], jobs.read_part
    monkeypatch.setattr(jobs, "read_part", lambda *given: read.append(given) or parts(*given))
    monkeypatch.setattr(jobs, "write_chunk", write_chunk)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    corpus = made(tmp_path / "corpus", tokenizer, source)
    assert {path: path.stat().st_mtime_ns for path in there} == there, "no chunk is written twice"
    assert read[0][2] > 0, "it goes on in the middle of a part"
    assert corpus.fingerprint == whole.fingerprint
    assert corpus.metadata["splits"] == whole.metadata["splits"]
    assert corpus.metadata["dropped"] == whole.metadata["dropped"]


@pytest.mark.parametrize("limit", [None, 900])
def test_prepare_gives_the_same_corpus_with_two_workers(tmp_path, tokenizer, small_parts, limit):
    rows = records(90) + records(20)
    source = table(tmp_path / "a.parquet", rows, row_group_size=20)
    one, two = (made(tmp_path / f"of{workers}", tokenizer, source, limit=limit, workers=workers) for workers in (1, 2))
    assert one.fingerprint == two.fingerprint
    assert one.metadata["splits"] == two.metadata["splits"]
    if limit:
        assert sum(one.size(split)["tokens"] for split in (TRAIN, HELD_OUT)) in (limit, limit - 1)
        kept, known = all_texts(one), {row["text"] for row in rows}
        assert sum(each not in known for each in kept) <= 1, "the last one is cut"
    else:
        assert one.metadata["dropped"]["repeated"] == 20


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_token_budget_does_not_depend_on_batch_size(tmp_path, tokenizer, monkeypatch, held_out):
    """A short conversation behind the first long one that does not fit is not let in by a large batch."""
    talks = [{"prompt": "So?", "completion": sentences(40 if number % 10 == 5 else 1, number)} for number in range(60)]
    source = write(tmp_path / "a.jsonl.gz", gz(packed(talks)))
    found = []
    for characters in (0, 1 << 20):
        monkeypatch.setattr(jobs, "BATCH_CHARACTERS", characters)
        given = {"limit": 1000, "format": "chat", "held_out": held_out}
        found.append(made(tmp_path / f"by{characters}", tokenizer, source, **given).fingerprint)
    assert found[0] == found[1]


def test_workers_report_errors_in_the_same_words(tmp_path, tokenizer):
    good = table(tmp_path / "a.parquet")
    bad = write(tmp_path / "b.jsonl.gz", gz(packed())[:-9])
    with pytest.raises(InvalidFileError, match=r"b\.jsonl\.gz is broken"):
        made(tmp_path / "corpus", tokenizer, good, bad, workers=2)
    assert not (tmp_path / "corpus").exists()


KILLED = """
import sys, time
from pathlib import Path
from smolforge.config import Data
from smolforge.data.prepare import build, jobs
from smolforge.data.sources import parquet
from smolforge.tokenizer import Tokenizer
parquet.PART_BYTES, jobs.CHUNK_CHARACTERS, jobs.BATCH_CHARACTERS = 1500, 500, 100
def slow(counts):
    print(counts, flush=True)
    time.sleep(0.02)
build.prepare(Data(sources=(sys.argv[1],)), Path(sys.argv[2]), Tokenizer.load(Path(sys.argv[3])), report=slow)
"""


def test_prepare_resumes_after_sigkill(tmp_path, tokenizer, small_parts):
    tokenizer.save(tmp_path / "tokenizer")
    source = table(tmp_path / "a.parquet", records(150), row_group_size=20)
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "corpus"), str(tmp_path / "tokenizer")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(25):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "corpus").exists()
    assert len(list(work_folder(tmp_path / "corpus").rglob("facts.json"))) > 3
    told = []
    data = Data(sources=(str(source),))
    corpus = prepare(data, tmp_path / "corpus", tokenizer, report=told.append)
    assert told[0]["documents"] > 10, "it says at once what is done"
    assert corpus.fingerprint == prepare(data, tmp_path / "whole", tokenizer).fingerprint
    assert not work_folder(tmp_path / "corpus").exists()


def test_prepare_prints_one_line_on_ctrl_c_while_workers_start(tmp_path, tokenizer):
    """A terminal sends it to all processes of a command, also those that have hardly begun."""
    tokenizer.save(tmp_path / "tokenizer")
    for name in "ab":
        write(tmp_path / f"{name}.txt", sentences(50, ord(name)).encode())
    words = ["prepare", *map(str, tmp_path.glob("*.txt")), "--out", str(tmp_path / "c"), "--workers", "2"]
    child = subprocess.Popen(
        [sys.executable, "-m", "smolforge", *words, "--tokenizer", str(tmp_path / "tokenizer")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    me = psutil.Process(child.pid)
    while not any("spawn_main" in " ".join(each.cmdline()) for each in me.children()):
        assert child.poll() is None, "it ended before its workers began"
        time.sleep(0.01)
    for _ in range(10):
        for each in me.children():
            each.send_signal(signal.SIGINT)
        time.sleep(0.03)
    os.killpg(child.pid, signal.SIGINT)
    assert child.communicate()[0] == "smolforge: interrupted\n"
    assert child.returncode == 130


FAULTS = {"full": disk.failing, "gone": disk.crashing, "torn": partial(disk.crashing, torn=True)}


@pytest.mark.parametrize("fault", FAULTS)
def test_prepare_resumes_after_any_failed_disk_operation(tmp_path, tokenizer, fault):
    source = table(tmp_path / "a.parquet", records(12))
    folder = tmp_path / "there"
    folder.mkdir()
    make = partial(made, folder / "corpus", tokenizer, source)
    count = itertools.count()
    with disk.intercept(folder, lambda operation, go: (next(count), go(operation))[1]):
        whole = make().fingerprint
    total = next(count)
    for number in range(0, total, total // 8):
        shutil.rmtree(folder / "corpus")
        with suppress(MissingResourceError, disk.Crash), FAULTS[fault](folder, number):
            make()
        assert not (folder / "corpus").exists() or Corpus.open(folder / "corpus").fingerprint == whole
        assert make().fingerprint == whole
        assert not list(folder.glob(".*"))


def test_prepare_locks_out_a_second_process(tmp_path, tokenizer, text_file):
    work = work_folder(tmp_path / "corpus")
    work.mkdir()
    with jobs.lock_folder(work):
        with pytest.raises(ConfigError, match="another process prepares the same corpus"):
            made(tmp_path / "corpus", tokenizer, text_file)
        assert work.is_dir(), "it is the first one's"


def test_prepare_refuses_a_job_that_another_process_runs(tmp_path, tokenizer, text_file, monkeypatch):
    run = jobs.run_job

    def twice(task, tell):
        with jobs.lock_folder(task.work):
            run(task, tell)

    monkeypatch.setattr(jobs, "run_job", twice)
    with pytest.raises(ConfigError, match="another process prepares the same corpus"):
        made(tmp_path / "corpus", tokenizer, text_file)
    monkeypatch.setattr(jobs, "run_job", run)
    monkeypatch.setattr(jobs, "write_chunk", lambda folder, job, **_: run(job))
    with pytest.raises(ConfigError, match="another process prepares the same corpus"):
        made(tmp_path / "corpus", tokenizer, text_file)


def test_prepare_finds_a_corpus_made_by_another_process(tmp_path, tokenizer, text_file, monkeypatch):
    corpus = made(tmp_path / "corpus", tokenizer, text_file)
    already, asked = build.existing_corpus, []
    monkeypatch.setattr(
        build, "existing_corpus", lambda *given: asked.append(1) or (already(*given) if asked[1:] else None)
    )
    assert made(tmp_path / "corpus", tokenizer, text_file).fingerprint == corpus.fingerprint
    assert not work_folder(tmp_path / "corpus").exists()


def otherwise(tokenizer, **settings):
    return Tokenizer(tokenizer.backend, tokenizer.settings | settings)


def interrupted(*_, **__):
    raise MissingResourceError("the disk is full")


def test_prepare_never_mixes_two_chat_templates(tmp_path, tokenizer, monkeypatch):
    talks = [{"prompt": "So?", "completion": sentences(1, number)} for number in range(20)]
    make = partial(made, tmp_path / "corpus", format="chat")
    source = write(tmp_path / "a.jsonl", packed(talks))
    with monkeypatch.context() as patch, pytest.raises(MissingResourceError):
        patch.setattr(build, "write_corpus", interrupted)
        make(tokenizer, source)
    other = otherwise(tokenizer, chat_template=CHATML.replace("helpful", "brief"))
    whole = made(tmp_path / "whole", other, source, format="chat")
    assert made(tmp_path / "before", tokenizer, source, format="chat").fingerprint != whole.fingerprint
    assert make(other, source).fingerprint == whole.fingerprint


def test_prepare_refuses_another_end_of_text_token(tmp_path, tokenizer, text_file):
    corpus = made(tmp_path / "corpus", tokenizer, text_file)
    other = otherwise(tokenizer, eos_token="<|im_end|>")
    with pytest.raises(ConfigError, match="holds a corpus made with other settings"):
        made(tmp_path / "corpus", other, text_file)
    with pytest.raises(ConfigError, match="its documents end with id 0, and this one's end of text is 2"):
        made(tmp_path / "other", other, corpus.folder / TRAIN)


def test_prepare_job_refuses_another_tokenizer(tmp_path, tokenizer, text_file, monkeypatch):
    run = jobs.run_job

    def late(task, tell):
        tiny_tokenizer(300).save(task.work / "tokenizer")
        run(task, tell)

    monkeypatch.setattr(jobs, "run_job", late)
    with pytest.raises(ConfigError, match="is that of another tokenizer by now; run the same command again"):
        made(tmp_path / "corpus", tokenizer, text_file)


def test_prepare_refuses_a_source_that_changes_while_read(tmp_path, tokenizer):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", packed([{"text": f"{name} {sentences(2)}"}]))
    data = Data(sources=(str(tmp_path / "*.jsonl"),))

    def grow(_):
        write(tmp_path / "b.jsonl", packed([{"text": f"more {sentences(3)}"}]))

    with pytest.raises(InvalidFileError, match=r"jsonl' changed while it was read; run the same command again"):
        prepare(data, tmp_path / "corpus", tokenizer, report=grow)
    assert not (tmp_path / "corpus").exists()
    again = prepare(data, tmp_path / "corpus", tokenizer)
    assert again.fingerprint == prepare(data, tmp_path / "whole", tokenizer).fingerprint
    assert any("more" in each for each in all_texts(again))
    with pytest.raises(InvalidFileError, match=r"b\.jsonl cannot be read: No such file"):
        prepare(data, tmp_path / "lost", tokenizer, report=lambda _: (tmp_path / "b.jsonl").unlink(missing_ok=True))


def test_folder_source_ignores_hidden_files_and_own_shards(tmp_path, tokenizer):
    write(tmp_path / "a.txt", sentences(50).encode())
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "b.txt", b"hidden")
    corpus = made(tmp_path / "corpus", tokenizer, tmp_path)
    assert not any("hidden" in text for text in all_texts(corpus))
    assert made(tmp_path / "corpus", tokenizer, tmp_path).fingerprint == corpus.fingerprint, (
        "its own shards are no text"
    )


def test_prepare_refuses_a_chat_corpus_with_other_turn_ends(tmp_path, tokenizer):
    talks = [{"prompt": "So?", "completion": sentences(1, number)} for number in range(20)]
    source = write(tmp_path / "a.jsonl", packed(talks))
    corpus = made(tmp_path / "corpus", tokenizer, source, limit=300, format="chat")
    facts = json.loads((corpus.folder / "corpus.json").read_text())
    del facts["request"]["ends"]
    (corpus.folder / "corpus.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="holds a corpus made with other settings"):
        made(tmp_path / "corpus", tokenizer, source, limit=300, format="chat")


def test_token_limit_of_one_is_refused(tmp_path, tokenizer, text_file):
    with pytest.raises(
        ConfigError, match="1 is too low a limit of tokens for a document and its end; give a higher one"
    ):
        made(tmp_path / "corpus", tokenizer, text_file, limit=1)


# The Hub


@pytest.fixture
def quick(monkeypatch):
    """Retries that do not wait."""
    import datasets

    for name in ("READ_RETRY_INTERVAL", "READ_SERVER_UNAVAILABLE_RETRY_INTERVAL", "READ_RATE_LIMIT_RETRY_INTERVAL"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}", 0)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 2)
    monkeypatch.setattr(streamed, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def on_hub(hub, tmp_path, quick):
    """A data set of two files, with a card that tells its size."""
    rows = records(400)
    for number in range(2):
        table(tmp_path / f"{number}.parquet", rows[number * 200 :][:200], row_group_size=25)
    card = (
        "---\nconfigs:\n- config_name: small\n  data_files: data/*.parquet\n"
        "dataset_info:\n- config_name: small\n  features:\n  - name: text\n    dtype: string\n"
        "  - name: score\n    dtype: int64\n  - name: of\n    dtype: int64\n"
        "  splits:\n  - name: train\n    num_bytes: 25000\n    num_examples: 400\n  download_size: 9000\n"
        "  dataset_size: 25000\n---\n"
    )
    files = {f"data/train-{number}.parquet": tmp_path / f"{number}.parquet" for number in range(2)}
    hub.add(NAME, {"README.md": card.encode(), **files}, kind="dataset")
    return hub


def test_hub_dataset_is_streamed(on_hub, tmp_path, tokenizer):
    source = f"{NAME}:small"
    assert str(size_of(source, Data())) == "400 rows, 0.00 GB of data, 0.00 GB to download"
    assert len(stamp(source)[0]) == 40
    corpus = made(tmp_path / "corpus", tokenizer, source, filters=("score >= 1",))
    assert Counter(all_texts(corpus)) == Counter(row["text"] for row in records(400) if row["score"])
    on_hub.requests.clear()
    assert made(tmp_path / "little", tokenizer, source, limit=500).size(TRAIN)["tokens"] > 400
    assert not any("train-1.parquet" in each.path and each.method == "GET" for each in on_hub.requests)


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut_after": 700}])
def test_hub_dataset_survives_temporary_faults(on_hub, tmp_path, tokenizer, fault):
    whole = made(tmp_path / "whole", tokenizer, f"{NAME}:small")
    on_hub.fail(times=3, path_contains=".parquet", **fault)
    corpus = made(tmp_path / "corpus", tokenizer, f"{NAME}:small")
    assert corpus.fingerprint == whole.fingerprint


def test_hub_dataset_resumes_after_a_lasting_fault(on_hub, tmp_path, tokenizer, monkeypatch):
    whole = made(tmp_path / "whole", tokenizer, f"{NAME}:small")
    monkeypatch.setattr(jobs, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(jobs, "BATCH_CHARACTERS", 500)
    on_hub.fail(times=1000, status=500, path_contains="train-1.parquet")
    with pytest.raises(
        MissingResourceError,
        match=f"{NAME}:small cannot be read: http.* answers with status 500; .*goes on from where it was",
    ):
        made(tmp_path / "corpus", tokenizer, f"{NAME}:small")
    assert not (tmp_path / "corpus").exists()
    on_hub.faults.clear()
    on_hub.requests.clear()
    assert made(tmp_path / "corpus", tokenizer, f"{NAME}:small").fingerprint == whole.fingerprint
    assert not any("train-0.parquet" in each.path and each.method == "GET" for each in on_hub.requests)


def test_hub_dataset_names_what_does_not_exist(on_hub, tmp_path, tokenizer):
    for source, error, said in [
        ("org/nothing", ConfigError, "there is no file, directory or match for the data source 'org/nothing', and no"),
        (f"{NAME}:large", ConfigError, "'large' not found"),
        (f"{NAME}@v9:small", ConfigError, "has no revision 'v9'"),
    ]:
        with pytest.raises(error) as found:
            made(tmp_path / "corpus", tokenizer, source)
        assert said in str(found.value)
    with pytest.raises(ConfigError, match="test"):
        made(tmp_path / "corpus", tokenizer, f"{NAME}:small", split="test")
    assert not (tmp_path / "corpus").exists()


# Texts in another store


class Store(http.server.BaseHTTPRequestHandler):
    """Objects by their name; the first requests of each go wrong."""

    objects: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[Counter[str]] = Counter()
    faults = 1

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        content = self.objects.get(name)
        status = 503 if self.asked[name] <= self.faults else 200 if content is not None else 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if status == 200:
            self.wfile.write(content[: -5 if self.asked[name] == 2 and name == "b3" else None])

    def log_message(self, *_): ...


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_text, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(remote_text, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(Store, "asked", Counter())
    monkeypatch.setattr(Store, "faults", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/content/{{blob_id}}"
        server.shutdown()


def test_remote_text_is_fetched_by_id(tmp_path, tokenizer, store, monkeypatch):
    blobs = {f"b{number}": f"print({number})  # {sentences(1, number)}é\n" for number in range(40)}
    rows = [{"blob_id": each, "src_encoding": "ISO-8859-1" if each == "b5" else "UTF-8", "score": 3} for each in blobs]
    rows += [{"blob_id": "gone", "src_encoding": "UTF-8", "score": 3}]
    rows += [{"blob_id": "poor", "src_encoding": "UTF-8", "score": 1}]
    encoded = {key: value.encode("latin-1" if key == "b5" else "utf-8") for key, value in blobs.items()}
    encoded["b7"] = b"\xff" + encoded["b7"]
    monkeypatch.setattr(Store, "objects", {key: gz(value) for key, value in encoded.items()})
    source = table(tmp_path / "a.parquet", rows)
    settings = {"text_url": store, "encoding_key": "src_encoding", "filters": ("score >= 2",)}
    corpus = made(tmp_path / "corpus", tokenizer, source, **settings)
    assert Counter(all_texts(corpus)) == Counter(blobs.values())
    assert corpus.metadata["dropped"] | {"missing": 1, "filtered": 1} == corpus.metadata["dropped"]
    assert "poor" not in Store.asked
    before = Store.asked.total()
    made(tmp_path / "again", tokenizer, source, held_out=0.1, **settings)
    assert Store.asked.total() == before + 1, "all but the missing one is in the cache"
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")  # as a power cut leaves it
    assert Counter(all_texts(made(tmp_path / "cut", tokenizer, source, **settings))) == Counter(blobs.values())


def test_remote_text_reports_a_failing_store(tmp_path, tokenizer, store, monkeypatch):
    monkeypatch.setattr(Store, "faults", 100)
    source = table(tmp_path / "a.parquet", [{"blob_id": "x"}])
    with pytest.raises(
        MissingResourceError, match="cannot be fetched: it answers with status 503; the same command goes"
    ):
        made(tmp_path / "corpus", tokenizer, source, text_url=store)
    with pytest.raises(InvalidFileError, match="--data.text-url says where the text of its blob_id is"):
        made(tmp_path / "corpus", tokenizer, source)
    monkeypatch.setattr(Store, "faults", 0)
    monkeypatch.setattr(Store, "objects", {"x": gz(b"text")[:-6]})
    with pytest.raises(InvalidFileError, match="is broken: it is cut short"):
        made(tmp_path / "corpus", tokenizer, source, text_url=store)
    monkeypatch.setattr(Store, "objects", {"x": gz(b"text")})
    corpus = made(tmp_path / "corpus", tokenizer, source, text_url=store)
    assert texts_of(corpus, TRAIN) == ["text"], "it is asked for again"
    for url in ("{blob_id}", "file:///etc/{blob_id}", "http://127.0.0.1:1/a b/{blob_id}"):
        with pytest.raises(InvalidFileError, match="is no address"):
            made(tmp_path / "other", tokenizer, source, text_url=url)


# A cluster


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A command of that name that keeps the scripts it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "sbatch"
    script.write_text(
        f'#!/bin/sh\nn=$(ls {folder} | wc -l)\nfor last; do :; done\ncp "$last" {folder}/job$n\n'
        f'echo "$@" > {folder}/args$n\necho Submitted batch job $n\n'
    )
    script.chmod(0o755)
    scontrol = folder / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$3"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_slurm_gets_one_job_per_part_and_a_final_job(tmp_path, tokenizer, small_parts, sbatch, monkeypatch):
    """As far as it goes without a cluster: what is submitted, and what the jobs do."""
    from smolforge.data.prepare.cluster import Cluster, submit_jobs

    source = table(tmp_path / "a.parquet", records(90), row_group_size=20)
    data = Data(sources=(str(source),))
    count = submit_jobs(
        data, tmp_path / "corpus", tokenizer, vocab_size=0, limit=None, cluster=Cluster("slurm", 3, "short", 2)
    )
    assert count == 5
    jobs = work_folder(tmp_path / "corpus") / "jobs"
    script = (jobs / "tasks" / "launch_script.slurm").read_text()
    for line in ("--array=0-4%3", "--partition=short", "--time=2:00:00", "--job-name=smolforge-prepare"):
        assert f"#SBATCH {line}" in script
    assert f"launch_pickled_pipeline {jobs}/tasks/executor.pik" in script
    assert "--dependency=afterok:" in " ".join(path.read_text() for path in sbatch.glob("args*"))
    for name, ranks in (("tasks", (4, 2, 0, 1, 3)), ("corpus", (0,))):
        for rank in ranks:
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            monkeypatch.setenv("SLURM_NODELIST", "n1")
            run_job(jobs / name / "executor.pik")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    alone = made(tmp_path / "alone", tokenizer, source)
    assert Corpus.open(tmp_path / "corpus").fingerprint == alone.fingerprint
    assert submit_jobs(data, tmp_path / "corpus", tokenizer, vocab_size=0, limit=None, cluster=Cluster("slurm")) == 0


def test_cluster_reports_missing_ray_and_sbatch(tmp_path, tokenizer, text_file, sbatch, monkeypatch):
    from smolforge.data.prepare.cluster import Cluster, submit_jobs

    asked = (Data(sources=(str(text_file),)), tmp_path / "corpus", tokenizer)
    submit = partial(submit_jobs, vocab_size=0, limit=None)
    with pytest.raises(MissingResourceError, match="--executor ray needs ray; pip install ray brings it"):
        submit(*asked, cluster=Cluster("ray"))
    write(sbatch / "sbatch", b"#!/bin/sh\nexit 3\n")
    with pytest.raises(MissingResourceError, match="sbatch refused the jobs with status 3; it says why"):
        submit(*asked, cluster=Cluster("slurm"))
    shutil.rmtree(work_folder(tmp_path / "corpus"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingResourceError, match="sbatch is not here: prepare --executor slurm runs where jobs"):
        submit(*asked, cluster=Cluster("slurm"))
    assert not work_folder(tmp_path / "corpus").exists()


def run_job(pickled: Path) -> None:
    """What `launch_pickled_pipeline`, the job's command, does."""
    import dill

    with pickled.open("rb") as file:
        executor = dill.load(file)
    executor.run()


@pytest.mark.long
def test_prepare_needs_less_than_1_gb_of_memory_for_1_gb(tmp_path, shared):
    """And a line of 200 MB a sentence."""
    script = Path(__file__).parents[1] / "benchmarks" / "preparing.py"
    command = [sys.executable, str(script), str(shared / "smollm2-tokenizer"), "--memory", "1000"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(told.partition(" MB of memory")[0].rpartition(" ")[2].replace(",", "")) < 1000, told


def test_jsonl_refuses_a_line_of_200_mb(tmp_path, tokenizer):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(200_000_000)
    with pytest.raises(InvalidFileError, match="has a line of more than 128 MiB"):
        made(tmp_path / "corpus", tokenizer, tmp_path / "a.jsonl")
