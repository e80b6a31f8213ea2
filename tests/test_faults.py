"""The harness of faults does what it says, and the campaigns hold in their short form."""

import errno
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaigns import CAMPAIGNS, IN_MEMORY, Bench

from smolforge import atomic
from smolforge.errors import MissingResourceError
from smolforge.testing import Crash, after_power_loss, crashing, failing, flip_bit, in_child, power, recorded
from smolforge.testing.damage import swap, truncate, zero_page
from smolforge.testing.disk import folder_content
from smolforge.testing.processes import die, on_small_disk, paused, send_when, start

# Campaigns


@pytest.fixture(scope="module")
def benches() -> Iterator[dict[str, Bench]]:
    """One undisturbed run for all campaigns of the same settings."""
    folder = Path(tempfile.mkdtemp(dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
    kinds = {str(each.train): each.train for each in CAMPAIGNS.values()}
    yield {kind: Bench.set_up(folder / str(number), **train) for number, (kind, train) in enumerate(kinds.items())}
    shutil.rmtree(folder)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("signals", "mirror") else ())
        for name in CAMPAIGNS
        if name != "small-disk"
    ],
)
def test_campaign_holds_in_its_short_form(benches, name):
    chosen = CAMPAIGNS[name]
    print(chosen(benches[str(chosen.train)], chosen.short, random.Random(0)))


@pytest.mark.long
def test_campaign_holds_on_a_small_disk(benches, tmp_path):
    try:
        on_small_disk(tmp_path, 1 << 20)
    except OSError as reason:
        pytest.skip(str(reason))
    print(CAMPAIGNS["small-disk"](benches["{}"], None, random.Random(0)))


# Disks


def work(folder: Path) -> None:
    """Every kind of operation, through every door."""
    (folder / "sub").mkdir()
    with (folder / "sub" / "text").open("w") as file:
        file.write("some words\n" * 3000)
        file.flush()
        file.seek(4)
        file.write("more")
    with open(folder / "log", "a") as file, open(folder / "log", "ab", buffering=0) as unbuffered:  # noqa: PTH123
        unbuffered.write(b"first ")
        file.write("second")
    with (folder / "log").open("r+b") as file:
        file.truncate(9)
        os.fsync(file)
    (folder / "log").rename(folder / "sub" / "log")
    (folder / "whole").mkdir()
    shutil.copyfile(folder / "sub" / "log", folder / "whole" / "copy")
    atomic.write_text_atomic(folder / "whole" / "copy", "replaced")
    atomic.write_dir_atomic(folder / "committed", lambda into: [(into / "a").write_text("a"), None][1], {})
    atomic.remove_dir_atomic(folder / "committed")
    (folder / "sub" / "text").write_text("short")
    (folder / "sub" / "log").unlink()


def test_recorded_trace_has_every_byte(tmp_path):
    disk = tmp_path / "disk"
    (disk / "there").mkdir(parents=True)
    (disk / "there" / "before").write_text("old")
    with recorded(disk) as trace:
        work(disk)
        (tmp_path / "elsewhere").write_text("not seen")
    after_power_loss(trace, len(trace.operations), tmp_path / "again", persist=power.all_kept)
    assert folder_content(tmp_path / "again") == folder_content(disk)
    assert {each.kind for each in trace.operations} == {
        *("create", "truncate", "write", "sync", "rename", "mkdir", "unlink", "rmdir")
    }


def test_recorded_trace_reports_unseen_changes(tmp_path):
    with recorded(tmp_path) as trace:
        subprocess.run(["touch", tmp_path / "made"], check=True)
        atomic.fsync_path(tmp_path / "made")
    with pytest.raises(ValueError, match="made is not in the trace"):
        after_power_loss(trace, 1, tmp_path / "again", persist=power.all_kept)


