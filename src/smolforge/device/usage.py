"""Resource usage of a run: CPU, memory and GPU once a second, and the energy that it draws.

gauges     psutil for the process and its machine, NVML (nvidia-ml-py) for a GPU   -> ResourceUsage
counter    NVML's joules of a GPU                                                  -> EnergyPerToken
"""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import psutil
import torch

USAGE_INTERVAL_SECONDS, ENERGY_INTERVAL_SECONDS = 1, 10
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


def driver_version(device: torch.device) -> str | None:
    """Return the version of a GPU's driver, where NVML knows it."""
    gpu = find_nvml_device(uuid_of(device)) if device.type == "cuda" else None
    return str(gpu.library.nvmlSystemGetDriverVersion()) if gpu is not None else None


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


class EnergyPerToken:
    """Joules per token since this object was made; each step has this many tokens."""

    def __init__(
        self, counter: Callable[[], float] | None, tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counter, self._tokens, self._clock = counter, tokens, clock
        self._first = counter() if counter is not None else 0.0
        self._steps, self._read_at = 0, clock()

    def sample(self) -> dict[str, float]:
        """Return `joules_per_token` every ENERGY_INTERVAL_SECONDS, where joules are counted."""
        self._steps += 1
        if self._counter is None or self._clock() - self._read_at < ENERGY_INTERVAL_SECONDS:
            return {}
        self._read_at = self._clock()
        return {"joules_per_token": (self._counter() - self._first) / (self._steps * self._tokens)}


def joule_counter(device: torch.device) -> Callable[[], float] | None:
    """Return the counter of a GPU, in joules since its driver was loaded; None before Volta, or without NVML."""
    gpu = find_nvml_device(uuid_of(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    try:
        gpu.library.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)
    except gpu.library.NVMLError:
        return None
    return lambda: gpu.library.nvmlDeviceGetTotalEnergyConsumption(gpu.handle) / 1e3
