"""The file operations of a program, one by one: let through, refused, cut short, or written down.

    open, os.write, os.fsync, os.rename ...  ->  Operation  ->  a rule  ->  the real call

Python's own io written in Python (`_pyio`) makes each of its system calls through `os`, so a file that is opened
for writing here is one of those, buffered as ever. What C or Rust code writes by itself is not seen: a folder
then holds more than its trace (`power.after_power_loss`) says, which is how to find out.
"""

import builtins
import errno
import fcntl
import importlib
import io
import itertools
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn
from unittest import mock

Kind = Literal["create", "truncate", "write", "sync", "rename", "mkdir", "unlink", "rmdir"]
PYTHON_IO: Any = importlib.import_module("_pyio")
NEED_ROOM: tuple[Kind, ...] = ("create", "write", "mkdir")


@dataclass(frozen=True)
class Operation:
    """What is about to be done to a disk. Paths are relative to the folder that is watched."""

    kind: Kind
    path: Path
    offset: int = 0
    """Where a write begins; how much a truncate leaves."""
    data: bytes = b""
    target: Path | None = None
    """Of a rename, the new name."""

    def __str__(self) -> str:
        more = f" to {self.target}" if self.target else f", {len(self.data)} bytes" if self.data else ""
        return f"{self.kind} {self.path}{more}"


Go = Callable[[Operation], Any]
Rule = Callable[[Operation, Go], Any]
"""Is given an operation and the way to do it; returns what that returned, or raises instead."""


class Crash(BaseException):
    """Stands for a process that is gone: no ordinary handler catches it."""


@dataclass
class Trace:
    """What happened to a folder, enough to rebuild it as it was at any moment."""

    before: dict[Path, bytes | None]
    """The folder at first: the content of files, None for folders."""
    operations: list[Operation] = field(default_factory=list)


@contextmanager
def watched(below: Path, rule: Rule) -> Iterator[None]:
    """Let a rule decide every operation below a folder, one at a time whatever the thread."""
    calls = _Calls(below.resolve(), rule)
    with (
        mock.patch.dict(vars(os), calls.of_os()),
        mock.patch.object(builtins, "open", calls.open_file),
        mock.patch.object(io, "open", calls.open_file),
    ):
        yield


def _vanish(operation: Operation) -> NoReturn:
    raise Crash(f"before: {operation}")