@pytest.mark.parametrize(
    ("fate", "left"),
    [
        (power.all_lost, {"synced": b"safe", "renamed": b"whole"}),
        (power.all_kept, {"synced": b"safe and more", "new": b"words", "target": b"whole"}),
        (power.names_kept, {"synced": b"safe", "new": b"", "target": b"whole"}),
        (power.zeros_kept, {"synced": b"safe" + bytes(9), "new": bytes(5), "target": b"whole"}),
        (power.contents_kept, {"synced": b"safe and more", "renamed": b"whole"}),
    ],
)
def test_power_loss_leaves_what_each_fate_allows(tmp_path, fate, left):
    """Content is safe once its file is synced, a name once its folder is."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with recorded(disk) as trace:
        for name, words in (("synced", "safe"), ("renamed", "whole")):
            (disk / name).write_text(words)
            atomic.fsync_path(disk / name)
        atomic.fsync_path(disk)
        with (disk / "synced").open("a") as file:
            file.write(" and more")
        (disk / "new").write_text("words")
        (disk / "renamed").rename(disk / "target")
    after_power_loss(trace, len(trace.operations), tmp_path / "after", persist=fate)
    assert folder_content(tmp_path / "after") == {Path(name): data for name, data in left.items()}


def test_power_loss_by_chance_reaches_every_mixture(tmp_path):
    """Also the second of two writes without the first."""
    disk, chance = tmp_path / "disk", random.Random(0)
    disk.mkdir()
    with recorded(disk) as trace, (disk / "file").open("wb", buffering=0) as file:
        atomic.fsync_path(disk)
        file.write(b"one")
        file.write(b"two")
    found = set()
    for number in range(200):
        after_power_loss(trace, 4, tmp_path / str(number), persist=power.random_loss(chance))
        found.add((tmp_path / str(number) / "file").read_bytes())
    assert {b"", b"one", bytes(3) + b"two", b"onetwo", b"on", bytes(3), b"onet"} <= found


@pytest.mark.parametrize("torn", [False, True])
def test_crashing_stops_all_later_writes(tmp_path, torn):
    def dying() -> None:
        try:
            (tmp_path / "file").write_text("whole")
        finally:
            (tmp_path / "file").unlink()

    with crashing(tmp_path, after=1, torn=torn), pytest.raises(Crash, match="before: unlink file"):
        dying()
    assert (tmp_path / "file").read_text() == ("wh" if torn else "")


def test_crashing_in_a_child_kills_it(tmp_path):
    assert in_child(write_and_die, tmp_path) == -signal.SIGKILL
    assert folder_content(tmp_path) == {Path("one"): b"1", Path("two"): b""}


def write_and_die(folder: Path) -> None:
    with crashing(folder, 3, die=die):
        for name in ("one", "two", "three"):
            (folder / name).write_text("1")


def test_failing_disk_raises_the_error_asked_for(tmp_path):
    with failing(tmp_path, after=2, times=1, kinds=("write",)):
        for name in ("one", "two"):
            (tmp_path / name).write_text("1")
        with pytest.raises(OSError, match="No space left") as caught:
            (tmp_path / "three").write_bytes(b"1")
        (tmp_path / "four").write_text("1")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "three")
    assert folder_content(tmp_path)[Path("three")] == b""
    with failing(tmp_path, error=errno.EIO, kinds=("sync",)), pytest.raises(MissingResourceError, match="Input/output"):
        atomic.write_text_atomic(tmp_path / "one", "2")
    assert (tmp_path / "one").read_text() == "1"


def test_crashing_leaves_other_folders_alone(tmp_path):
    before = (open, os.open, os.write)
    (tmp_path / "watched").mkdir()
    with crashing(tmp_path / "watched", after=0):
        (tmp_path / "file").write_text("1")
        atomic.write_text_atomic(tmp_path / "file", "2")
        shutil.copyfile(tmp_path / "file", tmp_path / "copy")
        assert list((tmp_path / "watched").iterdir()) == []
    assert (open, os.open, os.write) == before
    assert (tmp_path / "copy").read_text() == "2"


# Files


def test_damage_functions_change_the_right_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"\xff" * 5000)
    two.write_bytes(b"2")
    flip_bit(one, 17)
    assert one.read_bytes()[:4] == b"\xff\xff\xfd\xff"
    zero_page(one, 1)
    assert one.read_bytes()[4095:] == b"\xff" + bytes(904)
    truncate(one, -1)
    assert one.stat().st_size == 4999
    truncate(one, 2)
    swap(one, two)
    assert (one.read_bytes(), two.read_bytes()) == (b"2", b"\xff\xff")


# Processes


def count_to(path: Path) -> None:
    for number in range(10**9):
        path.write_text(str(number))


def test_processes_can_be_frozen_and_killed(tmp_path):
    path = tmp_path / "number"
    child = start(count_to, path)
    while not path.exists():
        time.sleep(0.001)
    assert child.pid is not None
    with paused(child.pid):
        time.sleep(0.05)
        before = path.read_text()
        time.sleep(0.05)
        assert path.read_text() == before
    while path.read_text() == before:
        time.sleep(0.001)
    assert send_when(child, signal.SIGTERM, lambda: True) == -signal.SIGTERM


def test_small_disk_is_really_small(tmp_path):
    try:
        prefix = on_small_disk(tmp_path, 1 << 20)
    except OSError as reason:
        pytest.skip(str(reason))
    script = f"head -c 2000000 /dev/zero > {tmp_path}/file; stat -c %s {tmp_path}/file"
    done = subprocess.run([*prefix, "sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{1 << 20}\n"
    assert "No space left" in done.stderr
    assert list(tmp_path.iterdir()) == []
