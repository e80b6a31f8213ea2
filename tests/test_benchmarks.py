"""The benchmarks run in small, so that they run where they are needed; what they measure here means nothing."""

import argparse
import json
import math
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomli_w
from conftest import NANO

from smolforge import cli
from smolforge.testing import flip_bit, processes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--preset", "smollm2-nano", "--length", "16"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def said_by(name, *arguments, compiling=False):
    """What a benchmark prints."""
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "0" if compiling else "1"}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells(page):
    """The tables of a page, as rows of cells, by the first."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


# Contestants


class Clerk:
    """A contestant."""

    def __init__(self, answer):
        self.answer = answer

    def turn(self, steps, warm=0):
        if steps > self.answer:
            raise ValueError(f"{steps} steps are too many\nand this is the second line")
        return {"steps": steps, "process": os.getpid()}


def test_contest_runs_turns_in_separate_processes(benchmark):
    contest = benchmark("contest")
    with contest.Contestant("test_benchmarks:Clerk", answer=3) as one, contest.Contestant("no_such:Thing") as none:
        entrant, missing = contest.Entrant(one), contest.Entrant(none)
        contest.race([entrant, missing], rounds=2, steps=3, warm=1)
        assert [turn["steps"] for turn in entrant.turns] == [1, 3, 3]
        assert {turn["process"] for turn in entrant.turns} & {os.getpid()} == set()
        assert missing.failed == "ModuleNotFoundError: No module named 'no_such'"
        assert missing.turns == []
        entrant.turn(steps=4)
        assert entrant.failed == "ValueError: 4 steps are too many"
        entrant.turn(steps=1)
        assert len(entrant.turns) == 3


# A step beside Transformers' and litgpt's


@pytest.mark.long
def test_training_benchmark_compares_with_peers():
    page = said_by("training", *TINY, "--rows", 1, "--rounds", 1, "--dtype", "float32")
    rows, nothing = cells(page), " (torch.compile made nothing)"
    assert page.startswith("smollm2-nano, 1 x 16 tokens, float32, 1 rounds\n")
    ours = ["smolforge", f"smolforge compiled{nothing}", f"smolforge compiled, selective{nothing}"]
    assert list(rows)[1:6] == [*ours, "transformers", f"transformers compiled{nothing}"]
    assert rows[ours[2]][1] == "1.00 (1.00 to 1.00)"
    if find_spec("litgpt") is None:
        for kind in ("", " compiled"):
            assert rows[f"litgpt{kind}"][0] == "not installed here: make .litgpt, and --litgpt .litgpt/bin/python"


@pytest.mark.long
def test_training_benchmark_compares_compiled_with_peers():
    said = said_by("training", *TINY, "--rows", 1, "--rounds", 1, "--peers", "transformers", "--json", compiling=True)
    for found in json.loads(said).values():
        assert found["failed"] == {}
        assert len(found["rows"]) == 5
        assert not any("note" in row for row in found["rows"])


def turns(seconds, losses, peak):
    each = zip(seconds, losses, strict=True)
    return [{"seconds": taken, "losses": [loss], "peak_bytes": peak, "graphs": 1} for taken, loss in each]


def test_training_benchmark_takes_ratios_within_a_round(benchmark):
    training = benchmark("training")
    found = {
        "smolforge": turns([50.0, 4.0, 2.0, 8.0], [9.0] * 4, 300),
        "smolforge compiled": turns([90.0, 2.0, 1.0, 5.0], [9.0] * 4, 150),
        "transformers": turns([60.0, 6.0, 2.0, 10.0], [9.0] * 4, 600),
    }
    eager, compiled, theirs = training.table(found, tokens=100)
    assert (compiled["tokens_per_second"], compiled["times_slower"]) == (50, 1)
    assert (theirs["times_slower"], theirs["range"]) == (2, [2, 3])
    assert (eager["our_share_of_its_memory"], theirs["our_share_of_its_memory"]) == (0.5, 0.25)
    assert eager["first_step_seconds"] == 50
    assert cells(training.page([theirs], {}))["transformers"][1:4] == ["2.00 (2.00 to 3.00)", "0.00 GiB", "25%"]


@pytest.mark.parametrize("losses", [[9.01, 8.0], [9.0, 8.2], [9.0, math.nan], [math.nan, 8.0]])
def test_training_benchmark_detects_different_losses(benchmark, losses):
    training = benchmark("training")
    found = {"smolforge": turns([1, 1], [9.0, 8.0], 1), "litgpt": turns([1, 1], [9.0005, 8.05], 1)}
    assert training.disagreement(found, first=1e-4, later=1e-2) is None
    found["litgpt"] = turns([1, 1], losses, 1)
    assert "litgpt does another training" in training.disagreement(found, first=1e-4, later=1e-2)


# A GPU


@pytest.mark.long
def test_gpu_benchmark_writes_every_line_on_cpu(tmp_path):
    said_by("gpu", *TINY, "--rows", 2, "--device", "cpu", "--quick", "--groups", 1, "--out", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    page = (tmp_path / "results.md").read_text()
    assert [row["case"] for row in found["cases"]] == [
        "smolforge compiled",
        "transformers compiled",
        "smolforge eager",
        "transformers eager",
    ]
    assert all("failed" not in row and row["tokens_per_second"] > 0 for row in found["cases"])
    assert len({round(row["losses"][0], 4) for row in found["cases"]}) == 1
    assert set(found["roofline"]["seconds"]) <= set(cells(page))
    for answers in found["probes"].values():
        assert answers["failed"] is None
        assert answers["repeats"] is True
        assert "aten::mm" in answers["profile"]
    assert "Our fastest: smolforge eager, 2 rows" in page  # the other was not compiled, which its line says


@pytest.mark.long
def test_gpu_benchmark_runs_every_group_on_cpu(tmp_path):
    given = ["--rows", 1, 2, "--device", "cpu", "--quick", "--minutes", 30, "--out", tmp_path]
    said_by("gpu", *TINY, *given, compiling=True)
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert [row["case"] for row in cases if "failed" in row] == ["smolforge compiled, cudnn"]
    assert {row["rows"] for row in cases} == {1, 2}
    assert not any(row.get("notes") for row in cases)


def test_roofline_equals_a_hand_computation(benchmark):
    """1000 FLOP/s and 1000 bytes/s: seconds are thousands of FLOPs and of bytes."""
    from smolforge.testing import tiny_config

    roofline = benchmark("roofline")
    config = tiny_config()
    parts = roofline.fastest_step(config, length=8, tokens=16, machine=roofline.Machine(1000, 1000))
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert parts["products of the layers"] == pytest.approx(16 * 6 * matrices / 1000)
    assert parts["products of the head"] == pytest.approx(16 * 6 * 320 * 32 / 1000)
    assert parts["attention"] == pytest.approx(2 * 16 * 6 * 2 * 32 * 8 / 1000)
    assert parts["loss"] == pytest.approx(16 * 3 * 2 * 320 / 1000)
    weights = matrices + 320 * 32 + 5 * 32
    assert parts["clipping and AdamW"] == pytest.approx(weights * 32 / 1000)
    strict = roofline.fastest_step(config, 8, 16, roofline.Machine(1000, 1000), strict=True)
    assert strict["attention"] == parts["attention"] / 2


# The customary proof


class Forked:
    """A command line in a child that has torch imported; the benchmark itself starts Python anew each time."""

    def __init__(self, words, log):
        self.child = processes.start(told, words, log.name)

    def poll(self):
        return self.child.exitcode

    def terminate(self):
        self.child.terminate()

    def wait(self):
        return processes.wait_for_exit(self.child)


def told(words, log):
    with open(log, "ab") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.run(words))


@pytest.fixture
def recipe(tmp_path, text_file):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(NANO | {"data": {"sources": [str(text_file)]}}))
    return path


@pytest.mark.long
def test_proof_run_is_bit_exact_and_detects_differences(benchmark, monkeypatch, tmp_path, recipe, capsys):
    proof_run = benchmark("proof_run")
    monkeypatch.setattr(proof_run, "start", Forked)
    asked = argparse.Namespace(out=tmp_path, steps=20, more=5, recipe=str(recipe), against=["files"])
    assert proof_run.Proof(asked, ["--guard.spike", "none"]).prove()
    results = tmp_path / "results"
    names = {"proof.log", "hashes.json", "metrics.jsonl", "loss.svg", "verify-20.json", "verify-25.json"}
    assert {path.name for path in results.iterdir()} == names
    found = json.loads((results / "hashes.json").read_text())
    assert found["steps"] == [25, 25]
    assert found["stops"][-1] == 20
    assert all(10 <= stop <= 20 for stop in found["stops"])
    assert found["sha256"]["stopped"] == found["sha256"]["through"]
    assert "equal to the bit: weights, moments, random states, and 25 losses" in capsys.readouterr().out
    assert "--guard.spike none --optim.schedule.steps 25" in (results / "proof.log").read_text()
    # Again it finds all done; and another loss, another file or a check that fails would not go unseen.
    monkeypatch.setattr(proof_run, "start", None)
    proof_run.Proof(asked, []).train(tmp_path / "stopped", 25, [])
    metrics = tmp_path / "through" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[6]["loss"] += 1e-6
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    different = proof_run.compared(tmp_path / "stopped", tmp_path / "through", 25)
    assert not different["equal"]
    assert (different["steps_that_differ"], different["first_that_differs"]) == (1, 7)
    assert "NOT equal" in proof_run.report(found | different)[-1]
    flip_bit(tmp_path / "through" / "checkpoints" / "step-00000025" / "model.safetensors", 0)
    damaged = proof_run.compared(tmp_path / "stopped", tmp_path / "through", 25)
    assert " is not " in proof_run.report(found | damaged)[1]


@pytest.mark.long
def test_proof_run_works_from_the_command_line(tmp_path, recipe):
    said = said_by("proof_run", "--out", tmp_path / "out", "--recipe", recipe, "--steps", 20, "--more", 5)
    assert said.splitlines()[-1] == "equal to the bit: weights, moments, random states, and 25 losses"


def test_train_script_trains_and_verifies(tmp_path):
    """By a command line that writes down what it is told."""
    (tmp_path / "smolforge").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "smolforge").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def said(*given):
        command = ["bash", str(BENCHMARKS / "train.sh"), *given]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()

    setting = "train shakespeare --run runs/a --data.sources a text.txt --tokenizer tok"
    assert said("runs/a", "a text.txt", "tok") == [
        f"{setting} --train.steps 5000",
        "verify runs/a --out runs/a/verify.json",
    ]
    assert said("runs/a", "a text.txt", "tok", "5050")[0] == f"{setting} --train.steps 5050"


@pytest.mark.long
def test_decoding_benchmark_writes_its_table():
    page = said_by("decoding", "smollm2-nano", "--prompt", "8", "--new", "4", "--rounds", "1")
    table = cells(page)
    rows = (
        "transformers generate",
        "F.linear",
        *("smolforge" + form for form in ("", ", 8 requests", ", int8", ", int4")),
    )
    assert set(rows) <= set(table)
    assert "times a plain prefill" in page
    assert "Enter to first token" in page
