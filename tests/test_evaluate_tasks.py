"""Items scored while a run trains: right, told to all, and without a trace in its weights."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import NANO
from safetensors.torch import load_file

import smolforge
from smolforge import cli
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.evaluation.multiple_choice import score, summary
from smolforge.evaluation.tasks import read_items
from smolforge.runs.callbacks import TrainingCallbacks
from smolforge.tracking.rows import tag

LINES = [
    {"query": "the model reads", "choices": ["a token", "the token and another"], "gold": 0},
    {"query": "7: a token", "choices": ["follows.", "and", "so"], "gold": 2},
    {"query": "another token\n", "choices": ["\u00e9t\u00e9", "it learns"], "gold": 1},
]


@pytest.fixture
def recipe(tmp_path, text_file):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**NANO, "data": {"sources": [str(text_file)]}}))
    return path


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path)


def weights(folder):
    """sha256 of weights, optimizer and torch's random state at the end of a run."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    kept = [newest / "model.safetensors", newest / "training" / "optimizer.safetensors"]
    drawn = load_file(newest / "training" / "random.safetensors")["torch"].numpy().tobytes()
    return [hashlib.sha256(each).hexdigest() for each in (*(path.read_bytes() for path in kept), drawn)]


def lines(folder):
    return {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("ema", [None, 0.5])
def test_evaluate_tasks_scores_saved_weights_without_effect(recipe, items, tmp_path, ema):
    given = {"train.evaluate_tasks": [items], "train.evaluate_task_items": 2, "optim.ema_decay": ema}
    run = smolforge.train(recipe, tmp_path / "with", **given)
    smolforge.train(recipe, tmp_path / "without", **{"optim.ema_decay": ema})
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    told = lines(tmp_path / "with")
    scored = {step for step, line in told.items() if "task_mine_acc" in line}
    assert scored == {4, 8}
    found = summary(score(smolforge.load(tmp_path / "with"), read_items(tmp_path / "mine.jsonl")[:2]))
    for name in ("acc", "acc_norm", "acc_chars"):
        assert told[8][f"task_mine_{name}"] == run.metrics[f"task_mine_{name}"] == found[name]
    assert "validation_loss" in told[8]


def test_evaluate_tasks_uses_the_ema_weights(recipe, items, tmp_path, monkeypatch):
    """As validation does: what `load` gives of the checkpoint of that step."""
    seen, real = {}, TrainingCallbacks.task_scores

    def spy(shop):
        seen[len(seen)] = {name: weight.detach().clone() for name, weight in shop.model.named_parameters()}
        return real(shop)

    monkeypatch.setattr(TrainingCallbacks, "task_scores", spy)
    smolforge.train(recipe, tmp_path / "run", **{"train.evaluate_tasks": [items], "optim.ema_decay": 0.5})
    kept = dict(smolforge.load(tmp_path / "run").named_parameters())
    assert all(weight.equal(kept[name]) for name, weight in seen[1].items())


def test_evaluate_tasks_resumes_with_equal_scores(recipe, items, tmp_path):
    given, real = {"train.evaluate_tasks": [items]}, TrainingCallbacks.report
    smolforge.train(recipe, tmp_path / "whole", **given)
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TrainingCallbacks, "report", lambda shop, now, told: real(shop, now, told | {"x": 1 / (6 - now.step)})
        )
        smolforge.train(recipe, tmp_path / "cut", **given)
    smolforge.train(recipe, tmp_path / "cut", **given)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    whole, again = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    scores = [name for name in whole[8] if name.startswith("task_")]
    assert len(scores) == 4
    assert all(whole[step].get(name) == again[step].get(name) for step in whole for name in scores)


def test_evaluate_tasks_works_without_a_validation_split(recipe, items, tmp_path):
    run = smolforge.train(recipe, tmp_path / "run", **{"train.evaluate_tasks": [items], "data.held_out": 0.0})
    assert "task_mine_acc" in run.metrics
    assert "validation_loss" not in run.metrics


def test_evaluate_tasks_can_be_added_and_removed(recipe, items, tmp_path):
    smolforge.train(recipe, tmp_path / "run", steps=4)
    smolforge.train(recipe, tmp_path / "run", steps=8, **{"train.evaluate_tasks": [items]})
    assert ["task_mine_acc" in line for line in lines(tmp_path / "run").values()] == [False] * 7 + [True]
    smolforge.train(recipe, tmp_path / "run", steps=9, **{"train.evaluate_tasks": None})
    assert "task_mine_acc" not in lines(tmp_path / "run")[9]


def test_evaluate_tasks_skips_long_items_with_a_warning(recipe, items, tmp_path, caplog):
    path = Path(items)
    path.write_text(path.read_text() + json.dumps({"query": "the " * 300, "choices": ["a", "b"], "gold": 0}) + "\n")
    count = len(path.read_text().splitlines())
    smolforge.train(recipe, tmp_path / "run", **{"train.evaluate_tasks": (items,)})
    assert f"mine: 1 of {count} items are longer than the model's context of 128 tokens, and skipped" in caplog.text
    assert {line["task_mine_n"] for line in lines(tmp_path / "run").values() if "task_mine_n" in line} == {count - 1}


@pytest.mark.parametrize(
    ("tasks", "error", "said"),
    [
        (["gone.jsonl"], InvalidFileError, "there is no file of items at gone.jsonl"),
        (["helaswag"], ConfigError, "Did you mean hellaswag?"),
        (["{items}", "{items}"], ConfigError, "two of train.evaluate_tasks are called mine"),
        (
            ["{long}"],
            InvalidFileError,
            "long.jsonl, line 1, as every item here, is longer than this model's context of 128",
        ),
    ],
)
def test_evaluate_tasks_errors_come_before_the_first_step(recipe, items, tmp_path, tasks, error, said):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"query": "the model " * 200, "choices": ["a"], "gold": 0}) + "\n")
    words = [word.format(items=items, long=long) for word in tasks]
    with pytest.raises(error, match=said):
        smolforge.train(recipe, tmp_path / "run", **{"train.evaluate_tasks": words})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_evaluate_tasks_scores_are_printed_and_tracked(capsys, recipe, items, tmp_path):
    words = ["train", str(recipe), "--run", str(tmp_path / "run"), "--train.evaluate-tasks", items]
    assert cli.run(words) == 0
    assert "mine acc " in capsys.readouterr().err
    assert tag("task_mine_acc_norm") == "tasks/mine_acc_norm"
    assert cli.run(["inspect", str(tmp_path / "run")]) == 0
    assert "tasks.mine_acc_chars" in capsys.readouterr().out
