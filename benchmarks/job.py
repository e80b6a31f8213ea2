"""What a contestant is to do, and what it asks of its machine: the batch, the clock, the peak of memory.

    job -> a contestant -> turn(steps): seconds, losses, peak memory

Imports of smolforge stand inside functions: a contestant of another environment has only torch, safetensors and its
own package.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEPARATOR = 35
"""Ends a document where documents are kept apart; drawn so often that one has about 400 tokens."""
Taken = tuple[float, list[float]]


@dataclass(frozen=True)
class Job:
    """What a contestant is to do."""

    folder: Path
    rows: int
    length: int
    peer: str = "smolforge"
    device: str = "cpu"
    dtype: str = "float32"
    compiled: str = "no"
    """no, whole, layers (each by itself), autotuned (whole, products chosen by trying) or graphs (whole, replayed)."""
    attention: str = "default"
    """A backend of scaled_dot_product_attention, or documents, which are kept apart by FlexAttention."""
    checkpoint: str | None = None
    """How little layers keep for their backward: selective or full."""
    deterministic: bool = False
    learning_rate: float = 3e-3


def batch(job: Job, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (rows, length), the same each time; few ids are frequent and most are rare, as in text."""
    chance = 1 / torch.arange(10, 10 + vocabulary, dtype=torch.float64)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.multinomial(chance, job.rows * (job.length + 1), replacement=True, generator=drawn)
    ids = ids.view(job.rows, job.length + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def turn(job: Job, take: Callable[[int], Taken], steps: int, warm: int) -> dict[str, Any]:
    """`warm` steps, then `steps` that are timed; afterwards the device's memory is free for others."""
    with attending(job.attention):
        warm_seconds, losses = take(warm) if warm else (0.0, [])
        seconds, more = take(steps) if steps else (0.0, [])
    peak = peak_bytes(job)
    give_back(job)
    return {
        "seconds": seconds,
        "warm_seconds": warm_seconds,
        "losses": losses + more,
        "peak_bytes": peak,
        "graphs": graphs(),
    }


def give_back(job: Job) -> None:
    """What this process has kept for its next tensors; without that, others beside it would find no memory."""
    if job.device == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def prepare(job: Job) -> None:
    """What is set for a whole process."""
    if job.device == "cuda":
        torch.set_float32_matmul_precision("high")
    if job.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if job.compiled in ("autotuned", "graphs"):
        from torch._inductor import config

        config.max_autotune, config.triton.cudagraphs = job.compiled == "autotuned", job.compiled == "graphs"


def attending(name: str) -> AbstractContextManager:
    """Only this backend of scaled_dot_product_attention, which raises where it cannot be used."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return sdpa_kernel(backends[name]) if name in backends else nullcontext()


def autocast(job: Job) -> AbstractContextManager:
    return torch.autocast(job.device, torch.bfloat16) if job.dtype == "bfloat16" else nullcontext()


def moved(tensor: Tensor, job: Job) -> Tensor:
    return tensor.pin_memory().to(job.device, non_blocking=True) if job.device == "cuda" else tensor


def now(job: Job) -> float:
    """The clock once the device has done all it was asked."""
    if job.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(job: Job) -> int:
    """Most memory that tensors took on a GPU; elsewhere, that this process took."""
    if job.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # a child's getrusage begins with its parent's peak
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def graphs() -> int:
    """Graphs that torch.compile made in this process: none where it gave up, and ever more where shapes change."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def prepared(preset: str, folder: Path) -> Path:
    """A model folder of the shape with fresh weights."""
    from smolforge.checkpoint import huggingface
    from smolforge.config import ModelConfig, presets
    from smolforge.models.decoder import build

    huggingface.save(build(ModelConfig.model_validate(presets.shape(preset))), folder)
    return folder
