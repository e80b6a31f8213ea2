"""NVIDIA's management library, where the driver and nvidia-ml-py have it: who asks a GPU about itself asks here."""

from importlib import import_module
from typing import Any, NamedTuple

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
