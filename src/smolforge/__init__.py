"""SmolLM2 and its kin, through their whole life: build, train, resume, talk, hand on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.checkpoint.loading import load
    from smolforge.generation.stream import generate, stream
    from smolforge.runs import train

__version__ = "0.1.0"
__all__ = ["generate", "load", "stream", "train"]

_HOMES = {
    "generate": "smolforge.generation.stream",
    "load": "smolforge.checkpoint.loading",
    "stream": "smolforge.generation.stream",
    "train": "smolforge.runs",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
