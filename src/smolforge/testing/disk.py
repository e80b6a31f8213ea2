"""Intercept the file operations of a program: pass on, refuse, cut short, or record each.

    open, os.write, os.fsync, os.rename ...  ->  Operation  ->  a rule  ->  the real call

Python's own io written in Python (`_pyio`) makes each of its system calls through `os`, so a file that is opened
for writing here is one of those, buffered as ever. What C or Rust code writes by itself is not seen: a folder
then holds more than its trace (`power.after_power_loss`) says, which is how to find out.
"""

import builtins
import errno
import importlib
import io
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args
from unittest import mock

Kind = Literal[
    "create", "truncate", "write", "sync", "rename", "mkdir", "unlink", "rmdir", "open", "read", "stat", "list"
]
READS: tuple[Kind, ...] = ("open", "read", "stat", "list")
"""Operations that change nothing. They are intercepted only where that is asked for."""
EVERY_KIND: tuple[Kind, ...] = get_args(Kind)
PYTHON_IO: Any = importlib.import_module("_pyio")
NEED_SPACE: tuple[Kind, ...] = ("create", "write", "mkdir")
KINDS: dict[str, Kind] = {
    "mkdir": "mkdir",
    "rmdir": "rmdir",
    "unlink": "unlink",
    "remove": "unlink",
    "ftruncate": "truncate",
    "fsync": "sync",
    "fdatasync": "sync",
}
"""The functions of `os` that concern one path or open file."""
LOOKS: dict[str, Kind] = {"read": "read", "stat": "stat", "lstat": "stat", "listdir": "list", "scandir": "list"}
"""Those of them that change nothing."""


@dataclass(frozen=True)
class Operation:
    """An operation that is about to happen on a disk. Paths are relative to the intercepted folder."""

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


Perform = Callable[[Operation], Any]
Rule = Callable[[Operation, Perform], Any]
"""Gets an operation and the function that performs it; returns its result, or raises instead."""


class Crash(BaseException):
    """The simulated death of a process: no ordinary handler catches it."""


@dataclass
class Trace:
    """The operations on a folder, enough to rebuild it as it was at any moment."""

    before: dict[Path, bytes | None]
    """The folder at first: the content of files, None for folders."""
    operations: list[Operation] = field(default_factory=list)


@contextmanager
def intercept(folder: Path, rule: Rule, *, reads: bool = False) -> Iterator[None]:
    """Let a rule decide every operation below a folder that changes it, one at a time over all threads.

    With `reads` it also decides those that only look at it, and at the folder itself; no path may go through a link.
    """
    calls = _Calls(folder.resolve(), rule, reads)
    with (
        mock.patch.dict(vars(os), calls.os_replacements()),
        mock.patch.object(builtins, "open", calls.open_file),
        mock.patch.object(io, "open", calls.open_file),
    ):
        yield


def _raise_crash(operation: Operation) -> NoReturn:
    raise Crash(f"before: {operation}")


