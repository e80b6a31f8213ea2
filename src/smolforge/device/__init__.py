"""What this machine is and what it can do: device, dtype, speed, memory, and the CPU cores that a process may use."""

import functools
import logging
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import torch

from smolforge import operating_system
from smolforge.errors import ConfigError, MissingResourceError

log = logging.getLogger("smolforge")

DTYPES = {"float32": torch.float32, "tfloat32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MIN_SPEEDUP = 1.5
"""How many times as fast bfloat16 must be to be chosen."""
CGROUP_ROOT, PROCESS_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """Pick a device by name. `auto` is a CUDA GPU or the CPU; where several ranks train, each has a GPU of its own.

    An Apple GPU must be asked for, and is warned of, until a run on one was checked. Raises MissingResourceError for a
    device that is not there, ConfigError for one that cannot be shared so.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None:
        name = device_of_rank(name, local_rank)
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device is {name!r}; it should be auto, cpu, cuda or mps")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MissingResourceError(f"the device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "mps":
        warn_of_apple_gpu()
    return device


@functools.cache
def warn_of_apple_gpu() -> None:
    """Say once in a process what is known of Apple GPUs here."""
    log.warning(
        "no run on an Apple GPU (mps) was checked by this project: if the loss is NaN or rises, use --train.device cpu "
        "(--device cpu of other commands), and send a report: docs/machines.md"
    )


def device_of_rank(name: str, local_rank: int) -> str:
    """Return the device of one of several ranks on a machine."""
    if name == "cuda" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"there is no GPU for local rank {local_rank}: this process sees {torch.cuda.device_count()}, and each "
                "rank needs its own; torchrun --nproc-per-node gpu starts as many as there are, and Slurm shows all of "
                "them to each where they were asked for with --gpus-per-node"
            )
        return f"cuda:{local_rank}"
    if name not in ("cuda", "cpu"):
        raise ConfigError(f"train.device is {name!r}; where several ranks train, it should be auto, cpu or cuda")
    return name


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products.

    Only runs from before it was measured have `auto`, with what that meant then.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    check_dtype(DTYPES[name], device)
    return DTYPES[name]


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigError for a dtype that the device cannot hold."""
    if dtype == torch.float64 and widest_float(device) != torch.float64:
        raise ConfigError(f"dtype is float64, which the device {str(device)!r} does not have; use float32, or the CPU")


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype for sums and metrics on a device: float64, which an Apple GPU does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def fastest_dtype(device: torch.device) -> str:
    """Return bfloat16 where the device multiplies it clearly faster than fp32, else float32."""
    return explain_fastest_dtype(device)[0]


@functools.cache
def explain_fastest_dtype(device: torch.device) -> tuple[str, str]:
    """Return the fastest dtype and why it is that. On a CPU it is measured: without units for it one is seven times
    as slow.
    """
    if device.type == "cuda":
        capability = "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", f"this GPU ({capability}) has units for bfloat16"
        return "float32", f"this GPU ({capability}) only emulates bfloat16; 8.0 and later have units for it"
    if device.type != "cpu":
        return "float32", "bfloat16 was not checked on an Apple GPU"
    dtypes = (torch.bfloat16, torch.float32)
    pairs = [[measure_matmul_flops(device, dtype, runs=2) for dtype in dtypes] for _ in range(5)]
    ratio = statistics.median(half / full for half, full in pairs)  # in turn, so that other programs hit both alike
    dtype = "bfloat16" if ratio > MIN_SPEEDUP else "float32"
    return dtype, f"bfloat16 is {ratio:.1f} times as fast as float32 here; it is taken beyond {MIN_SPEEDUP:g}"


def use_tensor_cores(dtype: str, device: torch.device) -> None:
    """Let a GPU round the factors of what is left in fp32 to TF32, unless fp32 itself was asked for."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype in ("tfloat32", "bfloat16") else "highest")


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Arithmetic in the dtype of a recipe over weights that stay as they are."""
    picked = pick_dtype(dtype, device)
    return torch.autocast(device.type, picked) if picked == torch.bfloat16 else nullcontext()


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return how fast the device multiplies matrices, measured once per process and number of threads."""
    return _cached_flops_per_second(device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _cached_flops_per_second(device: torch.device, dtype: torch.dtype, *circumstances: object) -> float:
    return measure_matmul_flops(device, dtype, runs=6)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, runs: int) -> float:
    """Return the FLOP/s of the best of a few runs of one matrix product, in a fraction of a second.

    Random numbers, since a GPU is some 10 % faster with constants:
    https://www.thonking.ai/p/strangely-matrix-multiplications
    """
    side = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: a @ b, device, runs)


def measure_copy_rate(device: torch.device) -> float:
    """Return the bytes per second that a device reads and writes when it copies, the best of a few copies."""
    source = torch.ones(2**26, device=device)  # 256 MiB, beyond any cache
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, runs=6)


def best_seconds(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """Return the seconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def is_async(device: torch.device) -> bool:
    """Whether the CPU can ask for the next thing while the device is at work on this one.

    An Apple GPU reads a tensor after its memory was released, so there each copy is waited for:
    https://github.com/pytorch/pytorch/issues/189690
    """
    return device.type == "cuda"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; to a CUDA GPU without waiting for the copy."""
    return (tensor.pin_memory() if is_async(device) else tensor).to(device, non_blocking=is_async(device))


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return operating_system.peak_memory_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that it found no memory; of a processor's its error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def memory_bytes(device: torch.device) -> int:
    """Return the total memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def describe_device(device: torch.device) -> dict[str, str | int]:
    """Return what decides whether a run repeats bit-for-bit: the machine as environment.json records it."""
    return {
        "device": device.type,
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def describe_speed(device: torch.device) -> dict[str, str | int | float]:
    """Return what decides how fast a run is: dtype, memory and matrix products."""
    dtype, reason = explain_fastest_dtype(device)
    return {
        "dtype": dtype,
        "dtype_reason": reason,
        "memory_bytes": memory_bytes(device),
        "float32_flops_per_second": matmul_flops_per_second(device, torch.float32),
        "bfloat16_flops_per_second": matmul_flops_per_second(device, torch.bfloat16),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a device: `NVIDIA H200`, `Apple M1 Max 32-core`, or the CPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()} {torch.backends.mps.get_core_count()}-core"
    return _cpu_name()


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> float:
    """Return the cores that a process may use, no more than its container's quota; may be a fraction."""
    return min(float(operating_system.allowed_cores()), *cpu_quotas())


def cpu_quotas(process_cgroup: Path = PROCESS_CGROUP, root: Path = CGROUP_ROOT) -> list[float]:
    """Return the limits of a process' control group and of all above it, of both versions; unlimited ones are infinite.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; docs.kernel.org/scheduler/sched-bwc.html of version 1.
    """
    limits = [float("inf")]
    for kind, cgroup in _read_cgroups(process_cgroup):
        folders = [cgroup, *cgroup.parents]
        if kind == "":
            limits += [_quota_cores(*_read_fields(root / path / "cpu.max")) for path in folders]
        elif "cpu" in kind.split(","):
            for path in (root / kind / folder for folder in folders):
                limits.append(
                    _quota_cores(*_read_fields(path / "cpu.cfs_quota_us"), *_read_fields(path / "cpu.cfs_period_us"))
                )
    return limits


def _read_cgroups(process_cgroup: Path) -> list[tuple[str, Path]]:
    """Return (controllers, path) of each hierarchy a process is in; version 2 names no controllers."""
    try:
        lines = [line.split(":", 2) for line in process_cgroup.read_text().splitlines()]
    except OSError:
        return []
    return [(kind, Path(cgroup.lstrip("/"))) for _, kind, cgroup in (line for line in lines if len(line) == 3)]


def _read_fields(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _quota_cores(quota: str = "max", period: str = "100000") -> float:
    """Return a quota of microseconds per period in cores; without a limit version 2 has max, version 1 has -1."""
    try:
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    except (ValueError, ZeroDivisionError):
        return float("inf")
