"""What the file system of a folder can do: probes that runs and checkpoints rely on, tried rather than believed.

    probe_folder(folder) -> {"locks": True, "symlinks": "OSError: ...", ...}

A probe that fails gives its error as a sentence. Nothing stays in the folder.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from smolforge import atomic
from smolforge.errors import ConfigError

PATH_LENGTHS = (200, 259, 300, 1000, 4000)
"""Windows takes 259 characters unless it is told otherwise."""


def probe_folder(folder: Path) -> dict[str, bool | int | str]:
    """Return what works in a folder, by the name of each probe."""
    values: dict[str, bool | int | str] = {"file_system": file_system_type(folder)}
    for probe in PROBES:
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as empty:
            try:
                values[probe.__name__] = probe(Path(empty))
            except (OSError, NotImplementedError) as error:
                values[probe.__name__] = f"{type(error).__name__}: {error}"
    return values


def file_system_type(folder: Path) -> str:
    """Return the type of a folder's file system, such as ext4 or 9p; an empty string where it is unknown."""
    try:
        mounts = [(Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True)]
    except (OSError, RuntimeError):
        return ""
    above = [(len(mount.parts), kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return max(above, default=(0, ""))[1]


def locks(folder: Path) -> bool:
    """Whether a lock keeps a second holder out."""

    def refuse(holder: str) -> str:
        return "held"

    with atomic.lock_file(folder / "lock", refuse):
        try:
            with atomic.lock_file(folder / "lock", refuse):
                return False
        except ConfigError:
            return True


def rename_replaces(folder: Path) -> bool:
    """Whether a file replaces another of the same name."""
    old, new = folder / "old", folder / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    new.replace(old)
    return old.read_bytes() == b"new" and not new.exists()


def rename_replaces_open_file(folder: Path) -> bool:
    """Whether it does so while somebody reads the other, who goes on reading it."""
    (folder / "old").write_bytes(b"old")
    with (folder / "old").open("rb") as reader:
        return rename_replaces(folder) and reader.read() == b"old"


def folder_rename(folder: Path) -> bool:
    """Whether a folder with a file in it can be renamed, as each checkpoint is."""
    (folder / "old").mkdir()
    (folder / "old" / "file").write_bytes(b"text")
    (folder / "old").replace(folder / "new")
    return (folder / "new" / "file").read_bytes() == b"text"


def folder_fsync(folder: Path) -> bool:
    """Whether a rename can be made to survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def symlinks(folder: Path) -> bool:
    """Whether links can be made, as the Hub's cache does."""
    (folder / "link").symlink_to("target")
    return (folder / "link").is_symlink()


def case_matters(folder: Path) -> bool:
    """Whether `A` and `a` are two files."""
    (folder / "A").touch()
    return not (folder / "a").exists()


def longest_path(folder: Path) -> int:
    """Return the longest of PATH_LENGTHS at which a file can be made; 0 for none."""
    longest = 0
    for length in PATH_LENGTHS:
        path = folder.absolute()
        while length - len(str(path)) > 100:
            path /= "d" * 98
        path /= "f" * max(1, length - len(str(path)) - 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:
            break
        longest = length
    return longest


PROBES: tuple[Callable[[Path], bool | int], ...] = (
    locks,
    rename_replaces,
    rename_replaces_open_file,
    folder_rename,
    folder_fsync,
    symlinks,
    case_matters,
    longest_path,
)
