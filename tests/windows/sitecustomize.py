"""smolforge as if this were Windows, as far as Python allows: PYTHONPATH=tests/windows python -m smolforge ...

Python imports this file before anything else, in each process that it spawns too. What smolforge's modules import has
what Windows' Python has, by name (fixtures/windows-names.json, read off CPython 3.11 for Windows); sys.platform and
os.name are Windows'; standard streams are cp1252. Libraries see the real system: they have code of their own for each.

This does not show: renames of files that are open, names of files, and that the libraries work on Windows.
"""

import builtins
import errno  # noqa: F401
import io
import json
import multiprocessing
import os
import select  # noqa: F401
import signal
import sys
import time  # noqa: F401
import types
from pathlib import Path
from typing import Any

import psutil

NAMES = json.loads(Path(__file__).parents[1].joinpath("fixtures", "windows-names.json").read_text("utf-8"))
MISSING = {*NAMES["missing"], "_posixsubprocess"}


class StandIn(types.ModuleType):
    """A module as Windows has it."""

    def __init__(self, real: Any, only: set[str] | None = None, **values: object) -> None:
        super().__init__(real.__name__)
        vars(self).update(_real=real, _only=only, _values=values)

    def __getattr__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        if self._only is not None and name not in self._only and not name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._real, name, value)


class PsutilProcess:
    """psutil's, with the peak that it tells on Windows alone."""

    def __init__(self, *args: Any) -> None:
        self.real = psutil.Process(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def memory_info(self) -> types.SimpleNamespace:
        rss = self.real.memory_info().rss
        return types.SimpleNamespace(rss=rss, peak_wset=rss)


def open_key(*_: object) -> None:
    raise FileNotFoundError("no long paths here")


STAND_INS = {
    "sys": StandIn(sys, platform="win32"),
    "os": StandIn(os, set(NAMES["os"]), name="nt"),
    "signal": StandIn(signal, set(NAMES["signal"]), SIGBREAK=signal.SIGHUP),
    "psutil": StandIn(psutil, Process=PsutilProcess),
    "winreg": StandIn(types.ModuleType("winreg"), HKEY_LOCAL_MACHINE=0, OpenKey=open_key),
    **{name: StandIn(sys.modules[name], set(NAMES[name])) for name in ("errno", "time", "select")},
}
real_import = builtins.__import__


def windows_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: A002
    """Import what a module of smolforge gets on Windows; all other modules get theirs."""
    importer = (globals or {}).get("__name__", "")
    if importer.partition(".")[0] != "smolforge" or level:
        return real_import(name, globals, locals, fromlist, level)
    if name in MISSING:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return STAND_INS.get(name) or real_import(name, globals, locals, fromlist, level)


builtins.__import__ = windows_import
multiprocessing.set_start_method("spawn", force=True)
if "PYTHONIOENCODING" not in os.environ:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="cp1252")
