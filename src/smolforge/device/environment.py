"""The conditions a run goes under that are no part of its recipe: cores, load, variables, debuggers; and which hurt.

    surroundings(environment) -> what environment.json keeps as `seen` of a start
    hurting(seen, threads)    -> sentences: what is set, what it does, the way out

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

ON = "(?!(0|false|no|off)$).+"
STATUS = Path("/proc/self/status")
CROWDED, IDLE = 1.25, 0.75
"""Threads for each core they may use: beyond the first they wait for each other, below the second cores stand idle."""


class Habit(NamedTuple):
    """A variable that is set while debugging, and slows whatever runs later in the same shell."""

    values: str
    """Those that hurt, as a pattern; upper and lower case are one."""
    does: str
    source: str
    device: str | None = None
    """The kind it matters on; None is any."""


NCCL = "docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
PYTHON = "docs.python.org/3/using/cmdline.html#environment-variables"
GLIBC = "sourceware.org/glibc/manual: Memory Allocation Tunables; from glibc 2.34 with libc_malloc_debug.so preloaded"
SANITIZERS = (
    "clang.llvm.org/docs: AddressSanitizer 2 times, ThreadSanitizer 5 to 15 times as slow; valgrind.org 10 to 50"
)
OPENMP = "gcc.gnu.org/onlinedocs/libgomp: GOMP_SPINCOUNT; measured in docs/performance.md"
DISPATCH = "uxlfoundation.github.io/oneDNN: CPU dispatcher control"

HABITS = {
    "CUDA_LAUNCH_BLOCKING": Habit(
        ON,
        "makes the processor wait for each kernel",
        "docs.pytorch.org: CUDA semantics, asynchronous execution",
        "cuda",
    ),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": Habit(
        ON, "asks the driver for the memory of each tensor", "docs.pytorch.org: CUDA environment variables", "cuda"
    ),
    "NVIDIA_TF32_OVERRIDE": Habit("0", "keeps fp32 off the tensor cores", "docs.nvidia.com/cuda/cublas", "cuda"),
    "NCCL_P2P_DISABLE": Habit(ON, "sends what GPUs exchange by way of the processor's memory", NCCL, "cuda"),
    "NCCL_SHM_DISABLE": Habit(ON, "sends what GPUs exchange over the network, also within a machine", NCCL, "cuda"),
    "NCCL_IB_DISABLE": Habit(ON, "sends what machines exchange over IP sockets instead of InfiniBand", NCCL, "cuda"),
    "TORCH_DISTRIBUTED_DEBUG": Habit(
        "detail",
        "checks each exchange between ranks before it is made",
        "docs.pytorch.org: torch.distributed, debugging",
    ),
    "TORCH_COMPILE_DISABLE": Habit(ON, "makes torch.compile do nothing", "torch/_dynamo/config.py"),
    "TORCHDYNAMO_DISABLE": Habit(ON, "makes torch.compile do nothing", "torch/_dynamo/config.py"),
    "TORCH_COMPILE_DEBUG": Habit(ON, "writes down all that torch.compile does", "docs.pytorch.org: torch.compile"),
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": Habit(ON, "compiles anew at each start", "torch/compiler/config.py"),
    "TORCHINDUCTOR_NAN_ASSERTS": Habit(ON, "looks for NaN in all that is computed", "torch/_inductor/config.py"),
    "ATEN_CPU_CAPABILITY": Habit(
        "default|avx2", "keeps torch's own kernels from wider vectors", "docs.pytorch.org: torch.backends.cpu", "cpu"
    ),
    "ONEDNN_MAX_CPU_ISA": Habit("(?!(all|default)$).+", "keeps matrix products to older instructions", DISPATCH, "cpu"),
    "DNNL_MAX_CPU_ISA": Habit("(?!(all|default)$).+", "keeps matrix products to older instructions", DISPATCH, "cpu"),
    "OMP_WAIT_POLICY": Habit("active", "lets waiting threads spin, which starves others", OPENMP, "cpu"),
    "GOMP_SPINCOUNT": Habit(
        r"\d{6,}|\d+[kmgt]|infinit[ey]", "lets waiting threads spin, which starves others", OPENMP, "cpu"
    ),
    "PYTHONDEVMODE": Habit(".+", "checks each allocation of Python's", "docs.python.org/3/library/devmode.html"),
    "PYTHONMALLOC": Habit(".*debug", "checks each allocation of Python's", PYTHON),
    "PYTHONTRACEMALLOC": Habit("[1-9].*", "keeps a traceback of each allocation of Python's", PYTHON),
    "MALLOC_CHECK_": Habit("[1-9].*", "checks each allocation", GLIBC),
    "MALLOC_PERTURB_": Habit("[1-9].*", "overwrites all memory that is taken or given back", GLIBC),
    "LD_PRELOAD": Habit(".*(lib[atlmu]b?san|valgrind|libc_malloc_debug).*", "checks each access to memory", SANITIZERS),
}
KNOWN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
KNOWN += ("CUDA_VISIBLE_DEVICES",)
"""They change speed either way, so they are kept and not judged by themselves."""

TRACING = {
    "sys.settrace": "a debugger or a coverage tool is called for each line of Python; run without it",
    "sys.setprofile": "a profiler is called for each function of Python; run without it",
    "sys.monitoring": "a debugger, profiler or coverage tool monitors Python; run without it",
    "ptrace": "another process traces this one's system calls (strace, gdb); run without it",
    "anomaly mode": "autograd's anomaly mode remembers where each operation came from and looks for NaN; "
    "leave torch.autograd.set_detect_anomaly out",
    "tracemalloc": "tracemalloc keeps a traceback of each allocation; run without it",
}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that are known to change speed, as they are set."""
    known = {*HABITS, *KNOWN}
    wanted = {name: value for name, value in environment.items() if name in known or name.startswith("TORCHINDUCTOR_")}
    return dict(sorted(wanted.items()))


