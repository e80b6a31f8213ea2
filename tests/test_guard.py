"""Numbers that go wrong: nothing learned from them, everything written down, every decision made again."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import NANO
from hypothesis import given
from hypothesis import strategies as st

from smolforge import cli
from smolforge.checkpoint import training_state
from smolforge.config import Guard
from smolforge.errors import Stopped, TrainingDivergedError
from smolforge.operating_system import SCHEDULER_SIGNALS
from smolforge.runs import train
from smolforge.testing import Crash, flip_bit, power, recorded
from smolforge.training import guard, loop
from smolforge.training.guard import LossGuard, Rewind, fold_incidents
from smolforge.training.run_folder import Journal, RunFolder, read_records


@pytest.fixture
def recipe_file(tmp_path, text_file):
    settings = NANO["train"] | {"steps": 12, "checkpoint_every": 4, "keep_last": 9}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(NANO | {"train": settings, "data": {"sources": [str(text_file)]}}))
    return path


def hashes(run: Path, step: int) -> list[str]:
    files = training_state.check_checkpoint(training_state.checkpoint_dir(run, step))["files"]
    return [files[name]["sha256"] for name in ("model.safetensors", "training/optimizer.safetensors")]


def incidents(run: Path) -> list[dict]:
    path = run / "incidents.jsonl"
    return read_records(path) if path.is_file() else []


def batches(run: Path) -> list[int]:
    return [record["batch"] for record in read_records(run / "metrics.jsonl")]


# Updates left out


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_non_finite_step_changes_no_weight_and_no_moment(tmp_path, recipe_file, poison, kind, optimizer):
    """Weights and moments after step 6 are those after step 5, to the bit; the run goes on."""
    poison(kind, 5)
    given = {"optim.name": optimizer, "optim.schedule.steps": 12, "train.checkpoint_every": 1, "train.keep_last": 20}
    run = train(recipe_file, tmp_path / "run", steps=6, **given)
    assert hashes(run.folder, 6) == hashes(run.folder, 5)
    train(recipe_file, tmp_path / "run", steps=12, **given)
    assert hashes(run.folder, 7) != hashes(run.folder, 6)
    (incident,) = incidents(run.folder)
    assert (incident["kind"], incident["step"]) == ("skip", 6)
    records = read_records(run.folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["step"] for record in records if "left_out" in record] == [6]
    assert records[5]["loss" if kind == "loss" else "grad_norm"] is None
    assert records[5]["tokens"] == records[4]["tokens"]
    assert records[6]["loss"] > 0


def test_skipped_updates_are_skipped_again_on_resume(tmp_path, recipe_file, poison):
    """Also where the fault does not come again, as those of hardware do not."""
    poison("loss", 5)
    train(recipe_file, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (8, 12):
        shutil.rmtree(training_state.checkpoint_dir(tmp_path / "again", step))
    poison("nothing", 5)
    train(recipe_file, tmp_path / "again")
    assert hashes(tmp_path / "again", 12) == hashes(tmp_path / "run", 12)
    assert len(incidents(tmp_path / "again")) == 1


def test_guard_disabled_keeps_non_finite_updates(tmp_path, recipe_file, poison):
    poison("gradient", 5)
    run = train(recipe_file, tmp_path / "run", **{"guard.enabled": False})
    assert incidents(run.folder) == []
    assert not all(weight.isfinite().all() for weight in run.model.parameters())


# Rewinds


def planted(source: Path, run: Path, *decisions: dict) -> Path:
    """A folder in which a run will begin with decisions already made."""
    run.mkdir()
    (run / ".lock").touch()
    (run / "incidents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in decisions))
    return run


def test_consecutive_skips_rewind_and_skip_the_data(tmp_path, recipe_file, poison, caplog):
    """The end is that of a run that was told from the start to leave that data out, and met no fault."""
    poison("loss", 5, 6, 7)
    run = train(recipe_file, tmp_path / "run")
    assert batches(run.folder) == [0, 1, 2, 3, *range(8, 16)]
    kinds = [(each["kind"], each["step"]) for each in incidents(run.folder)]
    assert kinds == [("skip", 6), ("skip", 7), ("skip", 8), ("rewind", 8)]
    assert "back to step 4, 4 batches are skipped" in caplog.text
    assert not any("left_out" in record for record in read_records(run.folder / "metrics.jsonl"))
    decision = {"kind": "rewind", "step": 8, "to": 4, "next_batch": 8, "reason": ""}
    train(recipe_file, planted(run.folder, tmp_path / "told", decision))
    assert hashes(tmp_path / "told", 12) == hashes(run.folder, 12)


def test_rewind_before_the_first_checkpoint_starts_again(tmp_path, recipe_file, poison):
    poison("loss", 0, 1, 2)
    run = train(recipe_file, tmp_path / "run")
    assert batches(run.folder) == list(range(3, 15))


def test_loss_spike_rewinds(tmp_path, recipe_file, poison, monkeypatch):
    monkeypatch.setattr(guard, "FEWEST", 4)
    poison("spike", 6)
    run = train(recipe_file, tmp_path / "run")
    (incident,) = incidents(run.folder)
    assert (incident["kind"], incident["step"], incident["to"]) == ("rewind", 7, 4)
    assert "where the last 6 were" in incident["reason"]
    assert batches(run.folder) == [0, 1, 2, 3, *range(7, 15)]
    ignored = train(recipe_file, tmp_path / "ignored", **{"guard.spike": "none"})
    assert incidents(ignored.folder) == []


@pytest.mark.parametrize("lost", [(8, 12), (4, 8, 12)])
def test_guard_decisions_repeat_from_any_checkpoint(tmp_path, recipe_file, poison, lost):
    """Damage the checkpoints that came after, or even the one that was gone back to."""
    poison("loss", 5, 6, 7)
    train(recipe_file, tmp_path / "run", **{"train.checkpoint_every": 2})
    expected = hashes(tmp_path / "run", 12)
    for step in {*lost, 10, 6}:
        flip_bit(training_state.checkpoint_dir(tmp_path / "run", step) / "model.safetensors", 40_000)
    train(recipe_file, tmp_path / "run", **{"train.checkpoint_every": 2})
    assert hashes(tmp_path / "run", 12) == expected


def test_crash_between_decision_and_rewind_changes_nothing(tmp_path, recipe_file, poison, monkeypatch):
    poison("loss", 5, 6, 7)
    train(recipe_file, tmp_path / "once")
    from smolforge.runs import run as run_module

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "rewind_run", lambda *_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            train(recipe_file, tmp_path / "before")
        real = RunFolder.record_incident

        def dies(self, incident):
            real(self, incident)
            if incident["kind"] == "rewind":
                raise Crash

        patch.undo()
        patch.setattr(RunFolder, "record_incident", dies)
        with pytest.raises(Crash):
            train(recipe_file, tmp_path / "after")
    for name in ("before", "after"):
        train(recipe_file, tmp_path / name)
        assert hashes(tmp_path / name, 12) == hashes(tmp_path / "once", 12)
        assert incidents(tmp_path / name) == incidents(tmp_path / "once")


def test_checkpoint_restores_the_incidents(tmp_path, recipe_file, poison):
    """Without incidents.jsonl, as where only the checkpoint was carried elsewhere."""
    poison("loss", 5, 6, 7)
    train(recipe_file, tmp_path / "run")
    shutil.rmtree(training_state.checkpoint_dir(tmp_path / "run", 12))
    (tmp_path / "run" / "incidents.jsonl").rename(tmp_path / "aside")
    train(recipe_file, tmp_path / "run")
    assert batches(tmp_path / "run") == [0, 1, 2, 3, *range(8, 16)]
    assert (tmp_path / "run" / "incidents.jsonl").read_bytes() == (tmp_path / "aside").read_bytes()


def test_too_many_rewinds_end_with_a_report(tmp_path, recipe_file, poison):
    """And one more allowed goes on."""
    poison("loss", *range(5, 12))
    with pytest.raises(
        TrainingDivergedError,
        match=r"ends at step 7: the loss is nan.*1 times before.*from .*step-00000004; --guard.max-rewinds 4",
    ) as caught:
        train(recipe_file, tmp_path / "run", **{"guard.max_rewinds": 1})
    assert caught.value.exit_code == 1
    assert [each["kind"] for each in incidents(tmp_path / "run")].count("rewind") == 1
    assert incidents(tmp_path / "run")[-1]["kind"] == "stop"
    assert [folder.name for folder in training_state.list_checkpoints(tmp_path / "run")] == ["step-00000004"]
    run = train(recipe_file, tmp_path / "run", **{"guard.max_rewinds": 4})
    assert run.metrics["step"] == 12
    assert batches(run.folder) == [0, 1, 2, 3, *range(11, 19)]
    assert [record["step"] for record in read_records(run.folder / "metrics.jsonl") if "left_out" in record] == [5]


def test_divergence_report_is_one_line_on_the_command_line(tmp_path, recipe_file, poison, capsys):
    poison("loss", *range(12))
    assert (
        cli.run(["train", str(recipe_file), "--run", str(tmp_path / "run"), "--guard.max-rewinds", "0", "--json"]) == 1
    )
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("smolforge: the run ends at step 3: the loss is nan")


def test_guard_settings_may_change_on_resume(tmp_path, recipe_file, poison):
    poison("gradient", 5)
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 12})
    train(recipe_file, tmp_path / "run", steps=7, **{"guard.enabled": False})
    assert incidents(tmp_path / "run") == []


@pytest.mark.parametrize("every", [1, 4])
def test_rewind_goes_to_before_the_first_skip(tmp_path, recipe_file, poison, every):
    """No checkpoint is made among updates that are left out, however short the interval."""
    poison("loss", 5, 6, 7)
    run = train(recipe_file, tmp_path / "run", **{"train.checkpoint_every": every})
    assert batches(run.folder) == [*range(5 if every == 1 else 4), *range(8, 15 if every == 1 else 16)]


def test_stop_does_not_change_a_later_rewind(tmp_path, recipe_file, poison):
    """The checkpoint of a signal is not where an unbroken run would go back to."""
    poison("loss", 6, 7, 8)
    train(recipe_file, tmp_path / "once")
    train(recipe_file, tmp_path / "run", steps=6, **{"optim.schedule.steps": 12})
    train(recipe_file, tmp_path / "run", steps=12, **{"optim.schedule.steps": 12})
    assert batches(tmp_path / "run") == batches(tmp_path / "once") == [0, 1, 2, 3, *range(9, 17)]
    assert hashes(tmp_path / "run", 12) == hashes(tmp_path / "once", 12)


def test_loss_spike_is_measured_against_losses_before_a_stop(tmp_path, recipe_file, poison, monkeypatch):
    monkeypatch.setattr(guard, "FEWEST", 4)
    poison("spike", 6)
    train(recipe_file, tmp_path / "once")
    train(recipe_file, tmp_path / "run", steps=4, **{"optim.schedule.steps": 12})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(recipe_file, tmp_path / "run", steps=12)
    assert incidents(tmp_path / "run") == incidents(tmp_path / "once") != []
    assert hashes(tmp_path / "run", 12) == hashes(tmp_path / "once", 12)


def test_full_disk_loses_no_incident(tmp_path, recipe_file, poison, monkeypatch):
    """What could not be written is in memory, in the next checkpoint, and written when there is room."""
    poison("loss", 5, 6, 7)
    train(recipe_file, tmp_path / "once")
    real, full = Journal.flush, []

    def flush(journal):
        if journal.waiting and journal.path.name == "incidents.jsonl" and len(full) < 6:
            full.append(journal)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(journal)

    monkeypatch.setattr(Journal, "flush", flush)
    run = train(recipe_file, tmp_path / "run")
    assert len(full) == 6
    assert incidents(run.folder) == incidents(tmp_path / "once")
    assert hashes(run.folder, 12) == hashes(tmp_path / "once", 12)
    assert training_state.read_metadata(training_state.checkpoint_dir(run.folder, 12))["incidents"] == incidents(
        run.folder
    )


@pytest.mark.parametrize("number", [signal.SIGINT, SCHEDULER_SIGNALS[0]])
def test_signal_during_a_rewind_stops_the_run(tmp_path, recipe_file, poison, monkeypatch, number):
    """Between the decision and the step after it: the run stops there, and goes on from there."""
    poison("loss", 5, 6, 7)
    train(recipe_file, tmp_path / "once")
    real = RunFolder.record_incident

    def record(self, incident):
        real(self, incident)
        if incident["kind"] == "rewind":
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record_incident", record)
        with pytest.raises(Stopped, match=f"stopped by {number.name} after step 4") as caught:
            train(recipe_file, tmp_path / "run")
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 75)
    train(recipe_file, tmp_path / "run")
    assert hashes(tmp_path / "run", 12) == hashes(tmp_path / "once", 12)


# The judge and its memory


def test_loss_guard_needs_many_distant_losses_for_a_spike():
    judge = LossGuard(Guard(), fold_incidents([]), 0, recent=[3.0] * 63, record=lambda _: None)
    assert judge(1, 99.0, 1.0) is None
    close = LossGuard(Guard(), fold_incidents([]), 0, recent=[3.0, 3.01] * 64, record=lambda _: None)
    assert close(1, 3.4, 1.0) is None
    with pytest.raises(Rewind, match="the loss is 3.6, where the last 128 were"):
        close(2, 3.6, 1.0)


def test_loss_guard_counts_skips_before_a_resume():
    skips = [{"kind": "skip", "step": step, "reason": "the loss is nan"} for step in (9, 10)]
    judge = LossGuard(Guard(), fold_incidents(skips), 10, recent=[], record=lambda _: None)
    with pytest.raises(Rewind, match="3 updates in a row"):
        judge(11, float("nan"), 1.0)


def test_loss_spike_after_skips_rewinds_to_before_them():
    """A signal may have had a checkpoint saved among them, which a run without stops does not have."""
    skips = [{"kind": "skip", "step": step, "reason": "the loss is nan"} for step in (9, 10)]
    judge = LossGuard(Guard(), fold_incidents(skips), 10, recent=[3.0] * 128, record=lambda _: None)
    with pytest.raises(Rewind, match="the loss is 99") as raised:
        judge(11, 99.0, 1.0)
    assert raised.value.first == 9


@given(st.lists(st.tuples(st.sampled_from(["go", "skip", "save", "rewind"]), st.integers(0, 3)), max_size=60))
def test_fold_incidents_equals_the_live_history(history):
    """Live and replayed from any step: the same batches, the same updates left out, no batch used twice."""
    done, number, used, skipped, saved, said = 0, 0, [], set(), [0], []
    for what, back in history:
        match what:
            case "save":
                saved.append(done)
            case "rewind" if done:
                to = saved[-1 - back % len(saved)]  # a damaged one is passed over
                saved = [step for step in saved if step <= to]
                said.append({"kind": "rewind", "step": done + 1, "to": to, "next_batch": number + 1})
                skipped = {step for step in skipped if step <= to}
                used, done, number = used[:to], to, number + 1
            case "go" | "skip":
                done += 1
                used.append(number)
                number += 1
                if what == "skip":
                    skipped.add(done)
                    said.append({"kind": "skip", "step": done, "reason": ""})
    decisions = fold_incidents(said)
    assert [decisions.next_batch(step) for step in range(done)] == used
    assert set(decisions.skipped) == skipped
    assert decisions.next_batch(done) == number
    assert len(set(used)) == len(used)


def test_checkpoint_of_a_stop_among_skips_is_no_rewind_point(tmp_path, recipe_file, poison):
    """Even where a regular checkpoint would have been: an unbroken run makes none there."""
    poison("loss", 7, 8, 9)
    train(recipe_file, tmp_path / "once")
    train(recipe_file, tmp_path / "run", steps=8, **{"optim.schedule.steps": 12})
    assert training_state.checkpoint_dir(tmp_path / "run", 8).is_dir()
    train(recipe_file, tmp_path / "run", steps=12, **{"optim.schedule.steps": 12})
    assert batches(tmp_path / "run") == batches(tmp_path / "once") == [0, 1, 2, 3, *range(10, 18)]
    assert hashes(tmp_path / "run", 12) == hashes(tmp_path / "once", 12)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "fate",
    [power.all_lost, *(pytest.param(each, marks=pytest.mark.long) for each in (power.names_kept, power.contents_kept))],
)
def test_power_loss_around_a_rewind_changes_nothing(tmp_path, recipe_file, poison, fate):
    """What was taken back must not come again beside the decision: a checkpoint of step 8, and back to step 4."""
    poison("loss", 7, 8, 9)
    disk, settings = tmp_path / "disk", {"optim.schedule.steps": 12}
    train(recipe_file, disk / "run", steps=8, **settings)
    with recorded(disk) as trace:
        train(recipe_file, disk / "run", steps=12, **settings)
    said = [str(each) for each in trace.operations]
    aside = next(at for at, each in enumerate(said) if each.startswith("rename") and ".aside" in each)
    decided_at = next(at for at, each in enumerate(said) if at > aside and "write run/incidents.jsonl" in each)
    for at in range(aside, decided_at + 5):
        cut = tmp_path / f"cut-{at}"
        power.after_power_loss(trace, at, cut, persist=fate)
        train(recipe_file, cut / "run", steps=12, **settings)
        assert hashes(cut / "run", 12) == hashes(disk / "run", 12), said[at]


def test_async_steps_change_no_guard_decision(tmp_path, recipe_file, poison, monkeypatch):
    """As on a device that is asked ahead: an update left out, a streak with a rewind, and a spike."""
    monkeypatch.setattr(guard, "FEWEST", 4)
    poison("gradient", 2)
    poison("loss", 5, 6, 7)
    poison("spike", 12)
    heard = {}
    for ahead in (False, True):
        monkeypatch.setattr(loop, "is_async", lambda device, ahead=ahead: ahead)
        run = train(recipe_file, tmp_path / str(ahead))
        records = read_records(run.folder / "metrics.jsonl")
        plain = [
            {key: record.get(key) for key in ("step", "tokens", "loss", "batch", "left_out")} for record in records
        ]
        heard[ahead] = (plain, incidents(run.folder), hashes(run.folder, 12), batches(run.folder))
    assert heard[True] == heard[False]
    assert [incident["kind"] for incident in heard[True][1]] == ["skip", "skip", "skip", "skip", "rewind", "rewind"]


def test_async_device_gets_the_next_step_before_metrics(tmp_path, recipe_file, monkeypatch):
    """But for those whose model is looked at."""
    order: list[str] = []
    launch, hear = loop.train_step, loop.finish_step
    monkeypatch.setattr(loop, "is_async", lambda device: True)
    monkeypatch.setattr(
        loop,
        "train_step",
        lambda *given, **named: (order.append(f"launch {named['completed'] + 1}"), launch(*given, **named))[1],
    )
    monkeypatch.setattr(
        loop, "finish_step", lambda *given, **named: (order.append(f"hear {given[0].step}"), hear(*given, **named))[1]
    )
    train(recipe_file, tmp_path / "run", steps=6)
    assert order == [
        *("launch 1", "launch 2", "hear 1", "launch 3", "hear 2", "launch 4", "hear 3", "hear 4"),
        *("launch 5", "launch 6", "hear 5", "hear 6"),
    ]
