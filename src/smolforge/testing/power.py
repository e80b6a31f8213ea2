"""Simulate what a disk may hold after a power loss in the middle of a program.

    Trace, up to a moment  ->  what was synced, and of the rest what a rule persists  ->  a folder

The model is that of the studies of crash consistency (Pillai et al., "All File Systems Are Not Created Equal",
OSDI 2014; Mohan et al., "Finding Crash-Consistency Bugs with Bounded Black-Box Crash Testing", OSDI 2018), at its
strictest: the content of a file is safe when that file was synced, and a name (made, moved or removed) when the
folder it stands in was. Everything later may be there or not, each by itself, so also in another order.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from smolforge.testing.disk import Operation, Trace

PersistRule = Callable[[Operation], Operation | None]
"""Returns what reaches the disk of an operation that was not synced: all, None, or another operation in its place."""


def all_lost(operation: Operation) -> None:
    """Keep only what was synced."""


def all_kept(operation: Operation) -> Operation:
    """Keep everything, as after a crash of the program alone."""
    return operation


def names_kept(operation: Operation) -> Operation | None:
    """Keep names without content: the empty files of a file system that delays its writes."""
    return None if operation.kind in ("write", "truncate") else operation


def zeros_kept(operation: Operation) -> Operation:
    """Keep names and sizes without content: files full of zeros."""
    return replace(operation, data=bytes(len(operation.data)))


def contents_kept(operation: Operation) -> Operation | None:
    """Keep content without names: renamed files have the old name, new files do not exist."""
    return operation if operation.kind in ("write", "truncate") else None


def random_loss(rng: random.Random) -> PersistRule:
    """Decide each operation by itself: half are kept, some writes in part or as zeros, the rest are lost."""

    def persist(operation: Operation) -> Operation | None:
        draw = rng.random()
        if draw < 0.5:
            return operation
        if operation.kind == "write" and draw < 0.6:
            return zeros_kept(operation)
        if operation.kind == "write" and draw < 0.75:
            return replace(operation, data=operation.data[: rng.randint(0, len(operation.data))])
        return None

    return persist


def after_power_loss(trace: Trace, index: int, into: Path, *, persist: PersistRule) -> None:
    """Write into a new folder what may be on the disk when power fails before operation `index` of a trace."""
    nodes: list[_Node] = [root := _Folder()]
    for path, data in trace.before.items():
        nodes.append(_Folder() if data is None else _File(bytearray(data)))
        _folder(root, path.parent).names[path.name] = nodes[-1]
    for node in nodes:
        node.sync()
    for operation in trace.operations[:index]:
        _apply(root, operation)
    into.mkdir(parents=True)
    _write_folder(root, into, persist)


@dataclass(eq=False)
class _File:
    """Its content for those who read it now, as it was synced last, and what came since."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    since: list[Operation] = field(default_factory=list)

    def sync(self) -> None:
        self.synced = bytes(self.data)
        self.since.clear()


@dataclass(eq=False)
class _Folder:
    """Its names, in the same three ways. A change says what the names it concerns stand for afterwards."""

    names: "dict[str, _File | _Folder]" = field(default_factory=dict)
    synced: "dict[str, _File | _Folder]" = field(default_factory=dict)
    since: "list[tuple[Operation, dict[str, _File | _Folder | None]]]" = field(default_factory=list)

    def sync(self) -> None:
        self.synced = dict(self.names)
        self.since.clear()

    def change(self, operation: Operation, change: "dict[str, _File | _Folder | None]") -> None:
        _rename(self.names, change)
        self.since.append((operation, change))


_Node = _File | _Folder


def _rename(names: dict[str, _Node], change: dict[str, _Node | None]) -> None:
    """Apply a change of names. Nothing has two names, so a new name removes the old one."""
    for name, node in change.items():
        for old_name in [key for key, value in names.items() if value is node]:
            del names[old_name]
        names.pop(name, None)
        if node is not None:
            names[name] = node


def _folder(root: _Folder, path: Path) -> _Folder:
    folder = _node(root, path)
    assert isinstance(folder, _Folder), path
    return folder


def _node(root: _Folder, path: Path) -> _Node:
    node: _Node = root
    for part in path.parts:
        if not isinstance(node, _Folder) or part not in node.names:
            raise ValueError(f"{path} is not in the trace: something made it that the trace did not see")
        node = node.names[part]
    return node


def _write(data: bytearray, operation: Operation) -> None:
    """Apply a write or truncate; both fill a gap with zeros."""
    data.extend(bytes(max(0, operation.offset - len(data))))
    if operation.kind == "truncate":
        del data[operation.offset :]
    else:
        data[operation.offset : operation.offset + len(operation.data)] = operation.data


def _apply(root: _Folder, operation: Operation) -> None:
    """Apply an operation as the program sees it."""
    parent, name = _folder(root, operation.path.parent), operation.path.name
    match operation.kind:
        case "sync":
            _node(root, operation.path).sync()
        case "write" | "truncate":
            file = parent.names[name]
            assert isinstance(file, _File), operation
            _write(file.data, operation)
            file.since.append(operation)
        case "create":
            parent.change(operation, {name: _File()})
        case "mkdir":
            parent.change(operation, {name: _Folder()})
        case "unlink" | "rmdir":
            parent.change(operation, {name: None})
        case "rename":
            assert operation.target is not None
            moved, target_folder = parent.names[name], _folder(root, operation.target.parent)
            if target_folder is not parent:
                parent.change(operation, {name: None})
            target_folder.change(
                operation, {operation.target.name: moved} | ({name: None} if target_folder is parent else {})
            )


def _write_folder(folder: _Folder, into: Path, persist: PersistRule) -> None:
    """Write what survives of a folder to a real disk."""
    names = dict(folder.synced)
    for operation, change in folder.since:
        if persist(operation) is not None:
            _rename(names, change)
    for name, node in names.items():
        if isinstance(node, _File):
            data = bytearray(node.synced)
            for written in filter(None, map(persist, node.since)):
                _write(data, written)
            (into / name).write_bytes(data)
        else:
            (into / name).mkdir()
            _write_folder(node, into / name, persist)
