"""Why a run is slow: for each sentence a history that calls for it, and one just short of that."""

import json
import re
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import NANO
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge import cli
from smolforge.comparison import diagnosis
from smolforge.comparison.diagnosis import MIN_STEPS, TYPICAL_MFU, diagnose
from smolforge.comparison.step_times import PHASES, pause_costs, phase_shares, time_shares, timed_steps
from smolforge.config import Recipe
from smolforge.config.base import replace_settings
from smolforge.config.load import read_recipe
from smolforge.device.peak_flops import find_published_peak
from smolforge.runs import train
from smolforge.training.run_folder import read_records

CPU = replace_settings(
    read_recipe("nano"), {"train.dtype": "bfloat16", "train.compile": False, "train.micro_batch_size": 16}
)  # fmt: skip
GPU = replace_settings(
    read_recipe("smollm2-135m"),
    {"train.dtype": "bfloat16", "train.compile": True, "train.micro_batch_size": 32, "train.steps": 100_000},
)
SEEN = {"cores": 8.0, "physical_cores": 8, "machine_cores": 8, "load": 0.1, "variables": {}, "tracing": []}
ON_CPU = {"step": 0, "device": "cpu", "name": "AMD EPYC", "threads": 8, "ranks": 1, "seen": SEEN}
ON_GPU = {"step": 0, "device": "cuda", "name": "NVIDIA H100 80GB HBM3", "threads": 8, "ranks": 1, "seen": SEEN}
SECONDS = {"data": 0.001, "forward": 0.4, "backward": 0.45, "optimizer": 0.1, "other": 0.001}


def history(steps=100, begun=0, **changes):
    """A healthy run's lines: what nano writes down on two cores, with other seconds or figures at all steps."""
    parts = {f"seconds_{part}": changes.pop(part, seconds) for part, seconds in SECONDS.items()}
    figures = {"mfu": 0.45, "cpu_percent": 780.0, "machine_cpu_percent": 99.0, "seconds_between": 0.0005}
    lines = [{"step": step, **parts, **figures, **changes} for step in range(begun + 1, begun + steps + 1)]
    lines[0] = lines[0] | {"seconds_forward": 5 * parts["seconds_forward"], "seconds_between": 0.0}
    return lines


def after(lines, every, seconds, **more):
    """As if each `every`-th step were followed by something that takes so long."""
    for line, following in pairwise(lines):
        if line["step"] % every == 0:
            line.update(more)
            following["seconds_between"] += seconds
    return lines


def slowed(lines, steps, times):
    for step in steps:
        lines[step] = lines[step] | {f"seconds_{part}": times * lines[step][f"seconds_{part}"] for part in PHASES}
    return lines


def with_recipe(**changes):
    return replace_settings(CPU, {name.replace("__", "."): value for name, value in changes.items()})


def start(base=ON_CPU, **changes):
    seen = base["seen"] | changes.pop("seen", {})
    return base | changes | {"seen": seen}


@pytest.mark.parametrize(("recipe", "begun"), [(CPU, ON_CPU), (GPU, ON_GPU)])
def test_diagnose_reports_phases_of_a_healthy_run(recipe, begun):
    assert diagnose(history(mfu=0.45), recipe, begun) == [
        "Nothing stands out: backward takes 47 % of the time, forward 42 %, the optimizer 10 %."
    ]


def test_diagnose_accepts_normal_intervals():
    """nano measures, saves and samples every 50 and 100 steps, which takes it the time of a step."""
    lines = after(after(history(300), 50, 0.9, validation_loss=3.0), 100, 0.5)
    said = diagnose(lines, CPU, ON_CPU)
    assert len(said) == 1
    assert said[0].startswith("Nothing stands out")


