"""A pretended Apple GPU: device `mps` on any machine, with the faults that torch has there.

    with AppleGpu():                              ... .to("mps")   wraps a CPU tensor; C++ sees the device `lazy`
        train(..., device="mps")                  ... an operation computes on the CPU, and wraps what it returns
                                                  ... .cpu()       gives the plain tensor back

As on the real one, float64 raises TypeError, tensors of two devices cannot be mixed, and a copy from pageable memory
that nobody waits for brings wrong numbers. What it cannot show: operations that Metal lacks or rounds otherwise, its
speed and its memory.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MPS, INSIDE_TORCH = torch.device("mps", 0), torch.device("lazy", 0)
"""What Python sees, and what torch's own code sees: it runs the backward pass of `lazy` without such a device."""
NO_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
MIXING_OPERATIONS = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put", "aten::index_put_")
"""May have tensors of two devices."""
WRONG = 1_688_849_860_263_945
"""What github.com/pytorch/pytorch/issues/139550 found where an id should have been."""


class AppleTensor(Tensor):
    """A tensor on the pretended GPU; `inner` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "AppleTensor":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(NO_FLOAT64)
        wrapped = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=INSIDE_TORCH,
        )
        wrapped.inner = inner
        return wrapped

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"AppleTensor({self.inner!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return MPS
        if func == Tensor.data.__set__:
            args[0].inner = args[1].inner
        if func == Tensor.tolist:
            return args[0].inner.tolist()
        if func == Tensor.new_tensor:
            return wrap(args[0].inner.new_tensor(*args[1:], **(kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*rename(args), **rename(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation: on the pretended GPU where a tensor or the wanted device is there, else as it is."""
    tensors: list[Tensor] = []
    map_leaves(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (args, kwargs))
    present = [tensor for tensor in tensors if isinstance(tensor, AppleTensor)]
    device, name = kwargs.get("device"), func._schema.name
    on_gpu = torch.device(device).type in (MPS.type, INSIDE_TORCH.type) if device is not None else bool(present)
    if on_gpu and kwargs.get("dtype") in (torch.float64, torch.complex128):
        raise TypeError(NO_FLOAT64)
    if on_gpu and device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")} | ({"pin_memory": None} if "pin_memory" in kwargs else {})
    if present and name not in MIXING_OPERATIONS:
        check_devices(name, tensors)
    result = func(*map_leaves(unwrap, args), **map_leaves(unwrap, kwargs))
    if crosses(name, args, device) and (kwargs.get("non_blocking") or args[2:3] == (True,)):
        unwrap(args[0] if name == "aten::copy_" else result).fill_(WRONG)
    return map_leaves(wrap, result) if on_gpu else result


def check_devices(name: str, tensors: list[Tensor]) -> None:
    """Raise torch's error for an operation on two devices; a number without dimensions may come from the CPU."""
    if any(not isinstance(tensor, AppleTensor) and tensor.ndim for tensor in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got mps:0 and cpu")


def crosses(name: str, args: Any, device: Any) -> bool:
    """Whether an operation copies from one device to the other."""
    if name == "aten::copy_":
        return isinstance(args[0], AppleTensor) != isinstance(args[1], AppleTensor)
    return name == "aten::_to_copy" and device is not None and isinstance(args[0], AppleTensor) == (device == "cpu")


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Change each value in lists, tuples and dictionaries; torch's own `tree_map` is ten times as slow."""
    if type(value) in (tuple, list):
        return type(value)(map_leaves(change, part) for part in value)
    if isinstance(value, dict):
        return {name: map_leaves(change, part) for name, part in value.items()}
    return change(value)


def unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, AppleTensor) else value


def wrap(value: Any) -> Any:
    return AppleTensor(value) if isinstance(value, Tensor) and not isinstance(value, AppleTensor) else value


def rename_device(value: Any) -> Any:
    return INSIDE_TORCH if isinstance(value, str | torch.device) and str(value) in ("mps", "mps:0") else value


def rename(arguments: Any) -> Any:
    """Return the arguments of a function of torch with the device that its own code knows."""
    return map_leaves(rename_device, arguments)


class RenamedDevice(TorchFunctionMode):
    """Rename the device in each call of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        kwargs = rename(kwargs or {})
        if func == torch.tensor and kwargs.get("device") == INSIDE_TORCH:
            return func(*args, **kwargs | {"device": "cpu"}).to(INSIDE_TORCH)
        return func(*rename(args), **kwargs)


class OnAppleGpu(TorchDispatchMode):
    """Catch what makes a tensor without having one: `torch.zeros(..., device="mps")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def enter_no_grad(mode: Any) -> None:
    """Enter no_grad instead of inference_mode, in which wrapped tensors have no views."""
    mode._inference_mode_context = torch.no_grad()
    mode._inference_mode_context.__enter__()


class AppleGpu(ExitStack):
    """Pretend that this machine has an Apple GPU, in all threads that start from now on."""

    def __enter__(self) -> "AppleGpu":
        super().__enter__()
        run_thread, make_generator = threading.Thread.run, torch.Generator

        def run(thread: threading.Thread) -> None:
            with RenamedDevice(), OnAppleGpu():
                run_thread(thread)

        for target, name, value in (
            (torch.mps, "is_available", lambda: True),
            (torch.mps, "synchronize", lambda: None),
            (torch.backends.mps, "get_name", lambda: "Apple M1"),
            (torch.backends.mps, "get_core_count", lambda: 8),
            (torch, "Generator", lambda device="cpu": make_generator()),
            (torch.inference_mode, "__enter__", enter_no_grad),
            (threading.Thread, "run", run),
        ):
            self.enter_context(patch.object(target, name, value))
        self.enter_context(RenamedDevice())
        self.enter_context(OnAppleGpu())
        return self
