"""A mixture of data sets on the Hub and a file, trained on straight away: faults, a stall, a kill, and the same run."""

import json
import math
import signal
import time

import pytest
from children import train_amid_faults_until
from conftest import NANO
from test_mixture import metrics_of, weights_of, written
from test_sources import quick, records, table  # noqa: F401

from smolforge.config import Data
from smolforge.data.corpus import SPLITS, Corpus
from smolforge.data.prepare.build import prepare
from smolforge.data.sources import hub as streamed
from smolforge.errors import MissingResourceError
from smolforge.runs import resume_or_start
from smolforge.testing import in_child, tiny_tokenizer


@pytest.fixture
def mixed(hub, tmp_path, quick):  # noqa: F811
    """A recipe of three stages, of two data sets and a file."""
    for name in ("web", "math"):
        rows = [{"text": f"{name} {row['text']}"} for row in records(300)]
        files = {f"train-{n}.parquet": table(tmp_path / f"{name}{n}.parquet", rows[n::2]) for n in range(2)}
        hub.add(f"org/{name}", files, kind="dataset")
    tiny_tokenizer().save(tmp_path / "tokenizer")
    mixture = {
        "web": {"source": "org/web", "weight": 3},
        "math": {"source": "org/math"},
        "notes": {"source": written(tmp_path / "notes.txt", 900)},
    }
    stages = [
        {"until_step": 3},
        {"until_step": 6, "weights": {"math": 1, "notes": 1}},
        {"weights": {"web": 1, "math": 9}},
    ]
    tree = NANO | {"tokenizer": str(tmp_path / "tokenizer"), "data": {"mixture": mixture, "stages": stages}}
    tree["train"] = NANO["train"] | {"evaluate_every": "none"}
    (tmp_path / "mixed.json").write_text(json.dumps(tree))
    return tmp_path / "mixed.json"


def test_hub_mixture_resumes_bit_for_bit_after_faults_and_kill(mixed, hub, tmp_path):
    straight = resume_or_start(mixed, tmp_path / "straight" / "a", {})
    hub.fail(times=1, status=500, path_contains="web/resolve")
    hub.fail(times=1, cut_after=700, path_contains="math/resolve")
    run = tmp_path / "killed" / "a"
    assert in_child(train_amid_faults_until, 7, mixed, run) == -signal.SIGKILL
    assert not any(fault.times for fault in hub.faults), "both faults were met"
    assert [metrics["stage"] for metrics in metrics_of(run)] == [1, 1, 1, 2, 2, 2, 3]
    hub.requests.clear()
    resumed = resume_or_start(mixed, run, {})
    assert not hub.requests, "what is prepared is not asked for again"
    assert weights_of(resumed.folder, 8) == weights_of(straight.folder, 8)
    keys = ("loss", "stage", "tokens", "tokens_from_web", "tokens_from_math", "tokens_from_notes")
    one, two = ([[record[key] for key in keys] for record in metrics_of(each.folder)] for each in (resumed, straight))
    assert one == two


def test_hub_dataset_is_prepared_only_as_far_as_needed(mixed, tmp_path):
    tree = json.loads(mixed.read_text()) | {"data": {"sources": ["org/web"]}}
    (tmp_path / "alone.json").write_text(json.dumps(tree))
    run = resume_or_start(tmp_path / "alone.json", tmp_path / "runs" / "a", {})
    text = Corpus.open(run.folder / "corpus")
    assert 8 * 128 < sum(text.size(split)["tokens"] for split in SPLITS) <= math.ceil((8 * 128 + 1) / 0.95)


@pytest.mark.parametrize("path", ["/api/datasets", "/tree/", ".parquet"])
@pytest.mark.usefixtures("quick")
def test_hub_dataset_stall_is_reported_in_bounded_time(hub, tmp_path, monkeypatch, path):
    from huggingface_hub import constants

    monkeypatch.setattr(streamed, "RETRY_SECONDS", (0.0,))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    name = f"org/stalls{''.join(filter(str.isalpha, path))}"  # of its own, for what was listed once is remembered
    hub.add(name, {"train.parquet": table(tmp_path / "a.parquet")}, kind="dataset")
    hub.fail(times=1000, delay=3.0, path_contains=path)
    begun = time.perf_counter()
    with pytest.raises(MissingResourceError, match=f"{name} cannot be read: http.*goes on from where it was"):
        prepare(Data(sources=(name,)), tmp_path / "corpus", tiny_tokenizer())
    assert time.perf_counter() - begun < 20
    assert not (tmp_path / "corpus").exists()
    hub.faults.clear()
    assert prepare(Data(sources=(name,)), tmp_path / "corpus", tiny_tokenizer()).size("train")["tokens"]
