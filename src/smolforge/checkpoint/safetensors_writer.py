"""Tensors -> a safetensors file, straight from the memory they are in.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | the tensors' bytes, one after another

The format, and byte for byte the order, of https://github.com/huggingface/safetensors. That library copies every
tensor before it writes and keeps Python's lock meanwhile; this writes while another thread trains.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Dtypes, narrowest first. A file has the widest first, so that each tensor is aligned."""


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    *,
    check_cancelled: Callable[[], None] = lambda: None,
) -> None:
    """Write contiguous CPU tensors. `check_cancelled` is called before each, and may raise."""
    kinds = list(DTYPES)
    order = sorted(tensors, key=lambda name: (-kinds.index(tensors[name].dtype), name))
    with path.open("wb", buffering=0) as file:
        _write_all(file.write, header(order, tensors, metadata))
        for name in order:
            check_cancelled()
            _write_all(file.write, tensor_bytes(tensors[name]))


def header(order: list[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> memoryview:
    """Return the start of a file of these tensors: the length of the JSON, and the JSON."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        kind, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return memoryview(len(content).to_bytes(8, "little") + content)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_all(write: Callable[[memoryview], int | None], content: memoryview) -> None:
    """A raw file takes as much as it can at a time: at most 2 GiB on Linux."""
    while content:
        content = content[write(content) or 0 :]
