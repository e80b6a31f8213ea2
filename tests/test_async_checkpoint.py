"""Checkpoints beside the training: one at a time, of one moment, tried again when the disk refuses."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import NANO
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as reference

from smolforge import atomic
from smolforge.checkpoint import huggingface, safetensors_writer, training_state
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.runs import async_checkpoint, resume_or_start, train
from smolforge.runs.context import ProgressListener
from smolforge.testing import flip_bit, recorded, tiny_model
from smolforge.training.run_folder import Journal, RunFolder, read_records


@pytest.fixture
def recipe_file(tmp_path, text_file):
    path = tmp_path / "tiny.json"
    train_ = NANO["train"] | {"keep_last": 9, "checkpoint_every": 2}
    path.write_text(json.dumps(NANO | {"train": train_, "data": {"sources": [str(text_file)]}}))
    return path


def hashes(run, step=8):
    files = training_state.check_checkpoint(training_state.checkpoint_dir(run, step))["files"]
    return [files[name]["sha256"] for name in ("model.safetensors", "training/optimizer.safetensors")]


def steps(run):
    return [training_state.step_from_dir(folder) for folder in training_state.list_checkpoints(run)]


def refusing(monkeypatch, refused, number=errno.ENOSPC):
    """The disk refuses the weights of these checkpoints, each as often as it is in the list."""
    real = safetensors_writer.write

    def write(path, *rest, **named):
        step = int(path.parent.name.rpartition("-")[2]) if path.name == huggingface.WEIGHTS else None
        if step in refused:
            refused.remove(step)
            raise OSError(number, os.strerror(number))
        real(path, *rest, **named)

    monkeypatch.setattr(safetensors_writer, "write", write)


# The disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_training_continues_when_a_checkpoint_write_fails(tmp_path, recipe_file, monkeypatch, caplog, number):
    """What was saved before stays, the next one comes in its turn, the end is the same."""
    train(recipe_file, tmp_path / "once")
    refusing(monkeypatch, [4], number)
    train(recipe_file, tmp_path / "run")
    assert steps(tmp_path / "run") == [2, 6, 8]
    assert hashes(tmp_path / "run") == hashes(tmp_path / "once")
    (said,) = [record.message for record in caplog.records if record.message.startswith("NOT SAVED")]
    assert "step-00000004" in said
    if number != errno.EIO:
        size = sum(
            path.stat().st_size for path in training_state.checkpoint_dir(tmp_path / "run", 8).rglob("*.safetensors")
        )
        needed = int(said.partition("needs ")[2].partition(" ")[0].replace(",", ""))
        assert 0.9 * size < needed <= size
        assert "are free" in said


def test_failed_checkpoint_is_retried_before_the_next(tmp_path, recipe_file, monkeypatch):
    monkeypatch.setattr(async_checkpoint, "RETRY_SECONDS", 0)
    refusing(monkeypatch, [2])
    train(recipe_file, tmp_path / "run", **{"train.checkpoint_in_background": False})
    assert steps(tmp_path / "run") == [3, 4, 6, 8]


def test_last_checkpoint_is_tried_twice_before_the_run_fails(tmp_path, recipe_file, monkeypatch):
    train(recipe_file, tmp_path / "once")
    refusing(monkeypatch, [8])
    train(recipe_file, tmp_path / "lucky")
    assert hashes(tmp_path / "lucky") == hashes(tmp_path / "once")
    refusing(monkeypatch, [8, 8])
    with pytest.raises(
        MissingResourceError, match=r"the disk is full: .*step-00000008 needs [\d,]+ bytes and [\d,]+ are"
    ) as caught:
        train(recipe_file, tmp_path / "run")
    assert caught.value.exit_code == 4
    assert steps(tmp_path / "run") == [2, 4, 6]
    train(recipe_file, tmp_path / "run")
    assert hashes(tmp_path / "run") == hashes(tmp_path / "once")


def test_checkpoint_is_saved_only_after_its_metrics(tmp_path, recipe_file, monkeypatch, caplog):
    """A checkpoint of a step whose line of metrics the disk refuses would lose that line."""
    real, broken = Journal.flush, []

    def flush(journal):
        if journal.waiting and journal.path.name == "metrics.jsonl" and 3 <= len(broken) < 7:
            broken.append(journal)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        broken.append(journal) if journal.waiting else None
        real(journal)

    monkeypatch.setattr(Journal, "flush", flush)
    train(recipe_file, tmp_path / "run")
    assert steps(tmp_path / "run")[0] == 2
    assert 4 not in steps(tmp_path / "run")
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))
    assert caplog.text.count("metrics.jsonl could not be written") == 1


def test_journal_removes_a_partial_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1, "loss": float("inf")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    journal.append({"step": 2, "loss": 0.5})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_metrics_are_truncated_after_a_power_cut(tmp_path, recipe_file):
    """Zeros in the place of lines that were not synced, behind those a checkpoint made sure of."""
    train(recipe_file, tmp_path / "once")
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 300 + b'\n{"step": 6}\n')
    train(recipe_file, tmp_path / "run", steps=8)
    once, run = (read_records(tmp_path / name / "metrics.jsonl") for name in ("once", "run"))
    assert [record["loss"] for record in once] == [record["loss"] for record in run]


# Beside the training


def test_snapshot_is_isolated_from_later_updates():
    """Whatever happens to weights and moments while it is written; the memory of the copy is used again."""
    model, staging = tiny_model(), training_state.StagingBuffer()
    moments = {"exp_avg.model.norm.weight": torch.ones(32)}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    one = training_state.take_snapshot(model, moments, {"step": 1}, staging=staging)
    with torch.no_grad():
        for weight in (*model.parameters(), *moments.values()):
            weight.add_(1)
    assert one.weights.keys() == before.keys()
    assert all(torch.equal(one.weights[name], weight) for name, weight in before.items())
    assert torch.equal(one.optimizer["exp_avg.model.norm.weight"], torch.ones(32))
    two = training_state.take_snapshot(model, moments, {"step": 2}, staging=staging)
    assert two.weights["model.norm.weight"].data_ptr() == one.weights["model.norm.weight"].data_ptr()
    assert not torch.equal(two.weights["model.norm.weight"], before["model.norm.weight"])


def test_async_checkpoint_equals_synchronous(tmp_path, recipe_file):
    train(recipe_file, tmp_path / "one")
    train(recipe_file, tmp_path / "two", **{"train.checkpoint_in_background": False})
    for step in (2, 8):
        assert hashes(tmp_path / "one", step) == hashes(tmp_path / "two", step)


def test_async_checkpoint_overlaps_training_one_at_a_time(tmp_path, recipe_file, monkeypatch):
    """The first write is slow, until beyond the step whose checkpoint is next; each is of its own step nevertheless."""
    train(recipe_file, tmp_path / "once")
    real, busy, together, steps_meanwhile = training_state.save_checkpoint, [], [], []
    metrics = tmp_path / "run" / "metrics.jsonl"

    def save(folder, *rest):
        busy.append(folder)
        together.append(len(busy))
        if len(together) == 1:
            before, deadline = len(metrics.read_bytes().splitlines()), time.monotonic() + 20
            while len(metrics.read_bytes().splitlines()) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)  # in which the next one would begin
            steps_meanwhile.append(len(metrics.read_bytes().splitlines()) - before)
        found = real(folder, *rest)
        busy.remove(folder)
        return found

    monkeypatch.setattr(training_state, "save_checkpoint", save)
    train(recipe_file, tmp_path / "run")
    assert together == [1, 1, 1, 1]
    assert 1 <= steps_meanwhile[0] <= 2  # up to step 4, whose checkpoint has to wait
    for step in (2, 4, 6, 8):
        assert hashes(tmp_path / "run", step) == hashes(tmp_path / "once", step)


def test_checkpoint_is_synced_before_its_rename(tmp_path, recipe_file):
    """Every file of it after its last write, their folders, and the metrics up to its step."""
    with recorded(tmp_path / "run") as trace:
        train(recipe_file, tmp_path / "run")
    renames = [
        number for number, each in enumerate(trace.operations) if each.target and each.target.name[:5] == "step-"
    ]
    assert len(renames) == 4
    for number in renames:
        before, temporary = trace.operations[:number], trace.operations[number].path
        written = {each.path: place for place, each in enumerate(before) if each.kind == "write"}
        synced = {each.path: place for place, each in enumerate(before) if each.kind == "sync"}
        files = [path for path in written if temporary in path.parents]
        assert len(files) == 9
        for path in files:
            assert synced[path] > written[path]
            assert synced[path.parent] > written[path]
        metrics = Path("metrics.jsonl")
        durable = b"".join(each.data for each in before[: synced[metrics]] if each.path == metrics)
        assert json.loads(durable.splitlines()[-1])["step"] >= int(trace.operations[number].target.name[5:])
        assert trace.operations[number + 1].kind == "sync"
        assert trace.operations[number + 1].path == Path("checkpoints")
        assert Path() in synced


def test_checkpoint_does_not_retry_programming_errors(tmp_path, recipe_file, monkeypatch):
    def save(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(training_state, "save_checkpoint", save)
    with pytest.raises(ZeroDivisionError):
        train(recipe_file, tmp_path / "run")


def test_second_interrupt_abandons_a_slow_write(tmp_path, recipe_file, monkeypatch):
    """Within seconds, though the disk takes its time; the next start begins at the checkpoint before."""
    train(recipe_file, tmp_path / "once")
    real, slow = safetensors_writer.tensor_bytes, threading.Event()

    def memory(tensor):
        if slow.is_set():
            time.sleep(0.2)  # times 63 tensors
        return real(tensor)

    class Twice(ProgressListener):
        def on_step(self, metrics):
            if metrics["step"] == 4:
                slow.set()
            if metrics["step"] == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(safetensors_writer, "tensor_bytes", memory)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        resume_or_start(recipe_file, tmp_path / "run", {}, listener=Twice())
    assert time.monotonic() - begun < 6
    slow.clear()
    assert steps(tmp_path / "run") == [2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    train(recipe_file, tmp_path / "run")
    assert hashes(tmp_path / "run") == hashes(tmp_path / "once")


@given(st.data())
@settings(max_examples=60)
def test_safetensors_writer_equals_the_library(tmp_path_factory, data):
    shapes = st.lists(st.integers(0, 4), max_size=3)
    kinds = st.sampled_from(list(safetensors_writer.DTYPES))
    named = data.draw(st.dictionaries(st.text(min_size=1, max_size=6), st.tuples(kinds, shapes), max_size=8))
    made = {name: torch.randn(shape).mul(9).to(kind) for name, (kind, shape) in named.items() if name != "__metadata__"}
    metadata = data.draw(st.sampled_from([None, {"format": "pt"}]))
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    safetensors_writer.write(path, made, metadata)
    assert path.read_bytes() == reference(made, metadata)


# Retention


def test_prune_keeps_the_last_two_valid_checkpoints(tmp_path):
    """However old they are, and however few are to be kept."""
    model = tiny_model()
    for step in range(1, 6):
        training_state.save_checkpoint(
            training_state.checkpoint_dir(tmp_path, step), training_state.take_snapshot(model, {}, {"step": step})
        )
    for step in (3, 4):
        flip_bit(training_state.checkpoint_dir(tmp_path, step) / "model.safetensors", 77_777)
    training_state.prune_checkpoints(tmp_path, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [2, 5]


def test_prune_keeps_the_best_valid_checkpoint(tmp_path):
    """And a loss that is no number is nobody's best; what a later version wrote is not ours to delete."""
    model, losses = tiny_model(), [1.0, 2.0, None, 3.0, 4.0, 5.0]
    for step, loss in enumerate(losses, 1):
        facts = {"step": step, "validation_loss": loss}
        training_state.save_checkpoint(
            training_state.checkpoint_dir(tmp_path, step), training_state.take_snapshot(model, {}, facts)
        )
    flip_bit(training_state.checkpoint_dir(tmp_path, 1) / "model.safetensors", 77_777)
    path = training_state.checkpoint_dir(tmp_path, 4) / atomic.MANIFEST
    later = json.loads(path.read_text()) | {"format_version": 99}
    path.write_text(json.dumps(later | {"sha256": atomic.manifest_hash(later)}))
    (training_state.checkpoint_dir(tmp_path, 3) / "training" / "state.json").write_text("[]")
    training_state.prune_checkpoints(tmp_path, keep_last=2, keep_best=True)
    assert steps(tmp_path) == [2, 4, 5, 6]


