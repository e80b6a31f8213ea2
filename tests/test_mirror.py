"""A mirror has whole copies or none, training never waits for it, and a run that is gone goes on from it exactly."""

import errno
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from campaigns import Outcome
from conftest import NANO

from smolforge import cli
from smolforge.checkpoint import loading, training_state
from smolforge.errors import ConfigError, MissingResourceError, Stopped
from smolforge.runs import async_checkpoint, mirror, resume_or_start, train
from smolforge.runs.context import ProgressListener
from smolforge.runs.mirror_folder import MirrorFolder
from smolforge.testing import failing, flip_bit
from smolforge.testing.disk import EVERY_KIND, intercept, renaming_by_copies
from smolforge.training.run_folder import read_records


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A recipe of 8 steps with a checkpoint each second one, and its outcome without a mirror."""
    from smolforge.testing import sentences

    folder = tmp_path_factory.mktemp("bench")
    (folder / "text.txt").write_text(sentences(300))
    recipe = folder / "tiny.json"
    settings = NANO["train"] | {"checkpoint_every": 2, "evaluate_every": "none"}
    schedule = NANO["optim"]["schedule"] | {"steps": 8}
    content = NANO | {"train": settings, "optim": NANO["optim"] | {"schedule": schedule}}
    recipe.write_text(json.dumps(content | {"data": {"sources": [str(folder / "text.txt")]}}))
    train(recipe, folder / "once")
    return recipe, Outcome.of(folder / "once")


@pytest.fixture
def recipe(bench):
    return bench[0]


@pytest.fixture
def goal(bench):
    return bench[1]


def mirrored(recipe, folder, steps=8, **settings):
    """Train in folder/run with the mirror folder/mirror."""
    return train(recipe, folder / "run", steps=steps, **{"train.mirror": str(folder / "mirror")} | settings)


def steps(folder):
    return [training_state.step_from_dir(path) for path in training_state.list_checkpoints(folder)]


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


# What is in it


def test_mirror_is_a_run_folder_of_exact_copies(tmp_path, recipe, goal, capsys):
    metrics = mirrored(recipe, tmp_path).metrics
    assert metrics["mirrored_step"] == 8
    assert Outcome.of(tmp_path / "mirror") == goal
    for folder in training_state.list_checkpoints(tmp_path / "mirror"):
        original = tmp_path / "run" / "checkpoints" / folder.name
        assert (folder / "manifest.json").read_bytes() == (original / "manifest.json").read_bytes()
    assert loading.resolve_model_path(tmp_path / "mirror").parent.parent == tmp_path / "mirror"
    assert cli.run(["inspect", str(tmp_path / "mirror"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert not list((tmp_path / "mirror").rglob(".tmp-*"))


@pytest.mark.parametrize("named", [True, False], ids=["named tokenizer", "trained tokenizer"])
def test_lost_run_goes_on_exactly_from_its_mirror(tmp_path, recipe, goal, caplog, tokenizer, named):
    """Its corpus is made again, with the tokenizer that it names or trains."""
    caplog.set_level("INFO", "smolforge")
    settings = {"tokenizer": str(tmp_path / "tokenizer")} if named else {}
    if named:
        tokenizer.save(tmp_path / "tokenizer")
        train(recipe, tmp_path / "once", **settings)
        goal = Outcome.of(tmp_path / "once")
    mirrored(recipe, tmp_path, steps=4, **settings)
    shutil.rmtree(tmp_path / "run")
    mirrored(recipe, tmp_path, **settings)
    assert f"restored step 4 from {tmp_path / 'mirror'}" in [record.message for record in caplog.records]
    assert Outcome.of(tmp_path / "run") == Outcome.of(tmp_path / "mirror") == goal
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 4]


def test_damaged_newest_copy_falls_back_to_the_one_before(tmp_path, recipe, goal, caplog):
    mirrored(recipe, tmp_path, steps=6)
    shutil.rmtree(tmp_path / "run")
    flip_bit(training_state.checkpoint_dir(tmp_path / "mirror", 6) / "model.safetensors", 77_777)
    mirrored(recipe, tmp_path)
    assert any(message.startswith("step-00000006 of the mirror is skipped") for message in warnings(caplog))
    _, restored = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert restored["step"] in (2, 4)  # the copy of 4 may have been overtaken
    assert Outcome.of(tmp_path / "run") == Outcome.of(tmp_path / "mirror") == goal


def test_newer_checkpoint_here_is_kept_and_damaged_one_replaced(tmp_path, recipe, goal):
    mirrored(recipe, tmp_path, steps=4)
    train(recipe, tmp_path / "run", steps=6, **{"train.mirror": "none"})
    assert mirrored(recipe, tmp_path, steps=6).metrics["mirrored_step"] == 6
    flip_bit(training_state.checkpoint_dir(tmp_path / "run", 6) / "model.safetensors", 77_777)
    mirrored(recipe, tmp_path)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 4, 6, 6]
    assert Outcome.of(tmp_path / "run") == goal


def test_checkpoints_that_were_rolled_back_are_not_restored(tmp_path, recipe):
    """Neither by the incidents of the run's folder, nor by those of later journals of the mirror."""
    mirrored(recipe, tmp_path, steps=4)
    folder, rewind = MirrorFolder(tmp_path / "mirror"), {"kind": "rewind", "step": 5, "to": 2, "next_batch": 5}
    assert folder.restore(tmp_path / "other", 0, [rewind]) == 2
    (tmp_path / "mirror" / "journals" / "step-00000002" / "incidents.jsonl").write_text(json.dumps(rewind) + "\n")
    assert folder.restore(tmp_path / "third", 0, []) == 2
    folder.prune(9, True, incidents=[rewind])
    assert steps(tmp_path / "mirror") == [2]


