"""What a run uses of its machine: processors, memory, GPU. Asked once a second, and no more than a clock in between.

NVIDIA's management library, where the driver and nvidia-ml-py have it: who asks a GPU about itself asks here.

The joules a run draws, from the counters that machines keep: NVML's for a GPU, RAPL's for a processor.

A GPU counts itself alone. A processor counts its packages and memory, and whatever else runs on them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch


class Asked(NamedTuple):
    """A GPU to ask: `library.nvmlDevice...(handle)`, which raises `library.NVMLError`."""

    library: Any
    handle: Any


def uuid_of(device: torch.device) -> str:
    """What the driver calls it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def find(uuid: str) -> Asked | None:
    """None without nvidia-ml-py, or where the driver does not know the GPU.

    By its uuid, since CUDA_VISIBLE_DEVICES renumbers what torch sees and not what NVML sees.
    """
    try:
        library = import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        library.nvmlInit()
        return Asked(library, library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except library.NVMLError:
        return None


EVERY_SECONDS = 1

Gauge = Callable[[], dict[str, float | int]]
"""Figures of now, or since it was asked before. Never raises: what cannot be asked gives nothing."""


class Usage:
    """What is used from its making on."""

    def __init__(
        self,
        device: torch.device,
        gauges: Sequence[Gauge] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gauges = gauges_of(device) if gauges is None else list(gauges)
        self._now, self._asked_at = now, now()
        for gauge in self._gauges:  # rates are since now
            gauge()

    def after_a_step(self) -> dict[str, float | int]:
        """The gauges' figures, at most once in EVERY_SECONDS."""
        if self._now() - self._asked_at < EVERY_SECONDS:
            return {}
        self._asked_at = self._now()
        return {name: value for gauge in self._gauges for name, value in gauge().items()}


def gauges_of(device: torch.device) -> list[Gauge]:
    """Those of the machine, and of its GPU where a run is on one."""
    return [processors(), *(gpu(uuid_of(device)) if device.type == "cuda" else [])]


def processors() -> Gauge:
    """`cpu_percent` of this process, 100 is one core; `machine_cpu_percent` of all cores; `memory_bytes` it holds."""
    process = psutil.Process()

    def read() -> dict[str, float | int]:
        try:
            return {
                "cpu_percent": process.cpu_percent(),
                "machine_cpu_percent": psutil.cpu_percent(),
                "memory_bytes": process.memory_info().rss,
            }
        except (psutil.Error, OSError):
            return {}

    return read


def gpu(uuid: str) -> list[Gauge]:
    """`gpu_percent` of the time some kernel ran, `gpu_memory_bytes` all programs hold; a slice of a GPU has no rate."""
    found = find(uuid)
    if found is None:
        return []
    library, handle = found

    def busy() -> dict[str, float | int]:
        try:
            return {"gpu_percent": float(library.nvmlDeviceGetUtilizationRates(handle).gpu)}
        except library.NVMLError:
            return {}

    def held() -> dict[str, float | int]:
        try:
            return {"gpu_memory_bytes": library.nvmlDeviceGetMemoryInfo(handle).used}
        except library.NVMLError:
            return {}

    return [busy, held]


READ_SECONDS = 10
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """Joules since some moment in the past, beginning again at zero once `range` is reached."""

    read: Callable[[], float]
    range: float = float("inf")


class Energy:
    """Joules since it was made."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = list(counters)
        self._last = [counter.read() for counter in self._counters]
        self._joules = 0.0

    def joules(self) -> float | None:
        """None where nothing counts. Ask every few minutes: a processor's counter may go round in ten."""
        for place, counter in enumerate(self._counters):
            now, before = counter.read(), self._last[place]
            self._joules += now - before if now >= before else now - before + counter.range
            self._last[place] = now
        return self._joules if self._counters else None


class PerToken:
    """Joules a token of the steps since it was made, of so many tokens each."""

    def __init__(self, energy: Energy, tokens: int, now: Callable[[], float] = time.monotonic) -> None:
        self._energy, self._tokens, self._now = energy, tokens, now
        self._steps, self._read_at = 0, now()

    def after_a_step(self) -> dict[str, float]:
        """`joules_per_token` every READ_SECONDS, where joules are counted."""
        self._steps += 1
        if self._now() - self._read_at < READ_SECONDS:
            return {}
        self._read_at, joules = self._now(), self._energy.joules()
        return {} if joules is None else {"joules_per_token": joules / (self._steps * self._tokens)}


def energy(device: torch.device) -> Energy:
    """What the device draws from now on."""
    if device.type == "cuda":
        return Energy(nvml(uuid_of(device)))
    return Energy(rapl() if device.type == "cpu" else [])


def nvml(uuid: str) -> list[Counter]:
    """The counter of one GPU, in millijoules since its driver was loaded; none before Volta, or without NVML."""
    gpu = find(uuid)
    if gpu is None:
        return []
    try:
        gpu.library.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)
    except gpu.library.NVMLError:
        return []
    return [Counter(lambda: gpu.library.nvmlDeviceGetTotalEnergyConsumption(gpu.handle) / 1e3)]


def rapl(folder: Path = POWERCAP) -> list[Counter]:
    """The counters of a processor's packages and memory, where Linux has them and lets us read them.

    https://docs.kernel.org/power/powercap/powercap.html; most systems let only root do so.
    """
    counters = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            kind, _ = (zone / "name").read_text().strip(), (zone / "energy_uj").read_text()
            if kind.startswith("package") or kind == "dram":  # cores are in their package, psys holds all
                counters.append(Counter(_microjoules(zone / "energy_uj"), _microjoules(zone / "max_energy_range_uj")()))
        except OSError:
            continue
    return counters


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6
