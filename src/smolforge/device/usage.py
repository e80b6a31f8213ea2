"""What a run uses of its machine: processors, memory, GPU. Asked once a second, and no more than a clock in between."""

import time
from collections.abc import Callable, Sequence

import psutil
import torch

from smolforge.device.nvml import find, uuid_of

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