# Whose it is


def test_mirror_of_another_run_is_refused(tmp_path, recipe):
    mirrored(recipe, tmp_path, steps=2)
    other = {"train.mirror": str(tmp_path / "mirror")}
    with pytest.raises(ConfigError, match="settings that must not change: seed"):
        train(recipe, tmp_path / "other", steps=2, seed=5, **other)
    assert not (tmp_path / "other").exists()
    train(recipe, tmp_path / "other", steps=2)
    with pytest.raises(ConfigError, match="mirror is the mirror of another run; give --train.mirror another folder"):
        train(recipe, tmp_path / "other", steps=4, **other)
    with pytest.raises(ConfigError, match="--fresh refuses to resume it"):
        resume_or_start(recipe, tmp_path / "third", other, fresh=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with pytest.raises(ConfigError, match="photos exists and is not a mirror"):
        train(recipe, tmp_path / "other", steps=4, **{"train.mirror": str(tmp_path / "photos")})
    with pytest.raises(ConfigError, match="neither may be inside the other"):
        train(recipe, tmp_path / "other", steps=4, **{"train.mirror": str(tmp_path / "other" / "mirror")})


def test_unmounted_mirror_is_refused_by_a_new_run_and_warned_of_by_another(tmp_path, recipe, caplog):
    """And never created on the disk below it."""
    missing = {"train.mirror": str(tmp_path / "drive" / "mirror")}
    with pytest.raises(
        MissingResourceError, match=r"cannot be reached .*; mount its disk, create .*drive, or"
    ) as caught:
        train(recipe, tmp_path / "run", steps=2, **missing)
    assert caught.value.exit_code == 4
    (tmp_path / "drive").mkdir()
    train(recipe, tmp_path / "run", steps=2, **missing)
    (tmp_path / "drive" / "mirror").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingResourceError, match=r"step 4 is saved in .*run, but its mirror .* is gone; .* mounted"):
        train(recipe, tmp_path / "run", steps=4, **missing)
    assert [message[:12] for message in warnings(caplog)] == ["the mirror /", "NOT MIRRORED"]
    assert steps(tmp_path / "run") == [2, 4]
    assert list((tmp_path / "drive").iterdir()) == []
    (tmp_path / "elsewhere").rename(tmp_path / "drive" / "mirror")
    assert train(recipe, tmp_path / "run", steps=4, **missing).metrics["mirrored_step"] == 4
    assert steps(tmp_path / "drive" / "mirror") == [2, 4]


@pytest.mark.long
def test_two_sessions_of_one_run_leave_whole_copies(tmp_path, recipe, goal):
    """The second one is restored from the mirror while the first goes on."""
    mirrored(recipe, tmp_path, steps=4)
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    second = threading.Thread(target=mirrored, args=(recipe, tmp_path))
    second.start()
    train(recipe, tmp_path / "first", steps=8, **{"train.mirror": str(tmp_path / "mirror")})
    second.join()
    assert Outcome.of(tmp_path / "run") == Outcome.of(tmp_path / "first") == Outcome.of(tmp_path / "mirror") == goal