@contextmanager
def crashing(
    below: Path, after: int, torn: bool = False, die: Callable[[Operation], NoReturn] = _vanish
) -> Iterator[None]:
    """The process dies at an operation below a folder, once `after` of them went well.

    Nothing is done there from then on, as the dead clean nothing up; by `torn` the write it dies in is half done.
    `die` raises Crash, unless a child process is to die for good (`processes.die`).
    """
    count = itertools.count()

    def rule(operation: Operation, go: Go) -> Any:
        number = next(count)
        if number == after and torn and operation.kind == "write":
            go(replace(operation, data=operation.data[: len(operation.data) // 2]))
        if number >= after:
            die(operation)
        return go(operation)

    with watched(below, rule):
        yield


@contextmanager
def failing(
    below: Path,
    after: int = 0,
    error: int = errno.ENOSPC,
    kinds: Collection[Kind] = NEED_ROOM,
    times: int | None = None,
) -> Iterator[None]:
    """Operations of some kinds below a folder fail with an errno, once `after` of them went well.

    All do until the end, or so many `times`. By default it is the disk that is full.
    """
    count = itertools.count()

    def rule(operation: Operation, go: Go) -> Any:
        if operation.kind in kinds:
            number = next(count)
            if number >= after and (times is None or number < after + times):
                raise OSError(error, os.strerror(error), str(below / operation.path))
        return go(operation)

    with watched(below, rule):
        yield


@contextmanager
def recorded(below: Path) -> Iterator[Trace]:
    """Write down the operations below a folder that went well."""
    trace = Trace(content(below))

    def rule(operation: Operation, go: Go) -> Any:
        result = go(operation)
        written = operation.data[:result] if operation.kind == "write" else b""
        trace.operations.append(replace(operation, data=written))
        return result

    with watched(below, rule):
        yield trace


def content(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder, by relative path: the content of files, None for folders."""
    found = sorted(folder.rglob("*"))
    return {path.relative_to(folder): None if path.is_dir() else path.read_bytes() for path in found}


class _Calls:
    """Stands in for the functions of `os` that change a disk. Calls that concern other folders pass through."""

    def __init__(self, folder: Path, rule: Rule) -> None:
        self.folder, self.rule, self.lock = folder, rule, threading.RLock()
        self.real: dict[str, Callable[..., Any]] = dict(vars(os))
        self.open_really = io.open

    def of_os(self) -> dict[str, Callable[..., Any]]:
        """The stand-ins, by the names they stand for."""
        found: dict[str, Callable[..., Any]] = {"open": self.open, "write": self.write, "ftruncate": self.truncate}
        found |= {name: self.sync(name) for name in ("fsync", "fdatasync") if name in self.real}
        found |= {name: self.move(name) for name in ("rename", "replace")}
        kinds: dict[str, Kind] = {"mkdir": "mkdir", "rmdir": "rmdir", "unlink": "unlink", "remove": "unlink"}
        found |= {name: self.by_name(name, kind) for name, kind in kinds.items()}
        return found | ({"sendfile": self.sendfile} if "sendfile" in self.real else {})

    def act(self, operation: Operation, go: Go) -> Any:
        with self.lock:
            return self.rule(operation, go)

    def inside(self, path: Any, within: int | None = None) -> Path | None:
        """Where below the folder a path or an open file is, if it is."""
        if isinstance(path, int):
            where = path_of(path)
        else:
            given = Path(path_of(within) if within is not None else Path.cwd(), os.fsdecode(path))
            where = given.parent.resolve() / given.name
        return where.relative_to(self.folder) if where.is_relative_to(self.folder) else None

    def open_file(self, file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if set(mode) & set("wax+") and self.inside(file) is not None:
            return PYTHON_IO.open(file, mode, *rest, **named)
        return self.open_really(file, mode, *rest, **named)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def go(_: Operation) -> int:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)

        where = self.inside(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
        there = where is not None and os.path.lexists(self.folder / where)
        if where is None or (there and not flags & os.O_TRUNC):
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)
        return self.act(Operation("truncate" if there else "create", where), go)

    def write(self, file: int, data: Any) -> int:
        where = self.inside(file)
        if where is None:
            return self.real["write"](file, data)
        with self.lock:
            appends = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND
            offset = os.fstat(file).st_size if appends else os.lseek(file, 0, os.SEEK_CUR)
            operation = Operation("write", where, offset, bytes(data))
            return self.act(operation, lambda each: self.real["write"](file, each.data))

    def truncate(self, file: int, length: int) -> None:
        where = self.inside(file)
        if where is None:
            return self.real["ftruncate"](file, length)
        return self.act(Operation("truncate", where, length), lambda _: self.real["ftruncate"](file, length))

    def sync(self, name: str) -> Callable[..., None]:
        def sync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            where = self.inside(number)
            if where is None:
                return self.real[name](number)
            return self.act(Operation("sync", where), lambda _: self.real[name](number))

        return sync

    def move(self, name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **named: int | None) -> None:
            here = self.inside(source, named.get("src_dir_fd"))
            there = self.inside(target, named.get("dst_dir_fd"))
            if here is None or there is None:
                return self.real[name](source, target, **named)
            return self.act(Operation("rename", here, target=there), lambda _: self.real[name](source, target, **named))

        return move

    def by_name(self, name: str, kind: Kind) -> Callable[..., None]:
        def act(path: Any, *rest: Any, dir_fd: int | None = None) -> None:
            where = self.inside(path, dir_fd)
            if where is None:
                return self.real[name](path, *rest, dir_fd=dir_fd)
            return self.act(Operation(kind, where), lambda _: self.real[name](path, *rest, dir_fd=dir_fd))

        return act

    def sendfile(self, target: int, *rest: Any, **named: Any) -> int:
        """Refused, so that shutil copies by reading and writing."""
        if self.inside(target) is not None:
            raise OSError(errno.EINVAL, "files that are watched are copied by write")
        return self.real["sendfile"](target, *rest, **named)


def path_of(file: int) -> Path:
    """Where an open file or folder is now, whatever it was called when it was opened."""
    if sys.platform == "darwin":
        return Path(os.fsdecode(fcntl.fcntl(file, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")))
    return Path(f"/proc/self/fd/{file}").readlink()
