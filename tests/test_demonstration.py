"""What the demonstration says of a run, on runs made by hand; `make demonstration` runs the contestants themselves."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "demonstration"))
import demonstrate
import kill_runs
import measure
import page
from contestants import plain, trainer
from watch import FILE, Steps, read


def steps(folder: Path, lines: list[tuple[int, float, list[str]]]) -> Path:
    folder.mkdir()
    said = [{"step": step, "time": time, "rows": rows} for step, time, rows in lines]
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in said) + '{"step": 9, "ti')
    return folder


def points(*found: tuple[int, float, str]) -> list[measure.Point]:
    return [measure.Point(step, seconds, 2.0 + seconds / 100, sha) for step, seconds, sha in found]


@pytest.fixture
def runs(tmp_path):
    """Uninterrupted: rows a to d; with kills: step 2 was taken, lost, and taken again with another row, seen before."""
    uninterrupted = steps(
        tmp_path / "uninterrupted", [(1, 1.0, ["a"]), (2, 2.0, ["b"]), (3, 3.0, ["c"]), (4, 4.0, ["d"])]
    )
    lines = [(1, 1.0, ["a"]), (2, 2.0, ["b"]), (2, 12.0, ["a"]), (3, 13.0, ["c"])]
    return uninterrupted, steps(tmp_path / "with_kills", lines)


def test_step_log_ignores_a_partial_line(runs):
    assert [line["step"] for line in read(runs[0])] == [1, 2, 3, 4]


def test_repeated_or_skipped_counts_only_final_rows(runs):
    assert measure.repeated_or_skipped(*runs) == (1, 1, 3)
    assert measure.repeated_or_skipped(runs[0], runs[0]) == (0, 0, 4)


def test_same_weights_compares_the_last_common_step():
    uninterrupted = points((20, 5, "x"), (40, 9, "y"), (60, 14, "z"))
    assert measure.same(uninterrupted, points((20, 8, "x"), (40, 20, "y"))) is True
    assert measure.same(uninterrupted, points((20, 8, "x"), (40, 20, "other"))) is False
    assert measure.same(uninterrupted, points((30, 8, "x"))) is None


def test_loss_at_a_time_uses_the_newest_checkpoint():
    found = points((20, 5, "x"), (40, 9, "y"))
    assert measure.at(found, 4.9) is None
    assert measure.at(found, 5) == measure.at(found, 8.9) == pytest.approx(2.05)
    assert measure.at(found, 100) == pytest.approx(2.09)
    begun_anew = points((20, 50, "x"), (40, 9, "y"))
    assert measure.at(begun_anew, 49) == pytest.approx(2.09)
    assert measure.at(begun_anew, 50) == pytest.approx(2.5)


def test_restart_seconds_and_speed_are_measured_per_start(tmp_path):
    times = [3.0 + 0.5 * number for number in range(10)] + [24.0 + 0.5 * number for number in range(10)]
    out = steps(tmp_path / "run", [(number + 1, time, ["a"]) for number, time in enumerate(times)])
    seen = kill_runs.Run(began=0.0, starts=[0.0, 10.0, 20.0])
    assert kill_runs.restarts(out, seen) == [3.0, 4.0]  # the second start came to no step
    (tmp_path / "setup.json").write_text(json.dumps({"rows": 8, "sequence_length": 256}))
    assert measure.tokens_per_second(tmp_path, out, seen) == pytest.approx(8 * 256 / 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_kill_times_are_the_same_for_all_systems(seed):
    assert kill_runs.moments(seed, 120) == kill_runs.moments(seed, 120)
    assert all(0 < each < 120 for each in kill_runs.moments(seed, 120))
    assert kill_runs.moments(seed, 120) == sorted(kill_runs.moments(seed, 120))
    assert kill_runs.moments(seed, random.uniform(1, 3)), "no run is spared"


def test_peak_memory_excludes_the_parent_process():
    held = bytearray(b"1") * (300 << 20)  # here
    script = "import time; held = bytearray(b'1') * (60 << 20); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    assert 60 << 20 < kill_runs._waited(child, time.time() + 2) < 150 << 20 < len(held)
    assert child.returncode == -9


BROKEN_AFTER_BOTH = """
import sys, time
from pathlib import Path

