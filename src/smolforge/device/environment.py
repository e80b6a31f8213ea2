"""Describe the environment of a run outside its recipe: cores, load, variables, debuggers; and find what slows it.

    describe_environment(variables)        -> what environment.json has as `seen` of a start
    find_slowdowns(environment, threads)   -> sentences: what is set, what it does, the fix

The environment is handed in: only the command line reads it.
"""

import os
import re
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from smolforge.device import usable_cores

TRUTHY = "(?!(0|false|no|off)$).+"
PROC_STATUS = Path("/proc/self/status")
MAX_THREADS_PER_CORE, MIN_THREADS_PER_CORE = 1.25, 0.75
"""Threads for each core they may use: beyond the first they wait for each other, below the second cores stand idle."""


class SlowVariable(NamedTuple):
    """A variable that is set while debugging, and slows whatever runs later in the same shell."""

    pattern: str
    """Those that hurt, as a pattern; upper and lower case are one."""
    effect: str
    source: str
    device: str | None = None
    """The kind it matters on; None is any."""


NCCL = "docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
OPENMP = "gcc.gnu.org/onlinedocs/libgomp: GOMP_SPINCOUNT; measured in docs/performance.md"

SLOW_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": SlowVariable(
        TRUTHY,
        "makes the processor wait for each kernel",
        "docs.pytorch.org: CUDA semantics, asynchronous execution",
        "cuda",
    ),
    "NVIDIA_TF32_OVERRIDE": SlowVariable("0", "keeps fp32 off the tensor cores", "docs.nvidia.com/cuda/cublas", "cuda"),
    "NCCL_P2P_DISABLE": SlowVariable(TRUTHY, "sends what GPUs exchange by way of the processor's memory", NCCL, "cuda"),
    "NCCL_IB_DISABLE": SlowVariable(
        TRUTHY, "sends what machines exchange over IP sockets instead of InfiniBand", NCCL, "cuda"
    ),
    "TORCH_DISTRIBUTED_DEBUG": SlowVariable(
        "detail",
        "checks each exchange between ranks before it is made",
        "docs.pytorch.org: torch.distributed, debugging",
    ),
    "TORCH_COMPILE_DISABLE": SlowVariable(TRUTHY, "makes torch.compile do nothing", "torch/_dynamo/config.py"),
    "TORCHDYNAMO_DISABLE": SlowVariable(TRUTHY, "makes torch.compile do nothing", "torch/_dynamo/config.py"),
    "ATEN_CPU_CAPABILITY": SlowVariable(
        "default|avx2", "keeps torch's own kernels from wider vectors", "docs.pytorch.org: torch.backends.cpu", "cpu"
    ),
    "GOMP_SPINCOUNT": SlowVariable(
        r"\d{6,}|\d+[kmgt]|infinit[ey]", "lets waiting threads spin, which starves others", OPENMP, "cpu"
    ),
}
RECORDED_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
)
"""They change speed either way, so they are recorded and not reported by themselves."""

TRACERS = {
    "sys.settrace": "a debugger or a coverage tool is called for each line of Python; run without it",
    "sys.setprofile": "a profiler is called for each function of Python; run without it",
    "sys.monitoring": "a debugger, profiler or coverage tool monitors Python; run without it",
    "ptrace": "another process traces this one's system calls (strace, gdb); run without it",
    "anomaly mode": "autograd's anomaly mode remembers where each operation came from and looks for NaN; "
    "leave torch.autograd.set_detect_anomaly out",
    "tracemalloc": "tracemalloc keeps a traceback of each allocation; run without it",
}


def recorded_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are known to change speed, as they are set."""
    names = {*SLOW_VARIABLES, *RECORDED_VARIABLES}
    recorded = {
        name: value for name, value in environment.items() if name in names or name.startswith("TORCHINDUCTOR_")
    }
    return dict(sorted(recorded.items()))


def describe_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what may explain the speed of this process; the load in a container is its machine's."""
    return {
        "cores": usable_cores(),
        "physical_cores": psutil.cpu_count(logical=False),
        "machine_cores": os.cpu_count(),
        "load": load_average(),
        "variables": recorded_variables(environment),
        "tracing": active_tracers(),
    }