# Faults

ERRORS = (errno.EIO, errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENOTCONN, errno.ESTALE)


@pytest.mark.parametrize(
    "error", [pytest.param(error, marks=pytest.mark.long if error > errno.EIO else ()) for error in ERRORS]
)
def test_run_survives_a_mirror_that_fails(tmp_path, recipe, goal, caplog, error):
    """At any operation, once or from then on; then one warning, and the next start completes the copy."""
    chance = random.Random(error)
    for times in (1, None):
        caplog.clear()
        folder = tmp_path / str(times)
        folder.mkdir()
        mirrored(recipe, folder, steps=2)
        with failing(folder / "mirror", chance.randrange(20, 60), error, kinds=EVERY_KIND, times=times):
            try:
                mirrored(recipe, folder, steps=6)
            except MissingResourceError as refused:
                assert times is None
                assert "step 6 is saved in" in str(refused)
                assert os.strerror(error) in str(refused) or "the disk is full" in str(refused)
        assert Outcome.of(folder / "run").losses == goal.losses[:6]
        assert sum(message.startswith("NOT MIRRORED") for message in warnings(caplog)) <= 1
        shutil.rmtree(folder / "run")
        mirrored(recipe, folder)
        assert Outcome.of(folder / "run") == Outcome.of(folder / "mirror") == goal


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.long)])
def test_start_survives_each_operation_that_fails(tmp_path, recipe, stride):
    """It restores the newest copy, or the one before where that could not be read, or refuses with a sentence."""
    mirrored(recipe, tmp_path, steps=4)
    outcomes = {start_amid_a_fault(tmp_path, number) for number in range(0, operations_of_a_start(tmp_path), stride)}
    assert {4, os.strerror(errno.ENOTCONN)} <= outcomes <= {2, 4, os.strerror(errno.ENOTCONN)}


def start_amid_a_fault(folder, number):
    """Return the step that is restored where one operation fails, or why none is."""
    run, restored = folder / f"at-{number}", []
    with failing(folder / "mirror", number, errno.ENOTCONN, kinds=EVERY_KIND, times=1):
        try:
            found = mirror.find_mirror(folder / "mirror", run)
            mirror.restore_newer(found, run, lambda step, _: restored.append(step))
        except MissingResourceError as error:
            assert list((run / "checkpoints").glob("step-*")) == []
            return re.search(os.strerror(errno.ENOTCONN), str(error))[0]
    assert training_state.is_valid(training_state.checkpoint_dir(run, restored[0]))
    return restored[0]


def operations_of_a_start(folder):
    seen = []
    with intercept(folder / "mirror", lambda each, perform: (seen.append(each), perform(each))[1], reads=True):
        assert start_amid_a_fault(folder, 10**9) == 4
    return len(seen)


def test_mirror_that_works_again_is_reported_once(tmp_path, recipe, caplog):
    class Unplugged(ProgressListener):
        def on_step(self, metrics):
            if metrics["step"] == 3:
                faults.enter_context(failing(tmp_path / "mirror", error=errno.ENOTCONN, kinds=EVERY_KIND))
            if metrics["step"] == 7:
                wait_for(lambda: bool(warnings(caplog)))
                faults.close()

    with ExitStack() as faults:
        settings = {"train.mirror": str(tmp_path / "mirror"), "train.steps": 8}
        resume_or_start(recipe, tmp_path / "run", settings, listener=Unplugged())
    lost, again = warnings(caplog)
    assert lost.startswith("NOT MIRRORED: step ")
    assert f"{os.strerror(errno.ENOTCONN)} ({tmp_path / 'mirror'}" in lost
    assert again == f"the mirror {tmp_path / 'mirror'} works again; it has step {again[-1]}"
    assert "works again" in (tmp_path / "run" / "run.log").read_text()


def test_mirror_needs_no_sync_and_no_atomic_rename(tmp_path, recipe, goal):
    """As on FUSE: syncs are refused, and a rename copies file by file."""
    (tmp_path / "mirror").mkdir()
    with failing(tmp_path / "mirror", error=errno.EINVAL, kinds=("sync",)), renaming_by_copies(tmp_path / "mirror"):
        assert mirrored(recipe, tmp_path).metrics["mirrored_step"] == 8
    assert Outcome.of(tmp_path / "mirror") == goal


