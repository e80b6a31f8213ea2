"""Small true things for tests, ours and yours: a model, a tokenizer, a text, and faults to survive.

Nothing in smolforge imports this.
"""

import builtins
import errno
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolforge.config import ModelConfig
from smolforge.model import LanguageModel, build
from smolforge.testing.hub import HubMirror as HubMirror
from smolforge.tokenizer import Tokenizer

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "token",
    "and",
    "a",
    "token",
    "follows",
    "another",
    "so",
    "it",
    "learns",
    "what",
    "follows",
    "what",
]


def tiny_config(**changes: Any) -> ModelConfig:
    """A shape with every feature of the big one: grouped heads, several layers, a tied head."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 10_000.0,
        "initializer_range": 0.1,
    }
    return ModelConfig.model_validate(shape | changes)


def tiny_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE of a few merges, trained on `sentences`."""
    return Tokenizer.train([sentences(400)], vocab_size)


def tiny_model(seed: int = 0, **changes: Any) -> LanguageModel:
    """A model with random weights and a tokenizer that fits it."""
    model = build(tiny_config(**changes), seed)
    model.tokenizer = tiny_tokenizer(model.config.vocab_size)
    return model.eval()


def sentences(count: int, start: int = 0) -> str:
    """Lines of simple text, each different from the others, the same every time."""
    lines = []
    for number in range(start, start + count):
        picked = [WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(9)]
        lines.append(f"{number}: {' '.join(picked)}.")
    return "\n".join(lines) + "\n"


def in_child(work: Callable[..., object], *arguments: object) -> int:
    """Run an importable function in a process of its own; returns its exit code, minus the signal that killed it.

    Children are forked from one process that has torch imported and no threads, so each takes milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["smolforge.model", "smolforge.tokenizer"])
    child = context.Process(target=work, args=arguments)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


class Crash(BaseException):
    """Stands for a process that is gone: no ordinary handler catches it."""


@contextmanager
def failing_writes(below: Path, after: int, error: BaseException | None = None) -> Iterator[None]:
    """Every attempt to open a file for writing below a folder fails, once `after` of them went well.

    By default with "no space left on device".
    """
    real, left = builtins.open, [after]

    def guarded(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        inside = isinstance(file, str | os.PathLike) and below.resolve() in Path(file).resolve().parents
        if inside and set(mode) & set("wax+"):
            if left[0] == 0:
                raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            left[0] -= 1
        return real(file, mode, *rest, **named)

    builtins.open, io.open = guarded, guarded
    try:
        yield
    finally:
        builtins.open, io.open = real, real


def flip_bit(path: Path, bit: int) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