def test_partial_checkpoints_are_removed_before_the_disk_check(tmp_path, recipe_file, monkeypatch):
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    left = tmp_path / "run" / "checkpoints" / ".tmp-step-00000006"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(atomic, "free_bytes", lambda _: 0 if left.exists() else 10**9)
    train(recipe_file, tmp_path / "run", steps=8)
    assert not left.exists()


# The corpus and the lock


def test_resume_refuses_a_corrupted_corpus(tmp_path, recipe_file):
    """A flipped bit in one token stops the run before anything is saved."""
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    shard = tmp_path / "run" / "corpus" / "train" / "00000.ds"
    flip_bit(shard, 8 * shard.stat().st_size // 2)
    with pytest.raises(InvalidFileError, match="the tokens in .* are damaged"):
        train(recipe_file, tmp_path / "run", steps=8)
    assert steps(tmp_path / "run") == [2, 4]


def test_resume_refuses_a_changed_tokenizer(tmp_path, recipe_file):
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    file = tmp_path / "run" / "corpus" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidFileError, match="tokenizer is damaged: it is not what made the corpus"):
        train(recipe_file, tmp_path / "run", steps=8)


def test_resume_refuses_an_edited_recipe(tmp_path, recipe_file):
    """Also where the recipe that is given has nothing to say against it."""
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 8})
    stored = tmp_path / "run" / "recipe.toml"
    stored.write_text(stored.read_text().replace("weight_decay = 0.01", "weight_decay = 0.03"))
    with pytest.raises(InvalidFileError, match=r"recipe.toml has optim.weight_decay 0.03, but .* was made with 0.01"):
        train(stored, tmp_path / "run")


def test_run_lock_of_a_dead_process_is_taken_over(tmp_path, recipe_file, caplog):
    train(recipe_file, tmp_path / "run")
    assert not (tmp_path / "run" / ".lock-holder").exists()
    (tmp_path / "run" / ".lock-holder").write_text("4711 on elsewhere")
    train(recipe_file, tmp_path / "run")
    assert "process 4711 on elsewhere left" in caplog.text
    assert "is taken over" in caplog.text
    with RunFolder.open(tmp_path / "run"), pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        train(recipe_file, tmp_path / "run")
