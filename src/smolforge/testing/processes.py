"""Processes that are killed, stopped for a while, or kept on a small disk.

Children are forked from one process that has torch imported, so each takes a tenth of a second. (A fork of a
process that has computed with torch would hang: its threads are not copied.)
"""

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import psutil

PRELOADED = ["smolforge.tokenizer", "smolforge.runs", "smolforge.cli.run_display", "cyclopts", "torch._dynamo"]
PRELOADED += ["smolforge.tracking.tensorboard"]
"""What is imported before the first child; tests may add what their own files begin with."""
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PAUSE_SECONDS = 0.0002
"""Between two looks at a child: a thirtieth of a small save, and a processor that others can use."""


def start(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Run an importable function in a process of its own, and do not wait for it."""
    context: Any = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload([*PRELOADED, "smolforge.testing.preloaded"])
    child = context.Process(target=work, args=arguments)
    child.start()
    return child


def in_child(work: Callable[..., object], *arguments: object) -> int:
    """Run an importable function in a process of its own; returns its exit code, minus the signal that killed it."""
    return wait_for_exit(start(work, *arguments))


def wait_for_exit(child: BaseProcess) -> int:
    """Wait for a child; returns its exit code, minus the signal that killed it."""
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def die(*_: object) -> NoReturn:
    """Kill this process: no handler, no cleaning up."""
    psutil.Process().kill()
    raise AssertionError("unreachable")


def wait_until(ready: Callable[[], bool], child: BaseProcess) -> None:
    """Return as soon as it is, or the child has ended."""
    while child.is_alive() and not ready():
        time.sleep(PAUSE_SECONDS)


def send_when(child: BaseProcess, number: int, ready: Callable[[], bool], *, delay: float = 0.0) -> int:
    """Send a signal to a child, `delay` seconds after it is `ready`; returns its exit code.

    A child that ended before is not signalled.
    """
    wait_until(ready, child)
    child.join(delay)
    if child.is_alive():
        assert child.pid is not None
        os.kill(child.pid, number)
    return wait_for_exit(child)


@contextmanager
def paused(process: int) -> Iterator[None]:
    """Stop a process for a while, and let it go on at the end."""
    psutil.Process(process).suspend()
    try:
        yield
    finally:
        psutil.Process(process).resume()


def on_small_disk(folder: Path, size_bytes: int) -> list[str]:
    """The beginning of a command line that runs the rest with a disk of so many bytes at a folder.

    The disk is Linux's tmpfs, seen by that command and its children alone, and gone when they end.
    Raises OSError where a user may not make one.
    """
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(size_bytes), str(folder)]
    result = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"no disk could be mounted at {folder}: {result.stderr.strip()}")
    return prefix