def test_copy_that_reads_back_differently_is_no_copy(tmp_path, recipe, caplog):
    """A disk that takes every byte and keeps others: nothing gets the name of a step."""

    def lie(operation, perform):
        wrong = operation.kind == "write" and operation.path.name == "model.safetensors"
        return perform(operation) if not wrong else write_zeros(operation, perform)

    (tmp_path / "mirror").mkdir()
    with intercept(tmp_path / "mirror", lie), pytest.raises(MissingResourceError, match="or its copy, is damaged"):
        mirrored(recipe, tmp_path)
    assert steps(tmp_path / "mirror") == []
    assert sum(message.startswith("NOT MIRRORED") for message in warnings(caplog)) == 1


def write_zeros(operation, perform):
    from dataclasses import replace

    return perform(replace(operation, data=bytes(len(operation.data))))


def test_full_mirror_gives_up_the_oldest_but_never_the_only_copy(tmp_path, recipe):
    """A disk with room for one more copy than it has, then for none."""
    mirrored(recipe, tmp_path, steps=4)
    size = sum(path.stat().st_size for path in training_state.checkpoint_dir(tmp_path / "run", 4).rglob("*"))
    for copies, left in ((2.6, [4, 6]), (1.6, [6])):
        with limited(tmp_path / "mirror", int(copies * size)):
            if left == [4, 6]:
                mirrored(recipe, tmp_path, steps=6)
            else:
                with pytest.raises(MissingResourceError, match=r"step 8 is saved .*is full: .* needs [\d,]+ bytes"):
                    mirrored(recipe, tmp_path, steps=8)
        assert steps(tmp_path / "mirror") == left
        assert all(MirrorFolder(tmp_path / "mirror").is_whole(path) for path in (tmp_path / "mirror").glob("*/step-*"))


def limited(folder, size):
    """A disk of so many bytes."""

    def rule(operation, perform):
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if operation.kind == "write" and used + len(operation.data) > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return perform(operation)

    return intercept(folder, rule)


# Beside the training


@contextmanager
def hung(folder):
    """A disk that answers no call until the end; yields an event that is set by the first of them."""
    asked, released = threading.Event(), threading.Event()

    def rule(operation, perform):
        asked.set()
        released.wait()
        return perform(operation)

    with intercept(folder, rule):
        try:
            yield asked
        finally:
            released.set()


def wait_for(ready):
    deadline = time.monotonic() + 20
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ready()


def test_training_and_saving_never_wait_for_a_hung_mirror(tmp_path, recipe, goal, monkeypatch):
    """All steps and checkpoints are there while the first copy hangs; the copied one is not pruned, others are."""
    seen = {}

    class Watching(ProgressListener):
        def on_mirror(self, step, bytes_moved):
            if not seen:
                seen["steps"] = len(read_records(tmp_path / "run" / "metrics.jsonl"))
                seen["checkpoints"] = steps(tmp_path / "run")

    monkeypatch.setattr(mirror, "STALL_SECONDS", 0.3)
    mirrored(recipe, tmp_path, steps=2)
    settings = {"train.mirror": str(tmp_path / "mirror"), "train.steps": 8}
    with hung(tmp_path / "mirror") as asked, pytest.raises(MissingResourceError, match="not answered for 0.3 s"):
        resume_or_start(recipe, tmp_path / "run", settings, listener=Watching())
    assert asked.is_set()
    assert seen == {"steps": 8, "checkpoints": [2, 6, 8]}
    assert Outcome.of(tmp_path / "run") == goal


@pytest.mark.long
def test_hung_mirror_at_the_start_is_given_up(tmp_path, recipe, monkeypatch, caplog):
    mirrored(recipe, tmp_path, steps=2)
    monkeypatch.setattr(mirror, "STALL_SECONDS", 0.2)
    released = threading.Event()
    monkeypatch.setattr(MirrorFolder, "attach", lambda *_, **__: released.wait())
    with pytest.raises(MissingResourceError, match=r"cannot be reached \(.*mirror has not answered for 0.2 s\)"):
        train(recipe, tmp_path / "new", steps=2, **{"train.mirror": str(tmp_path / "mirror")})
    with pytest.raises(MissingResourceError, match="step 4 is saved"):
        mirrored(recipe, tmp_path, steps=4)
    assert any("cannot be reached" in message for message in warnings(caplog))
    released.set()