run = Path(sys.argv[1])
for name in () if run.is_dir() else ("step-1", "step-2"):
    (run / name).mkdir(parents=True)
if (run / "step-2").is_dir():
    sys.exit("broken")
time.sleep(60)
"""


@pytest.mark.long
def test_two_failed_starts_delete_the_newest_checkpoint(tmp_path, monkeypatch):
    """The newest folder, though it has no weights yet; the one before it stays."""

    class Theirs:
        module = SimpleNamespace(
            resumes_from=lambda out: {int(each.name[-1]): each / "weights" for each in (out / "run").glob("step-*")}
        )

        def command(self, verb, setup, out, seed):
            return [sys.executable, "-c", BROKEN_AFTER_BOTH, str(Path(out) / "run")]

    monkeypatch.setitem(kill_runs.CONTESTANTS, "theirs", Theirs())
    seen = kill_runs.run("theirs", tmp_path, tmp_path / "out", 0, 5, kills=False)
    assert (seen.failures, seen.helped, len(seen.starts)) == (["broken"] * 2, 1, 3)
    assert [each.name for each in (tmp_path / "out" / "run").iterdir()] == ["step-1"]


def test_resumes_from_includes_half_written_checkpoints(tmp_path):
    for folder in ("checkpoint-20", "checkpoint-40"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    assert trainer.checkpoints(tmp_path).keys() == {20}
    assert max(trainer.resumes_from(tmp_path)) == 40
    kept = tmp_path / "run" / "ckpt.pt"
    assert plain.resumes_from(tmp_path) == {}
    torch.save({"iter_num": 40}, kept)
    assert plain.resumes_from(tmp_path) == {40: kept}
    kept.write_bytes(kept.read_bytes()[:100])
    assert plain.resumes_from(tmp_path) == {0: kept}


@pytest.mark.parametrize("step", [0, 20])
def test_bit_flip_check_skips_a_partial_checkpoint(tmp_path, monkeypatch, step):
    """At step 0 a file that cannot be read, at another a folder without weights."""
    (tmp_path / "weights").write_bytes(bytes(100))
    file = tmp_path / ("nothing" if step else "weights")
    theirs = SimpleNamespace(module=SimpleNamespace(resumes_from=lambda out: {step: file}))
    monkeypatch.setitem(measure.CONTESTANTS, "theirs", theirs)
    assert measure.notices_a_flipped_bit("theirs", tmp_path, tmp_path, 0) is None


def test_step_log_is_written_at_once(tmp_path):
    Steps(tmp_path)(3, ["a", "b"])
    (line,) = read(tmp_path)
    assert (line["step"], line["rows"]) == (3, ["a", "b"])


def numbers() -> dict:
    one = {
        "bits_per_byte": {kind: {"30": 2.5, "60": None} for kind in ("uninterrupted", "with_kills")},
        "tokens_per_second": 5000.0,
        "peak_bytes": 2**30,
        "same_weights": True,
        "rows": [0, 0, 2400],
        "kills": 2,
        "restart_seconds": 4.0,
        "first_step_seconds": 5.0,
        "helped": 0,
        "failures": [],
        "notices_a_flipped_bit": True,
        "points": {kind: [[20, 9.0, 2.5, "x"], [40, 15.0, 2.3, "y"]] for kind in ("uninterrupted", "with_kills")},
        "killed": [20.0],
    }
    setup = {"bytes": 10, "sha256": "0" * 64, "held_out_bytes": 5, "preset": "smollm2-nano", "learning_rate": 3e-3}
    setup |= {"warmup_steps": 20, "rows": 8, "sequence_length": 256, "save_every": 20, "dtype": "float32"}
    other = one | {"same_weights": False, "helped": 1, "tokens_per_second": 3000.0}
    never = other | {
        "tokens_per_second": None,
        "restart_seconds": None,
        "points": {"uninterrupted": [], "with_kills": []},
    }
    found = {"smolforge": {"0": one}, "plain": {"0": one, "1": other, "2": never}}
    said = {"absent": ["litgpt"], "used": {"smolforge": "by its interface"}, "machine": {"cpu": "any", "cores": 2}}
    return {"seconds": 60, "setup": setup, "found": found, **said}


def test_table_shows_results_and_absent_systems(tmp_path):
    (tmp_path / "demonstration.json").write_text(json.dumps(numbers()))
    table = page.write(tmp_path)
    for line in (
        "|  | smolforge | plain loop, as nanoGPT's |",
        "| bits per byte uninterrupted, at 30, 60 s | 2.50, none | 2.50, none |",
        "| weights as if never killed | yes | 1 of 3 |",
        "| sequences seen twice; never seen | 0; 0 of 2,400 | 0; 0 of 7,200 |",
        "| checkpoints deleted by hand to go on | 0 | 2 |",
        "| tokens per second | 5,000 | 4,000 (3,000 to 5,000) |",
        "- by its interface",
        "- litgpt: not installed here",
    ):
        assert line in table.splitlines()
    assert (tmp_path / "demonstration.svg").stat().st_size > 5000


def test_page_and_readme_show_the_recorded_numbers():
    root = Path(__file__).parents[1]
    numbers = json.loads((root / "docs" / "demonstration.json").read_text())
    assert (root / "docs" / "demonstration.md").read_text() == page.page(numbers)
    first_screen = (root / "README.md").read_text().partition("## In Python")[0].splitlines()
    shown = [line for line in first_screen if line.startswith("|")]
    assert len(shown) > 3
    assert set(shown) <= set(page.table(numbers).splitlines())


@pytest.mark.parametrize(
    ("life", "noticed"),
    [
        ("write(21, [])", False),
        ("write(1, [])", True),  # it went back to a sound one, or began anew
        ("raise SystemExit(1)", True),
        ("time.sleep(60)", None),
    ],
)
def test_bit_flip_is_noticed_if_training_does_not_continue(tmp_path, monkeypatch, life, noticed):
    script = "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from watch import Steps"
    script += f"; write = Steps(Path(sys.argv[2])); {life}; time.sleep(60)"

    class Theirs:
        module = SimpleNamespace(resumes_from=lambda out: {20: out / "weights"})

        def command(self, verb, setup, out, seed):
            return [sys.executable, "-c", script, str(Path(kill_runs.__file__).parent), out]

    steps(tmp_path / "run", [(20, 1.0, ["a"])])
    (tmp_path / "run" / "weights").write_bytes(bytes(100))
    monkeypatch.setitem(measure.CONTESTANTS, "theirs", Theirs())
    monkeypatch.setattr(measure, "PATIENCE", 2 if noticed is None else 60)
    assert measure.notices_a_flipped_bit("theirs", tmp_path, tmp_path / "run", 0) is noticed
    assert (tmp_path / "run" / "weights").read_bytes() == bytes(100), "a copy is broken, not the run"
    assert not (tmp_path / "run-flipped").exists()


def test_demonstration_refuses_a_folder_of_another_length(tmp_path, monkeypatch):
    (tmp_path / "demonstration.json").write_text(json.dumps({"seconds": 120.0}))
    monkeypatch.setattr("sys.argv", ["demonstrate.py", str(tmp_path), "--seconds", "300"])
    with pytest.raises(SystemExit, match="begun with 120 s a run; give another folder, or --seconds 120"):
        demonstrate.main()
