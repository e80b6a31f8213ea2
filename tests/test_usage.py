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

from smolforge import device
from smolforge.device import quotas, usable_cores
from smolforge.device.environment import HABITS, TRACING, hurting, is_ptraced, surroundings, tracing, variables
from smolforge.device.usage import EVERY_SECONDS, Usage, gpu, processors

CPU = torch.device("cpu")


def test_gauges_are_asked_once_a_second_and_no_more():
    asked, clock = [], iter([0.0, 0.5, 0.9, 1.0, 1.0, 1.5, 2.1, 2.1])

    def gauge():
        asked.append(1)
        return {"cpu_percent": 100.0 * len(asked)}

    usage = Usage(CPU, [gauge, dict], lambda: next(clock))
    assert asked == [1], "rates count from the making on"
    told = [usage.after_a_step() for _ in range(5)]
    assert told == [{}, {}, {"cpu_percent": 200.0}, {}, {"cpu_percent": 300.0}]
    assert EVERY_SECONDS == 1


def test_a_busy_process_is_seen(monkeypatch):
    """As the oracle: seconds of processor that the system counted over seconds that passed."""
    now = iter([0.0, 1.0, 1.0])
    usage = Usage(CPU, now=lambda: next(now))
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < 0.25:
        pass
    told = usage.after_a_step()
    expected = 100 * (time.process_time() - used) / (time.perf_counter() - began)
    assert told.keys() == {"cpu_percent", "machine_cpu_percent", "memory_bytes"}
    assert told["cpu_percent"] == pytest.approx(expected, abs=15)
    assert 0 <= told["machine_cpu_percent"] <= 100
    assert told["memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_in_between_it_is_only_a_clock(monkeypatch):
    usage = Usage(CPU)
    for name in ("cpu_percent", "cpu_times", "Process"):
        monkeypatch.setattr(psutil, name, None)
    assert usage.after_a_step() == {}


def test_a_machine_that_cannot_be_asked_gives_nothing(monkeypatch):
    gauge = processors()

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


def test_a_gpu_is_asked_too(monkeypatch):
    held = SimpleNamespace(used=7 << 30, total=80 << 30)
    fake_nvml(monkeypatch, nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=93), nvmlDeviceGetMemoryInfo=held)
    clock = iter([0.0, 1.0, 1.0])
    told = Usage(CPU, gpu("1234"), lambda: next(clock)).after_a_step()
    assert told == {"gpu_percent": 93.0, "gpu_memory_bytes": 7 << 30}


def test_a_gpu_that_refuses_gives_what_it_does_give(monkeypatch):
    fake_nvml(monkeypatch, nvmlDeviceGetMemoryInfo=SimpleNamespace(used=5))
    assert [gauge() for gauge in gpu("1234")] == [{}, {"gpu_memory_bytes": 5}]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu("1234") == []


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
def test_a_container_pays_for_some_cores(tmp_path, mine, files, expected):
    root = written(tmp_path / "cgroup", files | {"../mine": mine})
    assert min(quotas(tmp_path / "mine", root)) == expected


def test_usable_cores_are_the_fewest_of_all(monkeypatch):
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    monkeypatch.setattr(device, "quotas", lambda: [float("inf"), 2.5])
    assert usable_cores() == 2.5
    monkeypatch.setattr(device, "quotas", lambda: [float("inf")])
    assert usable_cores() == 4.0


def test_variables_that_change_speed_are_kept_and_no_others():
    said = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_MAX_AUTOTUNE": "1", "CUDA_LAUNCH_BLOCKING": "0"}
    assert variables(said | {"HOME": "/root", "HF_TOKEN": "secret", "PYTHONFAULTHANDLER": "1"}) == said


def test_surroundings_go_into_a_file():
    seen = surroundings({"OMP_NUM_THREADS": "3"})
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
        ("ONEDNN_MAX_CPU_ISA", ["AVX2"], ["ALL", "DEFAULT"]),
        ("OMP_WAIT_POLICY", ["ACTIVE"], ["PASSIVE"]),
        ("GOMP_SPINCOUNT", ["300000", "10m", "INFINITE"], ["0", "1000", "99999"]),
        ("PYTHONMALLOC", ["debug", "pymalloc_debug"], ["malloc", "pymalloc"]),
        ("PYTHONTRACEMALLOC", ["1", "25"], ["0"]),
        ("MALLOC_PERTURB_", ["165"], ["0"]),
        ("LD_PRELOAD", ["/lib/libasan.so.8", "/a.so:/usr/lib/libtsan.so"], ["/usr/lib/libjemalloc.so.2"]),
    ],
)
def test_a_setting_hurts_by_its_value(name, bad, good):
    device = HABITS[name].device or "cpu"
    for value in bad:
        (said,) = hurting({"variables": {name: value}}, 1, device)
        assert said == f"{name}={value} {HABITS[name].does}; unset it"
    for value in good:
        assert hurting({"variables": {name: value}}, 1, device) == []


def test_what_is_of_a_gpu_does_not_matter_elsewhere():
    seen = {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}
    assert hurting(seen, 1, "cuda") == ["CUDA_LAUNCH_BLOCKING=1 makes the processor wait for each kernel; unset it"]
    assert hurting(seen, 1, "cpu") == []


def test_every_habit_has_a_source_and_can_be_met():
    for name, habit in HABITS.items():
        assert habit.source and habit.does, name
        assert variables({name: "1"}) == {name: "1"}


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
def test_threads_and_load(seen, threads, said):
    assert hurting(seen, threads) == [said]
    assert hurting(seen, threads, ranks=4) == [said] * (seen["load"] > 1), "how many share the machine is not known"


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
def test_a_healthy_machine_has_nothing_that_hurts(seen, threads, device):
    assert hurting(seen, threads, device) == []


def test_what_watches_a_process_is_seen(tmp_path):
    before = tracing()
    trace, was_on = sys.gettrace(), tracemalloc.is_tracing()
    try:
        sys.settrace(lambda *_: None)
        tracemalloc.start()
        with torch.autograd.set_detect_anomaly(True):
            found = tracing()
    finally:
        sys.settrace(trace)
        if not was_on:
            tracemalloc.stop()
    assert {"sys.settrace", "anomaly mode", "tracemalloc"} <= set(found)
    assert tracing() == before
    assert hurting({"tracing": found}, 1) == [TRACING[name] for name in found]
    (tmp_path / "status").write_text("Name:\tpython\nTracerPid:\t71\n")
    assert is_ptraced(tmp_path / "status")
    assert not is_ptraced(tmp_path / "absent")


def test_a_value_cannot_speak_to_a_terminal():
    (said,) = hurting({"variables": {"LD_PRELOAD": "\x1b[31m\n" + "x" * 200 + "/libasan.so"}}, 1)
    assert said.isprintable()
    assert len(said) < 120


@given(st.dictionaries(st.sampled_from([*EIGHT, "variables", "tracing"]), st.none()), st.integers(1, 512))
def test_old_runs_lack_whatever_they_lack(seen, threads):
    assert hurting(EIGHT | seen, threads, "cuda") == []
