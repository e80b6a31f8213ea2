"""What `auto` comes to: on a device that is told what it can do."""

import json

import pytest
import torch
from conftest import NANO

from smolforge.config.base import replace_settings
from smolforge.config.load import read_recipe, to_recipe
from smolforge.errors import ConfigError
from smolforge.runs import auto, estimate, train
from smolforge.runs.auto import AUTO_SETTINGS, SAFE_SHARE, find_micro_batch_size, resolve_auto
from smolforge.runs.estimate import training_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = dict.fromkeys(AUTO_SETTINGS, "auto")
SMOLLM2 = replace_settings(read_recipe("smollm2-135m"), AUTO | {"train.batch_tokens": 2048 * 96, "train.device": "cpu"})


def free(monkeypatch, recipe, rows):
    """Memory for a micro-batch of so many rows, and no more."""
    needed = training_bytes(replace_settings(recipe, {"train.micro_batch_size": rows}))
    monkeypatch.setattr(auto, "available_bytes", lambda device: int(needed / SAFE_SHARE) + 1)


@pytest.mark.parametrize(
    ("room", "ranks", "rows"), [(96, 1, 32), (31, 1, 24), (7, 1, 6), (1, 1, 1), (96, 8, 12), (11, 8, 6)]
)
def test_auto_micro_batch_fits_and_divides_the_rows_of_a_rank(monkeypatch, room, ranks, rows):
    """On a GPU no more than 32 rows of 2048 tokens keep it busy."""
    free(monkeypatch, SMOLLM2, room)
    monkeypatch.setattr(auto, "runs_without_oom", lambda recipe: True)
    assert find_micro_batch_size(SMOLLM2, GPU, ranks) == rows


def test_auto_micro_batch_is_tried_on_a_gpu(monkeypatch):
    tried = []

    def measured(recipe):
        tried.append(recipe.train.sequences_per_micro_batch)
        if recipe.train.sequences_per_micro_batch > 12:
            raise torch.OutOfMemoryError
        return 1.0

    free(monkeypatch, SMOLLM2, 96)
    monkeypatch.setattr(auto, "tokens_per_second", measured)
    assert find_micro_batch_size(SMOLLM2, GPU, 1) == 12
    assert tried == [32, 24, 16, 12]


def test_auto_micro_batch_is_small_on_a_cpu(monkeypatch):
    free(monkeypatch, SMOLLM2, 96)
    assert find_micro_batch_size(SMOLLM2, CPU, 1) == 2


def test_auto_micro_batch_refuses_too_little_memory(monkeypatch):
    monkeypatch.setattr(auto, "available_bytes", lambda device: 1 << 30)
    with pytest.raises(ConfigError, match=r"not even one row of 2048 tokens fits into the 819 MiB that may be used"):
        find_micro_batch_size(SMOLLM2, CPU, 1)


@pytest.mark.parametrize(("steps", "ranks", "compiled"), [(4, 1, False), (60, 1, True), (60, 4, False)])
def test_auto_compiles_runs_of_hours(monkeypatch, steps, ranks, compiled):
    """Sixty steps of 4 x 2048 tokens take 100 GFLOP/s two or three hours, and four such processors less than one."""
    monkeypatch.setattr(estimate, "matmul_flops_per_second", lambda device, dtype: 1e11)
    recipe = replace_settings(SMOLLM2, {"train.steps": steps, "train.batch_tokens": 8192, "train.dtype": "float32"})
    decided = resolve_auto(recipe, ranks).train
    assert (decided.compile, decided.activation_checkpointing) == (compiled, "selective" if compiled else None)


def test_auto_keeps_settings_given_by_hand():
    said = {"train.dtype": "float64", "train.micro_batch_size": 7, "train.compile": True}
    said |= {"train.activation_checkpointing": "full"}
    assert resolve_auto(replace_settings(SMOLLM2, said)) == replace_settings(SMOLLM2, said)


def test_auto_decisions_are_kept_on_resume(tmp_path, text_file):
    """A run that goes on, on another machine perhaps, does not decide anew because the recipe still says auto."""
    train_settings = NANO["train"] | {"micro_batch_size": "auto", "dtype": "auto"}
    recipe = NANO | {"data": {"sources": [str(text_file)]}, "train": train_settings}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    begun = train(tmp_path / "recipe.json", tmp_path / "run", steps=4).recipe
    assert begun.train.micro_batch_size == to_recipe(recipe).train.sequences_per_step
    assert begun.train.dtype in ("float32", "bfloat16")
    assert begun.train.compile is False
    assert read_recipe(tmp_path / "run" / "recipe.toml") == begun
    went_on = train(tmp_path / "recipe.json", tmp_path / "run", steps=8, **{"train.micro_batch_size": "auto"}).recipe
    assert went_on.train.model_copy(update={"steps": 4}) == begun.train
