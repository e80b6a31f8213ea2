"""Near duplicates: datatrove's MinHash is the oracle, and brute force; what stays depends on the order of the sources
alone."""

import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xxhash
from datatrove.data import Document as Theirs
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.word_tokenizers import WordTokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_data import texts_of
from test_sources import NAME, all_texts, gz, made, on_hub, packed, quick, small_parts, table, write

from smolforge import cli
from smolforge.cli.prepare import DROP_REASONS
from smolforge.config import Data
from smolforge.config.base import validate_settings
from smolforge.data.corpus import HELD_OUT, TRAIN
from smolforge.data.prepare import dedup, jobs, minhash
from smolforge.data.prepare.build import prepare, work_folder
from smolforge.data.prepare.dedup import is_near_duplicate
from smolforge.errors import ConfigError, MissingResourceError
from smolforge.testing import tiny_tokenizer
from smolforge.testing.processes import die, in_child

__all__ = ["on_hub", "quick", "small_parts"]
WORDS = [f"{first}{second}" for first in "bcdfghklmnprst" for second in ("an", "el", "ir", "ot", "um")]
made = partial(made, deduplication="minhash")


def written(seed, length=60):
    """A text of so many words, like no other."""
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def changed(text, changes, seed):
    """The same with other words in some places, spread evenly from one that the seed gives."""
    words, rng = text.split(), random.Random(seed)
    start, apart = rng.randrange(len(words)), len(words) / max(1, changes)
    for number in range(changes):
        words[int(start + number * apart) % len(words)] = f"other{rng.random()}".replace(".", "x")
    return " ".join(words)