CASES = {
    "Waiting for data": [
        (history(data=0.053), CPU, ON_CPU, "Waiting for data takes 5 % of the time; --data.num-workers 2 reads further "
         "ahead (it is 1), and a faster disk gives more."),
        (history(data=0.045), CPU, ON_CPU, None),
    ],
    "Measuring": [
        (after(history(), 10, 0.6, validation_loss=3.0), CPU, ON_CPU, "Measuring on held-out text takes 5 % of the "
         "time, 0.6 s each of 9 times; --train.evaluate-every 150 would be rare enough; a smaller "
         "--train.evaluate-tokens (it is 8192) measures less."),
        (after(history(), 10, 0.45, validation_loss=3.0), CPU, ON_CPU, None),
    ],
    "Sampling": [
        (after(history(), 10, 5.0), with_recipe(train__sample_every=10), ON_CPU, "Sampling text takes 32 % of the "
         "time, 5 s each of 9 times; --train.sample-every 170 would be rare enough."),
        (after(history(), 10, 0.45), with_recipe(train__sample_every=10), ON_CPU, None),
    ],
    "Saving": [
        (after(history(), 10, 0.9), with_recipe(train__checkpoint_every=10, train__checkpoint_in_background=False),
         ON_CPU, "Saving checkpoints takes 8 % of the time, 0.9 s each of 9 times; --train.checkpoint-every 40 would "
         "be rare enough; --train.checkpoint-in-background true does not wait for the disk."),
        (after(history(), 10, 0.45), with_recipe(train__checkpoint_every=10), ON_CPU, None),
    ],
    "What is written": [
        (history(seconds_between=0.06), CPU, ON_CPU, "What is written down after every step takes 6 % of the time, "
         "0.06 s each; fewer trackers (--report.to none) or a faster disk for the run's folder leave more."),
        (history(seconds_between=0.045), CPU, ON_CPU, None),
    ],
    "The optimizer": [
        (history(optimizer=0.3), CPU, ON_CPU, "The optimizer takes 26 % of the time, which does not grow with the "
         "batch: a new run with --train.batch-tokens 16384 (it is 4096) takes that step for four times the tokens, or "
         "--optim.name adamw, whose step costs less than Muon's."),
        (history(optimizer=0.28), CPU, ON_CPU, None),
    ],
    "Forward and backward": [
        (history(), replace_settings(GPU, {"train.dtype": "float32"}), ON_GPU, "Forward and backward, 89 % of the "
         "time, multiply in float32, and this machine is clearly faster in bfloat16: a new run "
         "with --train.dtype bfloat16."),
        (history(), replace_settings(GPU, {"train.dtype": "float32"}), start(ON_GPU, name="some new chip"), None),
        (history(), replace_settings(GPU, {"train.dtype": "float32"}), start(ON_GPU, name="Tesla T4"), None),
        (history(), with_recipe(train__dtype="float32"), ON_CPU, None),
    ],
    "The program": [
        (history(forward=40.0, optimizer=3.0), with_recipe(train__steps=200), ON_CPU, "The program is not compiled, in "
         "a start of 2.4 hours: --train.compile true takes a minute or two and gains some 5 % on a processor, on a GPU "
         "more."),
        (history(forward=30.0, optimizer=3.0), with_recipe(train__steps=200), ON_CPU, None),
        (history(forward=40.0, optimizer=3.0), with_recipe(train__steps=200, train__compile=True), ON_CPU, None),
    ],
    "The first step": [
        (slowed(history(), [0], 20), with_recipe(train__compile=True, train__steps=300), ON_CPU, "The first step took "
         "50 s longer than others, 15 % of this start as it is planned: that is for programs and memory made once; "
         "--train.compile false is ready at once."),
        (slowed(history(), [0], 12), with_recipe(train__compile=True, train__steps=300), ON_CPU, None),
        (slowed(history(), [0], 20), with_recipe(train__compile=True, train__steps=600), ON_CPU, None),
    ],
    "Each step": [
        (history(peak_memory_bytes=5 << 30), replace_settings(GPU, {"train.micro_batch_size": 4}), ON_GPU, "Each step "
         "is 128 micro-batches of 8,192 tokens, and a GPU is busy from about 65,536: --train.micro-batch-size 32 (it "
         "is 4) if memory allows (5.0 GiB are used now)."),
        (history(), replace_settings(GPU, {"train.micro_batch_size": 5}), ON_GPU, None),
        (history(), replace_settings(GPU, {"train.micro_batch_size": 4}), start(ON_GPU, ranks=128), None),
        (history(), with_recipe(train__micro_batch_size=1), ON_CPU, None),
    ],
    "The GPU": [
        (history(gpu_percent=60.0), GPU, ON_GPU, "The GPU has work in 60 % of the time: the processor does not ask for "
         "it fast enough. A larger --train.micro-batch-size makes fewer and larger kernels, --train.compile true makes "
         "one of many."),
        (history(gpu_percent=80.0), GPU, ON_GPU, None),
    ],
    "MFU": [
        (history(mfu=0.19), GPU, ON_GPU, f"MFU is 19.0%, and {TYPICAL_MFU['cuda'][2]}, is usual: the device does less "
         "than half of what it could. If nothing else here explains it, --profile 5 shows where a step's time goes."),
        (history(mfu=0.2), GPU, ON_GPU, None),
        (history(mfu=0.01), CPU, start(ON_GPU), None),
    ],
    "One step in twenty": [
        (slowed(history(), range(10, 30, 2), 3), CPU, ON_CPU, "One step in twenty takes 3.0 times the median or "
         "longer, which loses 15 % of the time: other programs, a disk that is slow at times, or a machine that is "
         "shared."),
        (slowed(history(), range(10, 24, 2), 2.1), CPU, ON_CPU, "One step in twenty takes 2.1 times the median or "
         "longer, which loses 6 % of the time: other programs, a disk that is slow at times, or a machine that is "
         "shared."),
        (slowed(history(), range(10, 20, 2), 2.1), CPU, ON_CPU, None),
        (slowed(history(), range(10, 30, 2), 1.9), CPU, ON_CPU, None),
        (slowed(history(), range(10, 18, 2), 3), CPU, ON_CPU, None),
    ],
    "Steps take": [
        (slowed(history(), range(50, 100), 1.3), CPU, ON_CPU, "Steps take 1.3 times as long at the end as at the "
         "beginning, 13 % of the time: a device that grows hot and slows down, or other programs; top shows programs "
         "beside it."),
        (slowed(history(), range(50, 100), 1.2), CPU, ON_CPU, None),
        (slowed(history(), range(50), 1.3), CPU, ON_CPU, None),
        (slowed(history(40), range(20, 40), 1.3), CPU, ON_CPU, None),
    ],
    "Other programs": [
        (history(cpu_percent=500.0), CPU, ON_CPU, "Other programs keep 2.9 of 8 cores busy, and this run's 8 threads "
         "got 5.0: 38 % of their time is lost; end those programs, or wait for them."),
        (history(cpu_percent=500.0, machine_cpu_percent=65.0), CPU, ON_CPU, None),
        (history(cpu_percent=500.0), CPU, start(threads=5, seen={"cores": 5.0}), None),
        (history(cpu_percent=500.0), CPU, start(ranks=2), None),
    ],
    "CUDA_LAUNCH_BLOCKING": [
        (history(), GPU, start(ON_GPU, seen={"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}),
         "CUDA_LAUNCH_BLOCKING=1 makes the processor wait for each kernel; unset it."),
        (history(), GPU, start(ON_GPU, seen={"variables": {"CUDA_LAUNCH_BLOCKING": "0"}}), None),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_diagnose_gives_each_hint_only_above_its_threshold(name, case):
    lines, recipe, begun, expected = case
    said = [sentence for sentence in diagnose(lines, recipe, begun) if sentence.startswith(name)]
    assert said == ([expected] if expected else [])


def test_diagnose_gives_one_hint_for_one_cause():
    for name, cases in CASES.items():
        lines, recipe, begun, _ = cases[0]
        assert [sentence.startswith(name) for sentence in diagnose(lines, recipe, begun)] == [True], name


def test_diagnose_puts_environment_and_largest_cost_first():
    lines = after(history(data=0.2, optimizer=0.4), 10, 0.9, validation_loss=3.0)
    seen = {"variables": {"ATEN_CPU_CAPABILITY": "avx2"}}
    said = diagnose(lines, CPU, start(seen=seen))
    assert [sentence.split()[0] for sentence in said] == ["ATEN_CPU_CAPABILITY=avx2", "The", "Waiting", "Measuring"]


def test_diagnose_uses_the_measured_fastest_dtype():
    (said,) = diagnose(history(), with_recipe(train__dtype="float32"), ON_CPU, fastest_dtype="bfloat16")
    assert "--train.dtype bfloat16" in said
    assert "Nothing" in diagnose(history(), CPU, ON_CPU, fastest_dtype="bfloat16")[0]


def test_diagnose_suggests_bfloat16_only_if_clearly_faster(monkeypatch):
    row = find_published_peak("NVIDIA H200")
    for bfloat16, told in ((1.6 * row.float32, True), (1.4 * row.float32, False), (None, False)):
        made_up = {"what": row._replace(bfloat16=bfloat16)}
        monkeypatch.setattr(diagnosis, "find_published_peak", made_up.get)
        said = diagnose(history(), replace_settings(GPU, {"train.dtype": "float32"}), start(ON_GPU, name="what"))
        assert ("bfloat16" in said[0]) == told


def test_diagnose_uses_the_last_start_without_its_first_step():
    lines = history(50, data=5.0) + slowed(history(50, begun=50), [0], 10)
    assert diagnose(lines, CPU, start(step=50))[0].startswith("Nothing stands out")
    assert time_shares(lines, start(step=50))["data"] < 0.01
    assert diagnose(lines, CPU, ON_CPU)[0].startswith("Waiting for data")


def test_diagnose_prefers_measured_cpu_use_to_initial_load():
    """A run that is resumed finds the load of its own last minute."""
    begun = start(seen={"load": 8.0})
    assert "Nothing" in diagnose(history(), CPU, begun)[0]
    unmeasured = [{key: value for key, value in line.items() if "cpu_percent" not in key} for line in history()]
    assert diagnose(unmeasured, CPU, begun)[0].startswith("programs kept 8.0 of 8 cores busy")


def test_costs_separate_overlapping_kinds():
    recipe = with_recipe(train__sample_every=20, train__checkpoint_every=20)
    lines = after(after(history(200), 10, 1.0, validation_loss=3.0), 20, 3.0)
    found = {tuple(sorted(cost.kinds)): (cost.count, cost.seconds) for cost in pause_costs(timed_steps(lines), recipe)}
    assert found[("measured",)] == (19, pytest.approx(1.0))
    assert found[("sampled", "saved")] == (9, pytest.approx(3.0))
    assert found[()][1] == pytest.approx(0.0005)
    said = diagnose(lines, recipe, ON_CPU)
    assert said[0].startswith("Sampling text and saving checkpoints take 11 % of the time, 3 s each of 9 times; ")
    assert "--train.sample-every 120 and --train.checkpoint-every 120 would be rare enough" in said[0]


@settings(max_examples=25)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 5), st.floats(0.01, 5))
def test_costs_add_up_to_the_time_passed(measured, saved, first, second):
    """Whatever the intervals: pauses made of two costs are taken apart into them, or into their sum."""
    recipe = with_recipe(train__checkpoint_every=saved, train__sample_every=None)
    lines = after(after(history(120), measured, first, validation_loss=3.0), saved, second)
    steps = timed_steps(lines)
    added = sum(cost.seconds * cost.count for cost in pause_costs(steps, recipe))
    assert added == pytest.approx(sum(step.between for step in steps), rel=0.02, abs=0.1)


def test_diagnose_reports_too_few_steps_and_old_runs():
    assert diagnose(history(MIN_STEPS), CPU, ON_CPU) == [
        "5 steps of the last start say how long they took; 6 would tell where the time goes."
    ]
    assert "Nothing" in diagnose(history(MIN_STEPS + 1), CPU, ON_CPU)[0]
    for fixture in (Path(__file__).parent / "fixtures").glob("format-*"):
        recipe, lines = read_recipe(fixture / "recipe.toml"), read_records(fixture / "metrics.jsonl")
        assert diagnose(lines, recipe, {})[0].startswith("0 steps of the last start say")
        assert time_shares(lines, {}) == {}


KEYS = [*history(1)[0], "validation_loss", "gpu_percent", "weight_norm", "peak_memory_bytes"]
VALUES = st.none() | st.floats() | st.integers(-(2**70), 2**70)
LINES = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES), max_size=60)
STARTS = st.fixed_dictionaries(
    {},
    optional={
        "step": st.integers(0, 50) | st.none(),
        "device": st.sampled_from(["cpu", "cuda", "mps"]) | st.none(),
        "name": st.sampled_from(["NVIDIA H200", "what"]) | st.none(),
        "threads": st.integers(1, 256) | st.none(),
        "ranks": st.integers(1, 8) | st.none(),
        "seen": st.fixed_dictionaries({}, optional={key: st.just(value) | st.none() for key, value in SEEN.items()})
        | st.none(),
    },
)


