"""Resource usage of a run: CPU, memory and GPU once a second, and the energy that it draws.

    gauges     psutil for the process and its machine, NVML (nvidia-ml-py) for a GPU   -> ResourceUsage
    counters   NVML's joules of a GPU, RAPL's of the CPU's packages and memory         -> EnergyMeter -> EnergyPerToken

A GPU counts itself alone. RAPL counts whatever else runs on the CPU too.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

USAGE_INTERVAL_SECONDS, ENERGY_INTERVAL_SECONDS = 1, 10
POWERCAP = Path("/sys/class/powercap")
Gauge = Callable[[], dict[str, float | int]]
"""Returns values of now, or since the last call. Never raises: what cannot be read is left out."""


class NVMLDevice(NamedTuple):
    """A GPU to ask: `library.nvmlDevice...(handle)`, which raises `library.NVMLError`."""

    library: Any
    handle: Any


def uuid_of(device: torch.device) -> str:
    """Return the driver's uuid of a GPU."""
    return str(torch.cuda.get_device_properties(device).uuid)


def find_nvml_device(uuid: str) -> NVMLDevice | None:
    """Find a GPU in NVML; None without nvidia-ml-py, or where the driver does not know it.

    The key is its uuid, since CUDA_VISIBLE_DEVICES renumbers what torch sees and not what NVML sees.
    """
    try:
        library = import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        library.nvmlInit()
        return NVMLDevice(library, library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except library.NVMLError:
        return None


class ResourceUsage:
    """Usage of the machine since this object was made."""

    def __init__(
        self, device: torch.device, gauges: Sequence[Gauge] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gauges = gauges_of(device) if gauges is None else list(gauges)
        self._clock, self._sampled_at = clock, clock()
        for gauge in self._gauges:  # rates are since now
            gauge()

    def sample(self) -> dict[str, float | int]:
        """Return the values of the gauges, at most once in USAGE_INTERVAL_SECONDS."""
        if self._clock() - self._sampled_at < USAGE_INTERVAL_SECONDS:
            return {}
        self._sampled_at = self._clock()
        return {name: value for gauge in self._gauges for name, value in gauge().items()}


def gauges_of(device: torch.device) -> list[Gauge]:
    """Return the gauges of the machine, and of its GPU where a run is on one."""
    return [cpu_gauge(), *(gpu_gauges(uuid_of(device)) if device.type == "cuda" else [])]


def cpu_gauge() -> Gauge:
    """Return a gauge of `cpu_percent` and `memory_bytes` of this process and `machine_cpu_percent`; 100 is one core."""
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


def gpu_gauges(uuid: str) -> list[Gauge]:
    """Return gauges of `gpu_percent` (time with a kernel) and `gpu_memory_bytes` (all programs);
    a MIG slice has no rate.
    """
    nvml_device = find_nvml_device(uuid)
    if nvml_device is None:
        return []
    library, handle = nvml_device

    def utilization() -> dict[str, float | int]:
        try:
            return {"gpu_percent": float(library.nvmlDeviceGetUtilizationRates(handle).gpu)}
        except library.NVMLError:
            return {}

    def memory() -> dict[str, float | int]:
        try:
            return {"gpu_memory_bytes": library.nvmlDeviceGetMemoryInfo(handle).used}
        except library.NVMLError:
            return {}

    return [utilization, memory]


@dataclass(frozen=True)
class JouleCounter:
    """A counter of joules, which starts again at zero once `range` is reached."""

    read: Callable[[], float]
    range: float = float("inf")


class EnergyMeter:
    """Joules since this object was made."""

    def __init__(self, counters: Sequence[JouleCounter]) -> None:
        self._counters = list(counters)
        self._last = [counter.read() for counter in self._counters]
        self._joules = 0.0

    def joules(self) -> float | None:
        """Return the joules; None without a counter. Call it every few minutes: RAPL's counter may wrap in ten."""
        for index, counter in enumerate(self._counters):
            current, before = counter.read(), self._last[index]
            self._joules += current - before if current >= before else current - before + counter.range
            self._last[index] = current
        return self._joules if self._counters else None


class EnergyPerToken:
    """Joules per token since this object was made; each step has this many tokens."""

    def __init__(self, energy: EnergyMeter, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._energy, self._tokens, self._clock = energy, tokens, clock
        self._steps, self._read_at = 0, clock()

    def sample(self) -> dict[str, float]:
        """Return `joules_per_token` every ENERGY_INTERVAL_SECONDS, where joules are counted."""
        self._steps += 1
        if self._clock() - self._read_at < ENERGY_INTERVAL_SECONDS:
            return {}
        self._read_at, joules = self._clock(), self._energy.joules()
        return {} if joules is None else {"joules_per_token": joules / (self._steps * self._tokens)}


def open_energy_meter(device: torch.device) -> EnergyMeter:
    """Return a meter of what the device draws from now on."""
    if device.type == "cuda":
        return EnergyMeter(nvml_counters(uuid_of(device)))
    return EnergyMeter(rapl_counters() if device.type == "cpu" else [])


def nvml_counters(uuid: str) -> list[JouleCounter]:
    """Return the counter of one GPU, in millijoules since its driver was loaded; none before Volta, or without NVML."""
    gpu = find_nvml_device(uuid)
    if gpu is None:
        return []
    try:
        gpu.library.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)
    except gpu.library.NVMLError:
        return []
    return [JouleCounter(lambda: gpu.library.nvmlDeviceGetTotalEnergyConsumption(gpu.handle) / 1e3)]


def rapl_counters(folder: Path = POWERCAP) -> list[JouleCounter]:
    """Return the counters of the CPU's packages and memory, where Linux has them and lets us read them.

    https://docs.kernel.org/power/powercap/powercap.html; most systems let only root do so.
    """
    counters = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            kind, _ = (zone / "name").read_text().strip(), (zone / "energy_uj").read_text()
            if kind.startswith("package") or kind == "dram":  # cores are in their package, psys holds all
                counters.append(
                    JouleCounter(_microjoules(zone / "energy_uj"), _microjoules(zone / "max_energy_range_uj")())
                )
        except OSError:
            continue
    return counters


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6
