"""Atomic writes of files and folders, which survive a power cut once they exist.

    .tmp-step-00000500/  files  ->  manifest.json (bytes, sha256)  ->  fsync of each, and of their folders
    -> rename to step-00000500  ->  fsync of the parent

A folder with a manifest is valid when every file has the size and hash it names. The manifest carries a
hash of itself, so that a flipped bit in it is noticed as well; the rule of that hash is the same in all formats.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from smolforge import operating_system
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, NewerFormatError
from smolforge.operating_system import fsync_path

log = logging.getLogger("smolforge")
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What a lock fails with on a file system that has none."""


def write_dir_atomic(
    folder: Path, fill: Callable[[Path], None], metadata: dict[str, Any] | None = None, *, needed_bytes: int = 0
) -> dict[str, Any]:
    """Let `fill` write into a temporary folder, then make it `folder`. Returns the manifest, which has `metadata`.

    Without metadata there is no manifest. Raises MissingResourceError when the disk is full (which says `needed_bytes`,
    where they are known) or cannot be written, and what `fill` raises otherwise. What was there before is
    untouched; `folder` is there after all only where its last sync failed.
    """
    with _replacement(folder, needed_bytes) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        make_dir_durable(temporary)
        fill(temporary)
        manifest = _write_manifest(temporary, metadata) if metadata is not None else {}
        for path in sorted(temporary.rglob("*")):
            fsync_path(path)
    return manifest


def write_file_atomic(path: Path, fill: Callable[[Path], None], needed_bytes: int = 0) -> None:
    """Write a single file in the same way: `fill` writes and checks a temporary file, which then becomes `path`."""
    with _replacement(path, needed_bytes) as temporary:
        make_dir_durable(path.parent)
        fill(temporary)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file by a text, atomically. Raises MissingResourceError where that fails."""
    with _replacement(path, len(text.encode())) as temporary:
        temporary.write_text(text, "utf-8", newline="\n")


@contextmanager
def _replacement(path: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary path, which becomes `path` once all was written, and is removed where that failed."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        fsync_path(temporary)
        operating_system.replace(temporary, path)
        fsync_path(path.parent)
    except (Exception, KeyboardInterrupt) as error:
        failure = write_error(path, error, needed_bytes)  # with the room there was
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        if _is_write_error(error, path.parent):
            raise failure from error
        raise


def _is_write_error(error: BaseException, folder: Path) -> bool:
    """Whether an error comes from a write, and not from a file that was only read. Rust has errors of its own."""
    if isinstance(error, OSError):
        return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(folder)
    return "(os error " in str(error)


def write_error(path: Path, error: BaseException, needed_bytes: int) -> MissingResourceError:
    """Return the error for a write that failed."""
    reason = str(error)
    full = isinstance(error, OSError) and error.errno in operating_system.DISK_FULL_ERRORS
    if not full and not any(f"(os error {number})" in reason for number in operating_system.DISK_FULL_ERRORS):
        return MissingResourceError(f"{path} could not be written: {reason}")
    needs = f"needs {needed_bytes:,} bytes and" if needed_bytes else "needs more:"
    return MissingResourceError(
        f"the disk is full: {path} {needs} {free_bytes(path.parent):,} are free; what was saved before is intact"
    )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder that may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def make_dir_durable(folder: Path) -> None:
    """Make a folder and its parents so that a power cut does not remove them."""
    if folder.is_dir():
        return
    if folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    make_dir_durable(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_path(folder.parent)


def remove_dir_atomic(folder: Path) -> None:
    """Delete a folder so that no half of it ever bears its name."""
    temporary = folder.with_name(f".tmp-removed-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    operating_system.replace(folder, temporary)
    fsync_path(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock_file(path: Path, refusal: Callable[[str], str] | None = None) -> Iterator[str]:
    """Hold a lock. It is released when this process ends, also by a kill. A file beside it names the holder.

    Yields the holder that ended without releasing it, or an empty string. If another process holds the lock, waits for
    it, or, with a `refusal`, raises ConfigError with the sentence that `refusal` makes of that holder: `1234 on host`.
    """
    try:
        lock = _acquire(path, 0.0 if refusal else -1.0)
    except Timeout:
        assert refusal is not None
        raise ConfigError(refusal(_holder(path))) from None
    try:
        left = _holder(path)
        with suppress(OSError):  # a full disk keeps nobody from the lock, only from saying whose it is
            _holder_path(path).write_text(f"{os.getpid()} on {socket.gethostname()}", "utf-8", newline="\n")
        try:
            yield left
        finally:
            with suppress(OSError):
                _holder_path(path).unlink()
    finally:
        lock.release()


def lock_holder(path: Path) -> str | None:
    """Return the process that has a lock now: `1234 on host`. None where nobody has it, or it cannot be read."""
    try:
        if _holder_path(path).exists():  # else nobody has it, and no lock file is made to find that out
            _acquire(path, 0.0).release()
    except Timeout:
        return _holder(path)
    except OSError:
        pass  # not ours to read
    return None


def _acquire(path: Path, timeout: float) -> BaseFileLock:
    """Acquire a lock within so many seconds (-1: wait). Raises filelock.Timeout.

    Where the file system has no locks, such as Lustre without flock, the existence of a file is the lock.
    """
    try:
        return FileLock(path, fallback_to_soft=False, preserve_lock_file=True).acquire(timeout).lock
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
            raise
        marker = path.with_name(f"{path.name}-file")
        log.warning(
            "%s is on a file system without locks (%s); %s stands for one, and is to be deleted by hand after a crash "
            "of the machine", path.parent, error.strerror, marker.name,
        )  # fmt: skip
        return SoftFileLock(marker).acquire(timeout).lock


def _holder_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-holder")


def _holder(path: Path) -> str:
    try:
        return _holder_path(path).read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def file_digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as a manifest has them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_manifest(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format_version": FORMAT_VERSION,
        **metadata,
        "files": {name: file_digest(folder / name) for name in names},
    }
    manifest["sha256"] = manifest_hash(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest. Raises InvalidFileError where it is missing, corrupted, or from a later version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        recorded, version = manifest["sha256"], manifest["format_version"]
        if not isinstance(version, int) or not all(isinstance(entry, dict) for entry in manifest["files"].values()):
            raise ValueError("it is no manifest")
    except FileNotFoundError:
        raise InvalidFileError(f"{folder} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise InvalidFileError(f"{path} is damaged: {error}") from None
    if recorded != manifest_hash(manifest):
        raise InvalidFileError(f"{path} is damaged: its own hash does not match")
    if version > FORMAT_VERSION:
        raise NewerFormatError(f"{path} has format {version}; this version reads up to {FORMAT_VERSION}")
    return manifest


def check_manifest(folder: Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """Check a folder and return its manifest. Raises InvalidFileError for the first file that does not match it.

    `only` limits the check to the files about to be read. Two are hashed at a time.
    """
    manifest = read_manifest(folder)
    files = {name: entry for name, entry in manifest["files"].items() if only is None or name in only}
    with ThreadPoolExecutor(2) as pool:
        for damage in pool.map(lambda name: _find_damage(folder / name, files[name]), files):
            if damage is not None:
                pool.shutdown(cancel_futures=True)
                raise InvalidFileError(damage)
    return manifest


def _find_damage(path: Path, expected: dict[str, Any]) -> str | None:
    """Return what is wrong with a file, or None."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected.get("bytes"):
            return f"{path} is damaged: its size is not what {MANIFEST} says"
        if file_digest(path) != expected:
            return f"{path} is damaged: its content is not what {MANIFEST} says"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest without its own hash."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
