"""What a run uses of its machine, and what hurts there: gauges, control groups and environments, all made up."""

import json
import os
import sys
import time
import tracemalloc
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolforge import device, operating_system
from smolforge.device import cpu_quotas, usable_cores
from smolforge.device.environment import (
    SLOW_VARIABLES,
    TRACERS,
    active_tracers,
    describe_environment,
    find_slowdowns,
    is_ptraced,
    recorded_variables,
)
from smolforge.device.usage import USAGE_INTERVAL_SECONDS, ResourceUsage, cpu_gauge, gpu_gauges

CPU = torch.device("cpu")


def test_usage_asks_gauges_once_a_second():
    asked, clock = [], iter([0.0, 0.5, 0.9, 1.0, 1.0, 1.5, 2.1, 2.1])

    def gauge():
        asked.append(1)
        return {"cpu_percent": 100.0 * len(asked)}

    usage = ResourceUsage(CPU, [gauge, dict], lambda: next(clock))
    assert asked == [1], "rates count from the making on"
    told = [usage.sample() for _ in range(5)]
    assert told == [{}, {}, {"cpu_percent": 200.0}, {}, {"cpu_percent": 300.0}]
    assert USAGE_INTERVAL_SECONDS == 1


def test_usage_cpu_percent_equals_process_time(monkeypatch):
    """As the oracle: seconds of processor that the system counted over seconds that passed."""
    now = iter([0.0, 1.0, 1.0])
    usage = ResourceUsage(CPU, clock=lambda: next(now))
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < 0.25:
        pass
    told = usage.sample()
    expected = 100 * (time.process_time() - used) / (time.perf_counter() - began)
    assert told.keys() == {"cpu_percent", "machine_cpu_percent", "memory_bytes"}
    assert told["cpu_percent"] == pytest.approx(expected, abs=15)
    assert 0 <= told["machine_cpu_percent"] <= 100
    assert told["memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_usage_between_readings_only_reads_the_clock(monkeypatch):
    usage = ResourceUsage(CPU)
    for name in ("cpu_percent", "cpu_times", "Process"):
        monkeypatch.setattr(psutil, name, None)
    assert usage.sample() == {}


def test_usage_skips_a_refused_gauge(monkeypatch):
    gauge = cpu_gauge()

    def refused(*_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "cpu_percent", refused)
    assert gauge() == {}


class NVML(Exception):
    pass


def fake_nvml(monkeypatch, **answers):
    """A library in which what has no answer is refused."""

    def answering(name):
        def answer(handle):
            assert handle == "GPU-1234"
            if name not in answers:
                raise NVML
            return answers[name]

        return answer

    names = ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo")
    library = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid, NVMLError=NVML,
        **{name: answering(name) for name in names},
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)


def test_usage_reads_the_gpu(monkeypatch):
    held = SimpleNamespace(used=7 << 30, total=80 << 30)
    fake_nvml(monkeypatch, nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=93), nvmlDeviceGetMemoryInfo=held)
    clock = iter([0.0, 1.0, 1.0])
    told = ResourceUsage(CPU, gpu_gauges("1234"), lambda: next(clock)).sample()
    assert told == {"gpu_percent": 93.0, "gpu_memory_bytes": 7 << 30}


def test_gpu_gauges_skip_refused_readings(monkeypatch):
    fake_nvml(monkeypatch, nvmlDeviceGetMemoryInfo=SimpleNamespace(used=5))
    assert [gauge() for gauge in gpu_gauges("1234")] == [{}, {"gpu_memory_bytes": 5}]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_gauges("1234") == []


def written(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("mine", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        (
            "3:cpu,cpuacct:/docker/1\n1:name=systemd:/\n",
            {"cpu,cpuacct/docker/1/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
             "cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4.0,
        ),
        ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "1"}, float("inf")),
        ("nonsense\n0::/\n", {"cpu.max": "nonsense"}, float("inf")),
    ],
)  # fmt: skip
def test_quotas_read_cgroup_v1_and_v2(tmp_path, mine, files, expected):
    root = written(tmp_path / "cgroup", files | {"../mine": mine})
    assert min(cpu_quotas(tmp_path / "mine", root)) == expected


def test_usable_cores_are_the_smallest_limit(monkeypatch):
    monkeypatch.setattr(operating_system, "allowed_cores", lambda: 4)
    monkeypatch.setattr(device, "cpu_quotas", lambda: [float("inf"), 2.5])
    assert usable_cores() == 2.5
    monkeypatch.setattr(device, "cpu_quotas", lambda: [float("inf")])
    assert usable_cores() == 4.0


def test_variables_keeps_only_those_that_change_speed():
    said = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_MAX_AUTOTUNE": "1", "CUDA_LAUNCH_BLOCKING": "0"}
    assert recorded_variables(said | {"HOME": "/root", "HF_TOKEN": "secret", "PYTHONFAULTHANDLER": "1"}) == said


def test_surroundings_are_json():
    seen = describe_environment({"OMP_NUM_THREADS": "3"})
    assert json.loads(json.dumps(seen)) == seen
    assert seen["variables"] == {"OMP_NUM_THREADS": "3"}
    assert 0 < seen["cores"] <= seen["machine_cores"] == os.cpu_count()