def load_average() -> float | None:
    """Return the load of the last minute; None where Windows' performance counters, which it is from, are disabled."""
    try:
        return round(psutil.getloadavg()[0], 2)
    except (RuntimeError, OSError):
        return None


def active_tracers() -> list[str]:
    """Return what traces this process and slows it: keys of TRACERS."""
    watching = {
        "sys.settrace": sys.gettrace() is not None,
        "sys.setprofile": sys.getprofile() is not None,
        "sys.monitoring": is_monitored(),
        "ptrace": is_ptraced(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "tracemalloc": tracemalloc.is_tracing(),
    }
    return [name for name, on in watching.items() if on]


def is_monitored() -> bool:
    """Whether a tool hears of events of Python 3.12 or later."""
    if sys.version_info >= (3, 12):
        return any(sys.monitoring.get_tool(tool) is not None for tool in range(6))
    return False


def is_ptraced(status: Path = PROC_STATUS) -> bool:
    try:
        return any(line.split()[1] != "0" for line in status.read_text().splitlines() if line.startswith("TracerPid"))
    except (OSError, IndexError):
        return False


def find_slowdowns(environment: Mapping[str, Any], threads: int, device: str = "cpu", *, ranks: int = 1) -> list[str]:
    """Return a sentence for each thing that slows a process on this kind of device with this many threads.

    Threads are checked only where one rank has the machine: how many share it is not in `environment`.
    """
    variables = environment.get("variables") or {}
    messages = [
        f"{name}={printable(value)} {SLOW_VARIABLES[name].effect}; unset it"
        for name, value in variables.items()
        if is_slowing(name, value, device)
    ]
    messages += [TRACERS[name] for name in environment.get("tracing") or [] if name in TRACERS]
    if ranks == 1 and device == "cpu":
        messages += thread_warnings(environment, threads)
    return messages + load_warnings(environment, threads if device == "cpu" else 1)


def is_slowing(name: str, value: str, device: str) -> bool:
    variable = SLOW_VARIABLES.get(name)
    if variable is None or variable.device not in (None, device):
        return False
    return re.fullmatch(variable.pattern, value, re.IGNORECASE | re.DOTALL) is not None


def printable(value: str) -> str:
    """Return a short value in one line, without control characters."""
    text = "".join(char if char.isprintable() else "?" for char in " ".join(value.split()))
    return text if len(text) <= 60 else f"...{text[-57:]}"


def thread_warnings(environment: Mapping[str, Any], threads: int) -> list[str]:
    """Warn of more or fewer threads than cores. Two threads on one core's two halves are no faster:
    halves do not count.
    """
    cores, variables = environment.get("cores"), environment.get("variables") or {}
    if not cores:
        return []
    setting = next(
        (f"{name}={variables[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in variables), None
    )
    if threads > max(1, MAX_THREADS_PER_CORE * cores):
        suggested = max(1, int(cores))
        return [f"{threads} threads on {cores:g} usable cores wait for each other; set OMP_NUM_THREADS={suggested}"]
    core_count = min(cores, environment.get("physical_cores") or cores)
    if threads < MIN_THREADS_PER_CORE * core_count:
        hint = "unset it" if setting else f"set OMP_NUM_THREADS={int(core_count)}"
        cause = f"{setting} leaves" if setting else f"{threads} thread{'s leave' if threads > 1 else ' leaves'}"
        return [f"{cause} {core_count - threads:g} of {core_count:g} usable cores idle; {hint}"]
    return []


def load_warnings(environment: Mapping[str, Any], threads: int) -> list[str]:
    """Warn where other programs leave too few cores of the machine; the load is a minute's average."""
    load, cores = environment.get("load"), environment.get("machine_cores")
    if not load or not cores or load < 1:
        return []
    needed = min(threads, environment.get("cores") or threads)
    if cores - load > needed - 0.5:
        return []
    missing = f"{needed:g} more {'is' if needed == 1 else 'are'} wanted here"
    return [f"programs kept {load:.1f} of {cores} cores busy in the last minute, and {missing}; end them, or wait"]
