"""What `auto` comes to: on a device that is told what it can do."""

import json

import pytest
import torch
from conftest import NANO

from smolforge.config.base import replaced
from smolforge.config.load import read_recipe, to_recipe
from smolforge.errors import SettingError
from smolforge.runs import auto, estimate, train
from smolforge.runs.auto import DECIDED, SAFE_SHARE, fitting_rows, on_this_machine
from smolforge.runs.estimate import training_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = dict.fromkeys(DECIDED, "auto")
SMOLLM2 = replaced(read_recipe("smollm2-135m"), AUTO | {"train.batch_tokens": 2048 * 96, "train.device": "cpu"})


def free(monkeypatch, recipe, rows):
    """Memory for a micro-batch of so many rows, and no more."""
    needed = training_bytes(replaced(recipe, {"train.micro_batch_size": rows}))
    monkeypatch.setattr(auto, "available_bytes", lambda device: int(needed / SAFE_SHARE) + 1)


@pytest.mark.parametrize(
    ("room", "ranks", "rows"), [(96, 1, 32), (31, 1, 24), (7, 1, 6), (1, 1, 1), (96, 8, 12), (11, 8, 6)]
)
def test_a_micro_batch_fits_and_divides_the_share_of_a_rank(monkeypatch, room, ranks, rows):
    """On a GPU no more than 32 rows of 2048 tokens keep it busy."""
    free(monkeypatch, SMOLLM2, room)
    monkeypatch.setattr(auto, "fits", lambda recipe: True)
    assert fitting_rows(SMOLLM2, GPU, ranks) == rows


def test_on_a_gpu_it_is_tried(monkeypatch):
    tried = []

    def measured(recipe):
        tried.append(recipe.train.micro_rows)
        if recipe.train.micro_rows > 12:
            raise torch.OutOfMemoryError
        return 1.0

    free(monkeypatch, SMOLLM2, 96)
    monkeypatch.setattr(auto, "tokens_per_second", measured)
    assert fitting_rows(SMOLLM2, GPU, 1) == 12
    assert tried == [32, 24, 16, 12]


def test_a_processor_is_busy_sooner(monkeypatch):
    free(monkeypatch, SMOLLM2, 96)
    assert fitting_rows(SMOLLM2, CPU, 1) == 2


def test_what_does_not_fit_at_all_is_refused(monkeypatch):
    monkeypatch.setattr(auto, "available_bytes", lambda device: 1 << 30)
    with pytest.raises(SettingError, match=r"not even one row of 2048 tokens fits into the 0.8 GiB that may be used"):
        fitting_rows(SMOLLM2, CPU, 1)


@pytest.mark.parametrize(("steps", "ranks", "compiled"), [(4, 1, False), (60, 1, True), (60, 4, False)])
def test_runs_of_hours_are_compiled(monkeypatch, steps, ranks, compiled):
    """Sixty steps of 4 x 2048 tokens take 100 GFLOP/s two or three hours, and four such processors less than one."""
    monkeypatch.setattr(estimate, "matrix_flops_per_second", lambda device, dtype: 1e11)
    recipe = replaced(SMOLLM2, {"train.steps": steps, "train.batch_tokens": 8192, "train.dtype": "float32"})
    decided = on_this_machine(recipe, ranks).train
    assert (decided.compile, decided.activation_checkpointing) == (compiled, "selective" if compiled else None)


def test_what_is_said_by_hand_stays():
    said = {"train.dtype": "float64", "train.micro_batch_size": 7, "train.compile": True}
    said |= {"train.activation_checkpointing": "full"}
    assert on_this_machine(replaced(SMOLLM2, said)) == replaced(SMOLLM2, said)


def test_what_was_decided_stays_decided(tmp_path, text_file):
    """A run that goes on, on another machine perhaps, does not decide anew because the recipe still says auto."""
    train_settings = NANO["train"] | {"micro_batch_size": "auto", "dtype": "auto"}
    recipe = NANO | {"data": {"sources": [str(text_file)]}, "train": train_settings}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    begun = train(tmp_path / "recipe.json", tmp_path / "run", steps=4).recipe
    assert begun.train.micro_batch_size == to_recipe(recipe).train.rows
    assert begun.train.dtype in ("float32", "bfloat16")
    assert begun.train.compile is False
    assert read_recipe(tmp_path / "run" / "recipe.toml") == begun
    went_on = train(tmp_path / "recipe.json", tmp_path / "run", steps=8, **{"train.micro_batch_size": "auto"}).recipe
    assert went_on.train.model_copy(update={"steps": 4}) == begun.train
