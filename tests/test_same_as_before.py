"""The comparison with an earlier version: that it notices what differs, and that nothing does."""

import json

import numpy as np
import pytest
import same_as_before
from safetensors.numpy import save_file
from same_as_before import COMMIT, IGNORED_KEYS, has_commit, report

RECORDS = [{"step": 1, "loss": 2.5, "tokens_per_second": 9.0}, {"step": 2, "loss": 2.25, "tokens_per_second": 8.0}]


def write_results(folder):
    """Write a small folder of results."""
    (folder / "run").mkdir(parents=True)
    write_tensors(folder, np.arange(8, dtype=np.float32))
    write_records(folder, RECORDS)
    (folder / "run" / "00000.ds").write_bytes(bytes(16))
    (folder / "run" / "recipe.toml").write_text(f'seed = 1\ninit_from = "{folder}/base"\n')


def write_tensors(folder, weight):
    save_file({"bias": np.zeros(2, np.float32), "weight": weight}, folder / "run" / "model.safetensors")


def write_records(folder, records):
    (folder / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture
def folders(tmp_path):
    """Two folders with equal results; only their paths differ."""
    for name in ("old", "new"):
        write_results(tmp_path / name)
    return tmp_path / "old", tmp_path / "new"


def flip_bit(folder):
    weight = np.arange(8, dtype=np.float32)
    weight.view(np.uint8)[13] ^= 1
    write_tensors(folder, weight)


def flip_bit_of_tokens(folder):
    (folder / "run" / "00000.ds").write_bytes(bytes(15) + b"\1")


def delete(folder):
    (folder / "run" / "00000.ds").unlink()


def add(folder):
    (folder / "more.json").write_text("{}")


CHANGES = {
    "a bit of a tensor": (flip_bit, "run/model.safetensors: tensor weight: 1 of 32 bytes, first at 13"),
    "the type of a tensor": (
        lambda folder: write_tensors(folder, np.arange(8, dtype=np.int32)),
        "run/model.safetensors: dtype of weight: F32 -> I32",
    ),
    "a bit of a token": (flip_bit_of_tokens, "run/00000.ds: 1 of 16 bytes, first at 15"),
    "a number": (
        lambda folder: write_records(folder, [RECORDS[0], RECORDS[1] | {"loss": 2.2500000000000004}]),
        "run/metrics.jsonl: 1.loss: 2.25 -> 2.2500000000000004",
    ),
    "a number that is none": (
        lambda folder: write_records(folder, [RECORDS[0], RECORDS[1] | {"loss": float("nan")}]),
        "run/metrics.jsonl: 1.loss: 2.25 -> nan",
    ),
    "a key": (
        lambda folder: write_records(folder, [RECORDS[0] | {"mood": 1}, RECORDS[1]]),
        "run/metrics.jsonl: 0.mood: '(absent)' -> 1",
    ),
    "a file that is missing": (delete, "run/00000.ds: only the old version wrote it"),
    "a file more": (add, "more.json: only the new version wrote it"),
}


@pytest.mark.parametrize(("change", "line"), CHANGES.values(), ids=CHANGES)
def test_comparison_notices_a_change(folders, change, line):
    assert list(report(*folders)) == ["equal    run (4 files)"]
    change(folders[1])
    assert f"DIFFERS  {line}" in list(report(*folders))


def test_comparison_ignores_speed_and_paths(folders):
    assert {"tokens_per_second"} <= IGNORED_KEYS
    write_records(folders[1], [record | {"tokens_per_second": 1.0} for record in RECORDS])
    (folders[1] / "run" / "run.log").write_text("finished")
    assert list(report(*folders)) == ["equal    run (4 files)"]


def test_renamed_key_is_the_same(folders, monkeypatch):
    write_records(folders[1], [{"step": each["step"], "training_loss": each["loss"]} for each in RECORDS])
    assert "DIFFERS" in next(report(*folders))
    monkeypatch.setattr(same_as_before, "RENAMED_KEYS", {"loss": "training_loss"})
    assert list(report(*folders)) == ["equal    run (4 files)"]


def test_failing_command_ends_the_comparison(tmp_path):
    with pytest.raises(SystemExit, match="ended with 3"):
        same_as_before.call(same_as_before.REPOSITORY, tmp_path, ["-c", "raise SystemExit(3)"])


def test_other_source_ends_the_comparison(tmp_path):
    with pytest.raises(SystemExit, match="in place of|No module named"):
        same_as_before.check_source(tmp_path, tmp_path)


@pytest.mark.long
def test_results_are_the_same_as_before():
    if not has_commit(COMMIT):
        pytest.skip(f"this clone's history does not have {COMMIT}")
    assert same_as_before.main([]) == 0