ON, OFF = ("CUDA_LAUNCH_BLOCKING", "TORCH_COMPILE_DISABLE", "NCCL_P2P_DISABLE"), ("", "0", "false", "No")


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        *((name, ["1", "true", "yes"], OFF) for name in ON),
        ("NVIDIA_TF32_OVERRIDE", ["0"], ["1"]),
        ("TORCH_DISTRIBUTED_DEBUG", ["DETAIL", "detail"], ["INFO", "OFF"]),
        ("ATEN_CPU_CAPABILITY", ["default", "avx2"], ["avx512"]),
        ("GOMP_SPINCOUNT", ["300000", "10m", "INFINITE"], ["0", "1000", "99999"]),
    ],
)
def test_hurting_depends_on_the_value_of_a_variable(name, bad, good):
    device = SLOW_VARIABLES[name].device or "cpu"
    for value in bad:
        (said,) = find_slowdowns({"variables": {name: value}}, 1, device)
        assert said == f"{name}={value} {SLOW_VARIABLES[name].effect}; unset it"
    for value in good:
        assert find_slowdowns({"variables": {name: value}}, 1, device) == []


def test_hurting_ignores_gpu_variables_on_cpu():
    seen = {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}
    assert find_slowdowns(seen, 1, "cuda") == [
        "CUDA_LAUNCH_BLOCKING=1 makes the processor wait for each kernel; unset it"
    ]
    assert find_slowdowns(seen, 1, "cpu") == []


def test_habits_have_a_source_and_are_recorded():
    for name, habit in SLOW_VARIABLES.items():
        assert habit.source and habit.effect, name
        assert recorded_variables({name: "1"}) == {name: "1"}


ONE = {"OMP_NUM_THREADS": "1"}
EIGHT = {"cores": 8.0, "physical_cores": 8, "machine_cores": 8, "load": 0.2}


@pytest.mark.parametrize(
    ("seen", "threads", "said"),
    [
        (EIGHT | {"cores": 2.0}, 8, "8 threads on 2 usable cores wait for each other; set OMP_NUM_THREADS=2"),
        (EIGHT | {"cores": 1.5}, 2, "2 threads on 1.5 usable cores wait for each other; set OMP_NUM_THREADS=1"),
        (EIGHT | {"variables": ONE}, 1, "OMP_NUM_THREADS=1 leaves 7 of 8 usable cores idle; unset it"),
        (EIGHT, 5, "5 threads leave 3 of 8 usable cores idle; set OMP_NUM_THREADS=8"),
        (EIGHT | {"load": 4.0}, 8, "programs kept 4.0 of 8 cores busy in the last minute, and 8 more are wanted here; "
         "end them, or wait"),
    ],
)  # fmt: skip
def test_hurting_reports_threads_and_load(seen, threads, said):
    assert find_slowdowns(seen, threads) == [said]
    assert find_slowdowns(seen, threads, ranks=4) == [said] * (seen["load"] > 1), (
        "how many share the machine is not known"
    )


@pytest.mark.parametrize(
    ("seen", "threads", "device"),
    [
        (EIGHT, 8, "cpu"),
        (EIGHT, 6, "cpu"),
        (EIGHT | {"cores": 2.0}, 2, "cpu"),
        (EIGHT | {"cores": 0.5}, 1, "cpu"),
        (EIGHT | {"physical_cores": 4}, 4, "cpu"),
        (EIGHT | {"physical_cores": None}, 8, "cpu"),
        (EIGHT, 1, "cuda"),
        (EIGHT | {"load": 4.0}, 8, "cuda"),
        (EIGHT | {"load": 40.0, "machine_cores": 64}, 8, "cpu"),
        ({}, 8, "cpu"),
        ({"variables": None, "tracing": None, "cores": None, "load": None}, 8, "cpu"),
    ],
)
def test_hurting_is_empty_on_a_healthy_machine(seen, threads, device):
    assert find_slowdowns(seen, threads, device) == []


def test_tracing_detects_debuggers_and_profilers(tmp_path):
    before = active_tracers()
    trace, was_on = sys.gettrace(), tracemalloc.is_tracing()
    try:
        sys.settrace(lambda *_: None)
        tracemalloc.start()
        with torch.autograd.set_detect_anomaly(True):
            found = active_tracers()
    finally:
        sys.settrace(trace)
        if not was_on:
            tracemalloc.stop()
    assert {"sys.settrace", "anomaly mode", "tracemalloc"} <= set(found)
    assert active_tracers() == before
    assert find_slowdowns({"tracing": found}, 1) == [TRACERS[name] for name in found]
    (tmp_path / "status").write_text("Name:\tpython\nTracerPid:\t71\n")
    assert is_ptraced(tmp_path / "status")
    assert not is_ptraced(tmp_path / "absent")


def test_hurting_escapes_terminal_control_characters():
    (said,) = find_slowdowns({"variables": {"TORCH_COMPILE_DISABLE": "\x1b[31m\n" + "x" * 200}}, 1)
    assert said.isprintable()
    assert len(said) < 130


@given(st.dictionaries(st.sampled_from([*EIGHT, "variables", "tracing"]), st.none()), st.integers(1, 512))
def test_hurting_accepts_records_of_older_runs(seen, threads):
    assert find_slowdowns(EIGHT | seen, threads, "cuda") == []
