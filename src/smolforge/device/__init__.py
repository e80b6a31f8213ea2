"""What this machine is and what it can do: device, dtype, speed, memory.

How many processor cores a process may use: those it may run on, no more than its container pays for.
"""

import functools
import os
import platform
import resource
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from smolforge.errors import MissingResource, SettingError

DTYPES = {"float32": torch.float32, "tfloat32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
CLEARLY = 1.5
"""Times as fast, before half the precision is worth it."""


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is the fastest device present; where several ranks train, each has a GPU of its own.

    Raises MissingResource for a device that is not there, SettingError for one that cannot be shared so.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    if local_rank is not None:
        name = of_rank(name, local_rank)
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise SettingError(f"device is {name!r}; it should be auto, cpu, cuda or mps")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MissingResource(f"the device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def of_rank(name: str, local_rank: int) -> str:
    """The device of one of several ranks on a machine."""
    if name == "cuda" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise SettingError(
                f"there is no GPU for local rank {local_rank}: this process sees {torch.cuda.device_count()}, and each "
                "rank needs its own; torchrun --nproc-per-node gpu starts as many as there are, and Slurm shows all of "
                "them to each where they were asked for with --gpus-per-node"
            )
        return f"cuda:{local_rank}"
    if name not in ("cuda", "cpu"):
        raise SettingError(f"train.device is {name!r}; where several ranks train, it should be auto, cpu or cuda")
    return name


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. `auto` is what runs say that began before it was measured, and what it was then."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


@functools.cache
def fastest_dtype(device: torch.device) -> str:
    """bfloat16 where the device multiplies it clearly faster than fp32, which on a processor is measured.

    Without units for it a processor takes seven times as long; an Apple GPU is not known well enough.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    dtypes = (torch.bfloat16, torch.float32)
    pairs = [[best_product(device, dtype, runs=2) for dtype in dtypes] for _ in range(5)]
    ratio = statistics.median(half / full for half, full in pairs)  # in turn, so that other programs hit both alike
    return "bfloat16" if ratio > CLEARLY else "float32"


def use_tensor_cores(dtype: str, device: torch.device) -> None:
    """Let a GPU round the factors of what is left in fp32 to TF32, unless fp32 itself was asked for."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype in ("tfloat32", "bfloat16") else "highest")


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Arithmetic in the dtype of a recipe over weights that stay as they are."""
    picked = pick_dtype(dtype, device)
    return torch.autocast(device.type, picked) if picked == torch.bfloat16 else nullcontext()


def matrix_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """How fast the device multiplies matrices, measured once by each process that has so many threads."""
    return _measured_once(device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _measured_once(device: torch.device, dtype: torch.dtype, *circumstances: object) -> float:
    return best_product(device, dtype, runs=6)


def best_product(device: torch.device, dtype: torch.dtype, runs: int) -> float:
    """FLOP/s of the best of a few runs of one matrix product, in a fraction of a second.

    Random numbers, since a GPU is some 10 % faster with constants:
    https://www.thonking.ai/p/strangely-matrix-multiplications
    """
    side = 1024 if device.type == "cpu" else 8192
    chance = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, dtype=dtype, generator=chance) for _ in range(2))
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def runs_ahead(device: torch.device) -> bool:
    """Whether the processor can ask for the next thing while the device is at work on this one."""
    return device.type == "cuda"


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there; nobody waits for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage's begins with that of the process which started this one
        with Path("/proc/self/status").open(encoding="utf-8") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that it found no memory; of a processor's its error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def memory_bytes(device: torch.device) -> int:
    """Memory the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(device: torch.device) -> int:
    """Memory nobody uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with Path("/proc/meminfo").open(encoding="utf-8") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return memory_bytes(device) // 2


def describe(device: torch.device) -> dict[str, str | int]:
    """What decides whether a run repeats to the bit: the machine as environment.json records it."""
    return {
        "device": device.type,
        "name": name_of(device),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def name_of(device: torch.device) -> str:
    """`NVIDIA H200`, `Apple M1 Max 32-core`, or what the processor is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()} {torch.backends.mps.get_core_count()}-core"
    return _processor()


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


CGROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> float:
    """Cores' worth of time, a fraction where a quota says so."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(float(allowed), *quotas())


def quotas(mine: Path = MINE, root: Path = CGROUPS) -> list[float]:
    """The limits of a process' control group and of all above it, of both versions; unlimited ones are infinite.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; docs.kernel.org/scheduler/sched-bwc.html of version 1.
    """
    found = [float("inf")]
    for kind, place in _groups(mine):
        folders = [place, *place.parents]
        if kind == "":
            found += [_quota(*_words(root / folder / "cpu.max")) for folder in folders]
        elif "cpu" in kind.split(","):
            for folder in (root / kind / each for each in folders):
                found.append(_quota(*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")))
    return found


def _groups(mine: Path) -> list[tuple[str, Path]]:
    """(controllers, place) of each hierarchy a process is in; version 2 names no controllers."""
    try:
        lines = [line.split(":", 2) for line in mine.read_text().splitlines()]
    except OSError:
        return []
    return [(kind, Path(place.lstrip("/"))) for _, kind, place in (line for line in lines if len(line) == 3)]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _quota(quota: str = "max", period: str = "100000") -> float:
    """Cores that microseconds in each period are; version 2 says max where there is no limit, version 1 says -1."""
    try:
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    except (ValueError, ZeroDivisionError):
        return float("inf")