@given(LINES, STARTS, st.sampled_from([CPU, GPU, Recipe()]))
def test_diagnose_accepts_missing_and_odd_values(lines, begun, recipe):
    said = diagnose(lines, recipe, begun)
    assert said
    assert all(sentence.endswith(".") and sentence.isprintable() for sentence in said)
    found = time_shares(lines, begun)
    assert found == {} or sum(found.values()) == pytest.approx(1)


@settings(max_examples=25)
@given(st.sets(st.sampled_from(KEYS)), STARTS)
def test_diagnose_accepts_a_healthy_run_without_some_keys(missing, begun):
    lines = [{key: value for key, value in line.items() if key not in missing} for line in history(50)]
    assert diagnose(lines, CPU, begun)


def test_time_shares_sum_to_one():
    found = phase_shares(timed_steps(after(history(11), 5, 2.0))[1:])
    assert sum(found.values()) == pytest.approx(1)
    assert found["between"] == pytest.approx(4.005 / (4.005 + 9.52), rel=1e-3)
    assert statistics.fmean([found["forward"], found["backward"]]) == pytest.approx(0.425 / 0.952 * 9.52 / 13.525)


@pytest.fixture
def recipe_file(tmp_path, text_file):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(NANO | {"data": {"sources": [str(text_file)]}}))
    return path


def test_inspect_shows_time_shares_of_a_real_run(tmp_path, recipe_file, capsys):
    folder = train(recipe_file, tmp_path / "run", **{"train.steps": 12, "train.evaluate_every": 1}).folder
    assert cli.run(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["time"].keys() == {*PHASES, "between"}
    assert sum(facts["time"].values()) == pytest.approx(1)
    assert any(
        sentence.startswith("Measuring on held-out text") or "What is written" in sentence for sentence in facts["slow"]
    )
    assert cli.run(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  between steps +\d+%  █", said, re.MULTILINE)
    assert "- " in said


def test_inspect_machine_reports_slow_settings(capsys, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert cli.run(["inspect", "machine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["variables"]["ATEN_CPU_CAPABILITY"] == "avx2"
    assert facts["cores"] > 0
    assert "ATEN_CPU_CAPABILITY=avx2 keeps torch's own kernels from wider vectors; unset it" in facts["slow"]
    assert cli.run(["inspect", "machine"]) == 0
    assert "\n- ATEN_CPU_CAPABILITY=avx2 keeps" in capsys.readouterr().out
