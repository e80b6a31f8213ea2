"""The same items through lm-evaluation-harness, with its own model on the exported checkpoint: item by item."""

import json
import logging
import warnings

import numpy as np
import pytest

from smolforge.checkpoint import huggingface, loading
from smolforge.evaluation.multiple_choice import score
from smolforge.evaluation.tasks import read_items
from smolforge.exporters.transformers import to_transformers
from smolforge.testing import tiny_model
from smolforge.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "smolforge[harness]"')
WORDS = ["the model", "a token", "follows", "7", "\u00e9t\u00e9", "\u4f60\u597d", "so it", "learns."]


@pytest.fixture(autouse=True)
def _no_list_of_packages(monkeypatch):
    """The harness asks pip for one with each result."""
    monkeypatch.setattr("torch.utils.collect_env.get_pip_packages", lambda *_: ("pip", ""))


def through_the_harness(folder, path, limit):
    """What its HF model and a local task give for each item, by the item's place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return _through_the_harness(folder, path, limit)
        finally:
            logging.disable(logging.NOTSET)


def _through_the_harness(folder, path, limit):
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    known = TaskManager(include_defaults=False)  # the others are thousands of files
    return evaluate(model, get_task_dict([task], known), limit=limit, bootstrap_iters=0, log_samples=True)


def agree(folder, path, limit, tmp_path, monkeypatch):
    """Log-probabilities of all choices, and what each way of counting makes of them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    to_transformers(folder, tmp_path / "exported")
    theirs = through_the_harness(tmp_path / "exported", path, limit)
    ours = score(loading.load(tmp_path / "exported"), read_items(path)[:limit], long_items="truncate")
    samples = sorted(theirs["samples"]["local"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours) > 0
    for sample, found in zip(samples, ours, strict=True):
        values = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert list(found.logprobs) == pytest.approx(values, abs=2e-3)
        right = found.correct()
        counted = {"acc": right["acc"], "acc_norm": right["acc_chars"], "acc_bytes": right["acc_norm"]}
        assert counted == {name: bool(sample[name]) for name in counted}
    means = theirs["results"]["local"]
    assert means["acc,none"] == pytest.approx(np.mean([found.correct()["acc"] for found in ours]))
    return len(ours)


def test_lm_eval_equals_ours_on_random_items(tmp_path, monkeypatch):
    """Some are longer than the context of 128, and lose the beginning of their query, for each choice its own."""
    model, draw = tiny_model(), np.random.default_rng(0)
    huggingface.save(model, tmp_path / "model", model.tokenizer)
    lines = []
    for number in range(24):
        query = " ".join(draw.choice(WORDS, 400 if number % 5 == 0 else 4)) + draw.choice(["", " ", "\n", "  "])
        choices = [" ".join(draw.choice(WORDS, size)) for size in draw.integers(1, 5, 4)]
        lines.append({"id": number, "query": query, "choices": choices, "gold": int(draw.integers(4))})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert agree(tmp_path / "model", tmp_path / "items.jsonl", None, tmp_path, monkeypatch) == 24


HELLASWAG = "hellaswag/hellaswag_val_1000.jsonl"
ARC = ["arc/arc_easy_validation.jsonl", "arc/arc_challenge_validation.jsonl"]
WHOLE = [pytest.param(name, None, marks=pytest.mark.long) for name in (HELLASWAG, *ARC)]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "limit"), [(ARC[1], 6), *WHOLE])
def test_lm_eval_equals_ours_on_hellaswag_and_arc(shared, tmp_path, monkeypatch, name, limit):
    """With the published tokenizer."""
    model = tiny_model(vocab_size=49152, max_position_embeddings=1024)
    huggingface.save(model, tmp_path / "model", Tokenizer.load(shared / "smollm2-tokenizer"))
    agree(tmp_path / "model", shared / name, limit, tmp_path, monkeypatch)