def similarity(one, other):
    """Of all runs of five words in the one or the other, the share in both."""
    runs = [set(zip(*(text.split()[place:] for place in range(5)), strict=False)) for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def families(count=30):
    """Documents of which each third one has near duplicates later on."""
    firsts = [written(number) for number in range(count)]
    near = [changed(firsts[number], 1, number) for number in range(0, count, 3)]
    again = [changed(firsts[number], 1, 7 * number + 1) for number in range(0, count, 6)]
    mixed = firsts[count // 2 :] + near + again
    random.Random(5).shuffle(mixed)
    return firsts[: count // 2] + mixed


def rows_of(texts):
    return [{"text": text, "score": 1, "of": 0} for text in texts]


def shared(texts):
    """Pairs of texts that have a band in common."""
    bands = [minhash.bands_of(text) for text in texts]
    found = [(one, two) for two in range(len(bands)) for one in range(two)]
    return [(one, two) for one, two in found if (bands[one] == bands[two]).any() and bands[one].any()]


# datatrove as the oracle


class PlainWords(WordTokenizer):
    """What its tokenizer for English, spaCy, is replaced by."""

    def word_tokenize(self, text):
        return minhash.WORD.findall(text)

    sent_tokenize = span_tokenize = word_tokenize


def datatrove_signatures(folder="."):
    """Its step; its own call of xxhash fails from version 4 on (huggingface/datatrove#508)."""
    step = MinhashDedupSignature(str(folder), MinhashConfig(), language=PlainWords())
    step._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
    return step


def clusters_of(texts, folder):
    """What datatrove's blocks make of texts, one after the other: near duplicates, each in a set of their numbers."""
    datatrove_signatures(folder / "signatures").run(
        Theirs(text=text, id=str(number)) for number, text in enumerate(texts)
    )
    for rank in range(14):
        step = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"))
        step.run(rank=rank, world_size=14)
    MinhashDedupCluster(str(folder / "buckets"), str(folder / "clusters"), save_cluster_id=True).run()
    of_each, file = {}, folder / "clusters" / "000000.clusters"
    for number, cluster in np.fromfile(file, "<u4").reshape(-1, 2).tolist() if file.exists() else ():
        of_each.setdefault(cluster, set()).add(number)
    return list(of_each.values())


TEXTS = [
    "Four words are few",
    "The Café, at 3.14 Rue de la Paix — «naïve» Ünïcode; STRASSE and Straße!",
    "今天天气很好，我们去公园玩吧。ガギグゲゴ",  # noqa: RUF001
    "한국어 문장은 띄어쓰기가 있다 그리고 또 하나 더",
    "ผมชื่อสมชายครับ",
    "def f(x):\n\treturn [g(x, y=1e-5) for _ in range(10)]  # ёлка " * 40,
    written(3, 3000),
]


@pytest.mark.parametrize("at_once", [7, 1024])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_minhash_signatures_equal_datatrove(text, at_once, monkeypatch):
    monkeypatch.setattr(minhash, "NGRAMS_PER_BATCH", at_once)
    theirs, ours = datatrove_signatures(), minhash.ngram_hashes(text)
    shingles = theirs.get_shingles(text)
    assert np.array_equal(ours, shingles[:, 0])
    if not len(ours):
        assert not minhash.bands_of(text).any(), "there is nothing to compare"
        return
    assert np.array_equal(minhash.min_hashes(ours).reshape(14, 8), theirs.get_signature(shingles))
    assert minhash.bands_of(text).all() and len(minhash.bands_of(text)) == 14


def test_minhash_modulo_is_exact_at_the_prime():
    """Runs whose first hash comes to just below a multiple of 2^61 - 1, to it, and to just above."""
    prime, two = 2**61 - 1, 2**64
    odd = next(place for place, factor in enumerate(minhash.FACTORS.tolist()) if factor % 2)
    factor, summand = int(minhash.FACTORS[odd]), int(minhash.SUMMANDS[odd])
    for value in [border + near for border in (prime, 3 * prime, 8 * prime) for near in (-1, 0, 1, 6)]:
        run = (value - summand) * pow(factor, -1, two) % two
        assert (run * factor + summand) % two == value
        assert int(minhash.min_hashes(np.array([run], np.uint64))[odd]) == value % prime


def test_minhash_clusters_equal_datatrove(tmp_path, tokenizer):
    texts = families()
    clusters = clusters_of(texts, tmp_path / "before")
    assert len(clusters) == 10 and sum(map(len, clusters)) == 25
    gone = set().union(*(cluster - {min(cluster)} for cluster in clusters))
    kept = [text for number, text in enumerate(texts) if number not in gone]
    corpus = made(tmp_path / "corpus", tokenizer, write(tmp_path / "a.jsonl.gz", gz(packed(rows_of(texts)))))
    assert sorted(all_texts(corpus)) == sorted(kept), "the first of each cluster stays, and whatever is in none"
    assert corpus.metadata["dropped"] == {"repeated": 0, "near_duplicates": 15, "unanswered": 0}
    assert corpus.metadata["request"]["data"]["deduplication"] == "minhash"
    assert set(corpus.metadata["dropped"]) <= set(DROP_REASONS)
    assert clusters_of(all_texts(corpus), tmp_path / "after") == []


def test_minhash_hit_rate_follows_similarity():
    expected, variance, found = 0.0, 0.0, Counter()
    for number in range(280):
        one = written(number)
        other = changed(one, 1 + number % 7, number)
        s = similarity(one, other)
        chance = 1 - (1 - s**8) ** 14
        expected, variance = expected + chance, variance + chance * (1 - chance)
        hit = bool((minhash.bands_of(one) == minhash.bands_of(other)).any())
        found["all"] += hit
        found["near"] += s > 0.8 and not hit
        found["far"] += s < 0.3 and hit
        found["of near"] += s > 0.8
        found["of far"] += s < 0.3
    assert abs(found["all"] - expected) < 3 * math.sqrt(variance), (found, expected)
    assert found["near"] <= 4 and found["of near"] >= 40, "of 92 % and more"
    assert found["far"] <= 1 and found["of far"] >= 40, "of a thousandth and less"


# What stays

documents = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), max_size=9)


@given(documents)
def test_is_near_duplicate_compares_with_all_earlier_documents(found):
    """Small numbers stand for bands, 0 for none."""
    bands = np.array(found, np.uint64).reshape(-1, 3)
    near = is_near_duplicate(bands.T)
    share = lambda one, two: bool(((bands[one] == bands[two]) & (bands[one] != 0)).any())  # noqa: E731
    assert near.tolist() == [any(share(before, each) for before in range(each)) for each in range(len(bands))]
    for length in range(len(bands)):
        assert is_near_duplicate(bands[:length].T).tolist() == near[:length].tolist()
    assert not is_near_duplicate(bands[~near].T).any(), "nothing more is left out the second time"


@pytest.mark.parametrize("workers", [1, 2])
def test_minhash_does_not_depend_on_parts_or_workers(tmp_path, tokenizer, small_parts, workers, monkeypatch):
    texts = families()
    source = table(tmp_path / "a.parquet", rows_of(texts + texts[:5]), row_group_size=7)
    corpus = made(tmp_path / "corpus", tokenizer, source, workers=workers, held_out=0.3)
    monkeypatch.undo()
    assert corpus.fingerprint == made(tmp_path / "whole", tokenizer, source, held_out=0.3).fingerprint
    assert corpus.metadata["dropped"]["near_duplicates"] == 15 and corpus.metadata["dropped"]["repeated"] == 5
    assert texts_of(corpus, HELD_OUT), "of which none is near one that is trained on"
    assert shared(all_texts(corpus)) == []
    kept = set(all_texts(corpus))
    assert all({texts[one], texts[two]} - kept for one, two in shared(texts))


def test_minhash_keeps_the_first_file_in_name_order(tmp_path, tokenizer):
    text = written(1, 200)
    for name, number in (("b", 0), ("a", 1), ("c", 2)):
        write(tmp_path / f"{name}.txt", changed(text, number, number).encode())
    assert texts_of(made(tmp_path / "corpus", tokenizer, tmp_path / "*.txt", held_out=0), TRAIN) == [
        changed(text, 1, 1)
    ]
    given = [tmp_path / f"{name}.txt" for name in "cab"]
    assert texts_of(made(tmp_path / "other", tokenizer, *given, held_out=0), TRAIN) == [changed(text, 2, 2)]


def test_minhash_compares_a_split_document_as_a_whole(tmp_path, tokenizer):
    """Its end is held out; a near duplicate of all of it stays in neither part."""
    text = "\n".join(written(number, 8) for number in range(40))
    paths = [write(tmp_path / f"{name}.txt", each.encode()) for name, each in (("a", text), ("b", text + "\nend"))]
    corpus = made(tmp_path / "corpus", tokenizer, *paths, held_out=0.4)
    assert "".join(all_texts(corpus)) == text
    assert len(texts_of(corpus, TRAIN)) == len(texts_of(corpus, HELD_OUT)) == 1


def test_minhash_skips_too_short_and_too_long_documents(tmp_path, tokenizer, monkeypatch):
    long = written(1, 400)
    monkeypatch.setattr(dedup, "MAX_COMPARED_CHARACTERS", len(long) - 1)
    texts = ["Two words.", "two words", long, long + "er", written(2), written(2) + "."]
    source = write(tmp_path / "a.jsonl.gz", gz(packed(rows_of(texts))))
    assert texts_of(made(tmp_path / "corpus", tokenizer, source, held_out=0), TRAIN) == texts[:-1]


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_near_duplicates_use_no_token_budget(tmp_path, tokenizer, monkeypatch, held_out):
    """However much is read at a time: with less room the beginning of what stays with more."""
    texts = [changed(written(number // 4), number % 4, number) for number in range(100)]
    source = write(tmp_path / "a.jsonl.gz", gz(packed(rows_of(texts))))
    everything = made(tmp_path / "all", tokenizer, source, held_out=held_out)
    for limit in (700, 1500):
        found = []
        for characters in (0, 900, 1 << 20):
            monkeypatch.setattr(jobs, "BATCH_CHARACTERS", characters)
            monkeypatch.setattr(jobs, "CHUNK_CHARACTERS", 10 * characters)
            found.append(made(tmp_path / f"{limit}{characters}", tokenizer, source, limit=limit, held_out=held_out))
        assert len({corpus.fingerprint for corpus in found}) == 1
        assert sum(found[0].size(split)["tokens"] for split in (TRAIN, HELD_OUT)) == limit
        assert texts_of(found[0], TRAIN)[:-1] == texts_of(everything, TRAIN)[: len(texts_of(found[0], TRAIN)) - 1]
        assert found[0].metadata["dropped"]["near_duplicates"] > 0


@pytest.mark.parametrize("held_out", [0.05, 0.3])
def test_token_limit_fills_both_splits_after_minhash(tmp_path, tokenizer, held_out):
    texts = [changed(written(number // 4), number % 4, number) for number in range(240)]
    source = write(tmp_path / "a.jsonl", packed(rows_of(texts)))
    corpus = made(tmp_path / "corpus", tokenizer, source, limit=3000, held_out=held_out)
    sizes = [corpus.size(split)["tokens"] for split in (TRAIN, HELD_OUT)]
    assert sizes[0] == 3000 - int(3000 * held_out) and 0 < sizes[1] <= int(3000 * held_out)
    assert shared(all_texts(corpus)) == []


# Stopped, and started again


def dying(data, folder, reports):
    """Prepare, and die in the middle."""
    jobs.CHUNK_CHARACTERS, jobs.BATCH_CHARACTERS = 1500, 300
    told = iter(range(reports))
    prepare(data, folder, tiny_tokenizer(), report=lambda _: None if next(told, None) is not None else die())


def test_prepare_with_minhash_resumes_after_sigkill(tmp_path):
    source = write(tmp_path / "a.jsonl.gz", gz(packed(rows_of(families()))))
    data = Data(sources=(str(source),), deduplication="minhash")
    assert in_child(dying, data, tmp_path / "corpus", 12) == -signal.SIGKILL
    assert len(list(work_folder(tmp_path / "corpus").rglob("bands.npy"))) > 2
    corpus = prepare(data, tmp_path / "corpus", tiny_tokenizer())
    whole = made(tmp_path / "whole", tiny_tokenizer(), source)
    assert corpus.fingerprint == whole.fingerprint
    assert corpus.metadata["dropped"] == whole.metadata["dropped"]


def test_prepare_refuses_to_mix_exact_and_minhash(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl.gz", gz(packed(rows_of(families()))))
    exact = made(tmp_path / "corpus", tokenizer, source, deduplication="exact")
    assert "near_duplicates" not in exact.metadata["dropped"] and len(all_texts(exact)) == 45
    assert "deduplication" not in exact.metadata["request"]["data"], "corpora made before are still the same"
    with pytest.raises(ConfigError, match="made with other settings"):
        made(tmp_path / "corpus", tokenizer, source)


def test_docs_corpora_page_shows_the_real_output(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "corpora.md").read_text()
    block, _, behind = page.partition("```bash\n")[2].partition("```")
    *before, prepared = block.strip().splitlines()
    monkeypatch.chdir(tmp_path)
    for line in before:
        subprocess.run(line.replace("python", sys.executable), shell=True, check=True)
    assert cli.run(shlex.split(prepared)[1:]) == 0
    said = re.match(r"\s+ends with `(.*)`", behind)
    assert said and capsys.readouterr().out.splitlines()[-1] == said[1]


# Other sources


def test_minhash_compares_conversations_by_their_text(tmp_path, tokenizer):
    said = [written(1), changed(written(1), 1, 1), written(2)]
    talks = [{"prompt": "So?" if number else "And?", "completion": each} for number, each in enumerate(said)]
    source = write(tmp_path / "a.jsonl", packed(talks))
    corpus = made(tmp_path / "corpus", tokenizer, source, format="chat", held_out=0)
    assert corpus.size(TRAIN)["documents"] == 2 and corpus.metadata["dropped"]["near_duplicates"] == 1


def test_minhash_refuses_preference_pairs(tmp_path):
    with pytest.raises(ConfigError, match="pairs of one long prompt are nearly the same"):
        validate_settings(Data, {"sources": ["a.jsonl"], "format": "pairs", "deduplication": "minhash"})


def test_minhash_works_on_datatrove_tokens(tmp_path, tokenizer):
    texts = families()
    source = write(tmp_path / "a.jsonl.gz", gz(packed(rows_of(texts))))
    ready = made(tmp_path / "ready", tokenizer, source, deduplication="exact", held_out=0)
    again = made(tmp_path / "again", tokenizer, *sorted((ready.folder / TRAIN).glob("*.ds")), held_out=0)
    assert again.fingerprint == made(tmp_path / "whole", tokenizer, source, held_out=0).fingerprint


def test_minhash_works_on_streamed_datasets(on_hub, tmp_path, tokenizer):
    texts, files = families(), {}
    for number, part in enumerate((texts[:20], texts[20:])):
        path = table(tmp_path / f"{number}.parquet", rows_of(part), row_group_size=5)
        files[f"data/train-{number}.parquet"] = path
    on_hub.add(NAME, files, kind="dataset")
    corpus = made(tmp_path / "corpus", tokenizer, NAME)
    source = write(tmp_path / "a.jsonl.gz", gz(packed(rows_of(texts))))
    whole = made(tmp_path / "whole", tokenizer, source)
    assert corpus.fingerprint == whole.fingerprint


def test_minhash_without_datatrove_names_the_extra(tmp_path, tokenizer, monkeypatch):
    monkeypatch.delitem(sys.modules, "smolforge.data.prepare.minhash")
    monkeypatch.setitem(sys.modules, "datatrove.utils.text", None)
    source = write(tmp_path / "a.jsonl", json.dumps({"text": "x"}).encode())
    with pytest.raises(MissingResourceError, match=r'pip install "smolforge\[data\]" brings it'):
        made(tmp_path / "corpus", tokenizer, source)