def surroundings(environment: Mapping[str, str]) -> dict[str, Any]:
    """What may explain how fast this process goes: of a container the load is its machine's."""
    return {
        "cores": usable_cores(),
        "physical_cores": psutil.cpu_count(logical=False),
        "machine_cores": os.cpu_count(),
        "load": round(psutil.getloadavg()[0], 2),
        "variables": variables(environment),
        "tracing": tracing(),
    }


def tracing() -> list[str]:
    """What watches this process and slows it: keys of TRACING."""
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


def is_ptraced(status: Path = STATUS) -> bool:
    try:
        return any(line.split()[1] != "0" for line in status.read_text().splitlines() if line.startswith("TracerPid"))
    except (OSError, IndexError):
        return False


def hurting(seen: Mapping[str, Any], threads: int, device: str = "cpu", ranks: int = 1) -> list[str]:
    """What of the surroundings makes a process slow that computes on this kind of device with so many threads.

    Threads are judged where one rank has the machine: how many share it is not in `seen`.
    """
    said = seen.get("variables") or {}
    told = [
        f"{name}={shown(value)} {HABITS[name].does}; unset it"
        for name, value in said.items()
        if hurts(name, value, device)
    ]
    told += [TRACING[name] for name in seen.get("tracing") or [] if name in TRACING]
    if ranks == 1 and device == "cpu":
        told += about_threads(seen, threads)
    return told + about_load(seen, threads if device == "cpu" else 1)


def hurts(name: str, value: str, device: str) -> bool:
    habit = HABITS.get(name)
    if habit is None or habit.device not in (None, device):
        return False
    return re.fullmatch(habit.values, value, re.IGNORECASE | re.DOTALL) is not None


def shown(value: str) -> str:
    """Short, in one line, and nothing a terminal would obey."""
    plain = "".join(each if each.isprintable() else "?" for each in " ".join(value.split()))
    return plain if len(plain) <= 60 else f"...{plain[-57:]}"


def about_threads(seen: Mapping[str, Any], threads: int) -> list[str]:
    """Whether there are as many as cores. Two threads on one core's two halves are no faster: halves do not count."""
    cores, said = seen.get("cores"), seen.get("variables") or {}
    if not cores:
        return []
    named = next((f"{name}={said[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in said), None)
    if threads > max(1, CROWDED * cores):
        fitting = max(1, int(cores))
        return [f"{threads} threads on {cores:g} usable cores wait for each other; set OMP_NUM_THREADS={fitting}"]
    whole = min(cores, seen.get("physical_cores") or cores)
    if threads < IDLE * whole:
        way_out = "unset it" if named else f"set OMP_NUM_THREADS={int(whole)}"
        what = f"{named} leaves" if named else f"{threads} thread{'s leave' if threads > 1 else ' leaves'}"
        return [f"{what} {whole - threads:g} of {whole:g} usable cores idle; {way_out}"]
    return []


def about_load(seen: Mapping[str, Any], threads: int) -> list[str]:
    """Whether other programs leave too few cores of the machine; the load is a minute's average."""
    load, cores = seen.get("load"), seen.get("machine_cores")
    if not load or not cores or load < 1:
        return []
    wanted = min(threads, seen.get("cores") or threads)
    if cores - load > wanted - 0.5:
        return []
    more = f"{wanted:g} more {'is' if wanted == 1 else 'are'} wanted here"
    return [f"programs kept {load:.1f} of {cores} cores busy in the last minute, and {more}; end them, or wait"]