def crashing(
    folder: Path, after: int, torn: bool = False, *, die: Callable[[Operation], NoReturn] = _raise_crash
) -> AbstractContextManager[None]:
    """Kill the process at an operation below a folder, after `after` successful ones.

    Nothing changes there from then on, as no cleanup runs; with `torn` the write at which it dies is half done.
    `die` raises Crash, unless a child process is to die for good (`processes.die`).
    """
    count = itertools.count()

    def rule(operation: Operation, perform: Perform) -> Any:
        number = next(count)
        if number == after and torn and operation.kind == "write":
            perform(replace(operation, data=operation.data[: len(operation.data) // 2]))
        if number >= after:
            die(operation)
        return perform(operation)

    return intercept(folder, rule)


def failing(
    folder: Path,
    after: int = 0,
    error: int = errno.ENOSPC,
    *,
    kinds: Collection[Kind] = NEED_SPACE,
    times: int | None = None,
) -> AbstractContextManager[None]:
    """Let operations of some kinds below a folder fail with an errno, after `after` successful ones.

    All fail until the end, or the first `times`. By default the disk is full; EVERY_KIND is a disk out of reach.
    """
    count = itertools.count()

    def rule(operation: Operation, perform: Perform) -> Any:
        if operation.kind in kinds:
            number = next(count)
            if number >= after and (times is None or number < after + times):
                raise OSError(error, os.strerror(error), str(folder / operation.path))
        return perform(operation)

    return intercept(folder, rule, reads=not set(kinds).isdisjoint(READS))


def renaming_by_copies(folder: Path) -> AbstractContextManager[None]:
    """Let renames below a folder copy file by file, then delete, as disks do that have no rename.

    Each of those is an operation of its own for an interception that surrounds this one.
    """

    def rule(operation: Operation, perform: Perform) -> Any:
        if operation.kind != "rename" or operation.target is None:
            return perform(operation)
        source, target = folder / operation.path, folder / operation.target
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
            return shutil.rmtree(source)
        shutil.copyfile(source, target)
        return source.unlink()

    return intercept(folder, rule)


@contextmanager
def recorded(folder: Path) -> Iterator[Trace]:
    """Record the successful operations below a folder."""
    trace = Trace(folder_content(folder))

    def rule(operation: Operation, perform: Perform) -> Any:
        result = perform(operation)
        written = operation.data[:result] if operation.kind == "write" else b""
        trace.operations.append(replace(operation, data=written))
        return result

    with intercept(folder, rule):
        yield trace


def folder_content(folder: Path) -> dict[Path, bytes | None]:
    """Return everything in a folder, by relative path: the content of files, None for folders."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder): None if path.is_dir() else path.read_bytes() for path in paths}


@dataclass(frozen=True)
class OpenFile:
    """A file that was opened below the folder."""

    path: Path
    """Relative to the folder; the present one, also after a rename."""
    appends: bool
    identity: tuple[int, int]


def identity_of(file: int) -> tuple[int, int]:
    """Return what tells an open file from any other."""
    stat = os.fstat(file)
    return stat.st_dev, stat.st_ino


class _Calls:
    """Replacements for the functions of `os` that change a disk. Calls for other folders pass through."""

    def __init__(self, folder: Path, rule: Rule, reads: bool) -> None:
        self.folder, self.rule, self.reads, self.lock = folder, rule, reads, threading.RLock()
        self.real: dict[str, Callable[..., Any]] = dict(vars(os))
        self.real_open = io.open
        self.opened: dict[int, OpenFile] = {}

    def os_replacements(self) -> dict[str, Callable[..., Any]]:
        """Return the replacements by the names of `os`."""
        replacements = {"open": self.open, "write": self.write, "sendfile": self.sendfile, "close": self.close}
        replacements |= {name: self.move(name) for name in ("rename", "replace")}
        kinds = KINDS | LOOKS if self.reads else KINDS
        replacements |= {name: self.one_path(name, kind) for name, kind in kinds.items()}
        return {name: replacement for name, replacement in replacements.items() if name in self.real}

    def apply_rule(self, operation: Operation, perform: Perform) -> Any:
        with self.lock:
            return self.rule(operation, perform)

    def relative_path(self, path: Any, dir_fd: int | None = None) -> Path | None:
        """Return the path, relative to the folder, of a path or an open file; None if it is not below the folder."""
        if isinstance(path, int):
            return self.opened[path].path if self.is_open(path) else None
        parent = self.relative_path(dir_fd) if dir_fd is not None else None
        if dir_fd is not None and parent is None:
            return None
        full_path = Path(self.folder / parent if parent is not None else Path.cwd(), os.fsdecode(path))
        # to resolve a link is to look at it
        resolved = full_path if self.reads else full_path.parent.resolve() / full_path.name
        return resolved.relative_to(self.folder) if resolved.is_relative_to(self.folder) else None

    def is_open(self, file: int) -> bool:
        """Whether a file descriptor is one that was opened below the folder, and not another that got its number."""
        try:
            return file in self.opened and self.opened[file].identity == identity_of(file)
        except OSError:  # it is closed
            return False

    def open_file(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if (self.reads or set(mode) & set("wax+")) and self.relative_path(file) is not None:
            return PYTHON_IO.open(file, mode, *args, **kwargs)
        return self.real_open(file, mode, *args, **kwargs)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def perform(_: Operation) -> int:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)

        inner_path = self.relative_path(path, dir_fd)
        if inner_path is None:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)
        exists = not flags & (os.O_CREAT | os.O_TRUNC) or os.path.lexists(self.folder / inner_path)
        changes = flags & os.O_TRUNC if exists else flags & os.O_CREAT
        operation = Operation("open" if not changes else "truncate" if exists else "create", inner_path)
        file = self.apply_rule(operation, perform) if changes or self.reads else perform(operation)
        self.opened[file] = OpenFile(inner_path, bool(flags & os.O_APPEND), identity_of(file))
        return file

    def close(self, file: int) -> None:
        """Forget an open file first: the next one may get its number, and even its inode."""
        self.opened.pop(file, None)
        self.real["close"](file)

    def write(self, file: int, data: Any) -> int:
        inner_path = self.relative_path(file)
        if inner_path is None:
            return self.real["write"](file, data)
        with self.lock:
            offset = os.fstat(file).st_size if self.opened[file].appends else os.lseek(file, 0, os.SEEK_CUR)
            operation = Operation("write", inner_path, offset, bytes(data))
            return self.apply_rule(operation, lambda applied: self.real["write"](file, applied.data))

    def move(self, name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **kwargs: int | None) -> None:
            source_path = self.relative_path(source, kwargs.get("src_dir_fd"))
            target_path = self.relative_path(target, kwargs.get("dst_dir_fd"))
            if source_path is None or target_path is None:
                self.real[name](source, target, **kwargs)
                return
            with self.lock:
                operation = Operation("rename", source_path, target=target_path)
                self.apply_rule(operation, lambda _: self.real[name](source, target, **kwargs))
                self.follow(source_path, target_path)

        return move

    def follow(self, source: Path, target: Path) -> None:
        """Record the new paths of open files after a rename."""
        for file, opened in list(self.opened.items()):
            if opened.path.is_relative_to(source):
                self.opened[file] = replace(opened, path=target / opened.path.relative_to(source))

    def one_path(self, name: str, kind: Kind) -> Callable[..., Any]:
        def act(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            path = path.fileno() if kind == "sync" and not isinstance(path, int) else path
            inner_path = self.relative_path(path, kwargs.get("dir_fd"))
            if inner_path is None:
                return self.real[name](path, *args, **kwargs)
            offset = args[0] if kind == "truncate" else 0
            return self.apply_rule(
                Operation(kind, inner_path, offset), lambda _: self.real[name](path, *args, **kwargs)
            )

        return act

    def sendfile(self, target: int, *args: Any, **kwargs: Any) -> int:
        """Refused, so that shutil copies by reading and writing."""
        if self.relative_path(target) is not None or (self.reads and self.relative_path(args[0]) is not None):
            raise OSError(errno.EINVAL, "files that are watched are copied by write")
        return self.real["sendfile"](target, *args, **kwargs)