@pytest.mark.long
def test_slow_mirror_is_waited_for_and_overtaken_copies_are_skipped(tmp_path, recipe, goal, monkeypatch, caplog):
    """Each write takes longer than a step; it is never idle for long, so that the last step gets there."""
    caplog.set_level("INFO", "smolforge")
    monkeypatch.setattr(mirror, "STALL_SECONDS", 2.0)
    (tmp_path / "mirror").mkdir()

    def slow(operation, perform):
        time.sleep(0.02 if operation.kind == "write" else 0)
        return perform(operation)

    with intercept(tmp_path / "mirror", slow):
        assert mirrored(recipe, tmp_path).metrics["mirrored_step"] == 8
    own = [record for record in caplog.records if record.message.endswith(f"to {tmp_path / 'mirror'}")]
    copied = [record.args[0] for record in own]
    assert copied[-1] == 8
    assert len(copied) < 5
    assert Outcome.of(tmp_path / "mirror") == goal


@pytest.mark.long
@pytest.mark.parametrize(
    ("at_step", "while_waiting", "reason"),
    [
        (signal.SIGTERM, None, "not answered for 0.3 s"),
        (signal.SIGINT, signal.SIGINT, "the copy was interrupted"),
        (None, signal.SIGINT, "the copy was interrupted"),
    ],
)
def test_signals_shorten_the_wait_for_a_hung_mirror(tmp_path, recipe, monkeypatch, at_step, while_waiting, reason):
    """After SIGTERM it lasts seconds, and Ctrl-C ends it, also the first one of a run that has finished."""

    signals = [while_waiting] if while_waiting else []

    class Signalled(ProgressListener):
        def on_step(self, metrics):
            if metrics["step"] == 4 and at_step:
                signal.raise_signal(at_step)

        def on_mirror(self, step, bytes_moved):
            if signals:
                signal.raise_signal(signals.pop())

    monkeypatch.setattr(mirror, "STALL_SECONDS_WHEN_STOPPED", 60.0 if while_waiting else 0.3)
    mirrored(recipe, tmp_path, steps=2)
    settings = {"train.mirror": str(tmp_path / "mirror"), "train.steps": 8 if at_step else 4}
    with hung(tmp_path / "mirror"), pytest.raises(MissingResourceError, match=f"step 4 is saved .*{reason}"):
        resume_or_start(recipe, tmp_path / "run", settings, listener=Signalled())
    assert steps(tmp_path / "run") == [2, 4]


def test_stopped_run_has_its_last_step_in_the_mirror(tmp_path, recipe):
    settings = {"train.mirror": str(tmp_path / "mirror")}
    with pytest.raises(Stopped) as stopped:
        resume_or_start(recipe, tmp_path / "run", settings, listener=StopAt(3))
    assert stopped.value.exit_code == 75
    assert steps(tmp_path / "mirror")[-1] == 3


class StopAt(ProgressListener):
    def __init__(self, step):
        self.step = step

    def on_step(self, metrics):
        if metrics["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_run_without_a_mirror_has_none_of_it(tmp_path, recipe, monkeypatch):
    """No thread, no file, no call."""
    monkeypatch.setattr(mirror, "BackgroundTask", None)
    monkeypatch.setattr(mirror, "MirrorFolder", None)
    names = []
    real = async_checkpoint.BackgroundTask.__init__
    monkeypatch.setattr(
        async_checkpoint.BackgroundTask,
        "__init__",
        lambda task, work, name: (names.append(name), real(task, work, name))[1],
    )
    metrics = train(recipe, tmp_path / "run").metrics
    assert set(names) == {"corpus", "checkpoint"}
    assert "mirrored_step" not in metrics
    assert not [path for path in (tmp_path / "run").iterdir() if "mirror" in path.name]


def test_command_line_says_what_was_restored_and_what_is_missing(tmp_path, recipe, capsys):
    words = ["train", str(recipe), "--run", str(tmp_path / "run"), "--train.mirror", str(tmp_path / "mirror")]
    assert cli.run([*words, "--train.steps", "4"]) == 0
    shutil.rmtree(tmp_path / "run")
    assert cli.run([*words, "--train.steps", "6"]) == 0
    assert f"restored step 4 from {tmp_path / 'mirror'}" in capsys.readouterr().err
    with failing(tmp_path / "mirror", error=errno.EROFS):
        assert cli.run([*words, "--train.steps", "8"]) == 4
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(
        f"smolforge: step 8 is saved in {tmp_path / 'run'}, but its mirror {tmp_path / 'mirror'}"
    )
    assert cli.run([*words, "--train.steps", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mirrored_step"] == 8
