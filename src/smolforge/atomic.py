"""Files and folders that appear whole or not at all, and survive a power cut once they are there.

    .tmp-step-00000500/  files  ->  manifest.json (bytes, sha256)  ->  fsync of each, and of their folders
    -> rename to step-00000500  ->  fsync of the parent

A folder with a manifest is sound when every file has the size and hash it names. The manifest carries a
hash of itself, so that a flipped bit in it is noticed as well; the rule of that hash is the same in all formats.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFile, LaterFormat, MissingResource

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def write_whole(
    folder: Path, fill: Callable[[Path], None], facts: dict[str, Any] | None = None, needed_bytes: int = 0
) -> dict[str, Any]:
    """Let `fill` write into a temporary folder, then make it `folder`. Returns the manifest, which has `facts`.

    Without facts there is no manifest. Raises MissingResource when the disk is full (which says `needed_bytes`,
    where they are known) or cannot be written, and what `fill` raises otherwise. What was there before is
    untouched; `folder` is there after all only where its last sync failed.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
        fill(temporary)
        manifest = _write_manifest(temporary, facts) if facts is not None else {}
        for path in sorted(temporary.rglob("*")):
            sync(path)
        sync(temporary)
        temporary.rename(folder)
        sync(folder.parent)
    except (Exception, KeyboardInterrupt) as error:
        said = unwritten(folder, error, needed_bytes)  # with the room there was
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_of_writing(error, folder.parent):
            raise said from error
        raise
    return manifest


def write_whole_file(path: Path, fill: Callable[[Path], None], needed_bytes: int = 0) -> None:
    """The same for a single file: `fill` writes and checks one of another name beside it, which then becomes `path`."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        make_folder(path.parent)
        fill(temporary)
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    except (Exception, KeyboardInterrupt) as error:
        said = unwritten(path, error, needed_bytes)  # with the room there was
        with suppress(OSError):
            temporary.unlink()
        if _is_of_writing(error, path.parent):
            raise said from error
        raise


def _is_of_writing(error: BaseException, below: Path) -> bool:
    """Whether an error is the disk's own, and not of a file that was only read. Rust has errors of its own."""
    if isinstance(error, OSError):
        return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(below)
    return "(os error " in str(error)


def unwritten(path: Path, error: BaseException, needed_bytes: int) -> MissingResource:
    """The sentence for a write that failed."""
    said = str(error)
    full = isinstance(error, OSError) and error.errno in _NO_ROOM
    if not full and not any(f"(os error {number})" in said for number in _NO_ROOM):
        return MissingResource(f"{path} could not be written: {said}")
    needs = f"needs {needed_bytes:,} bytes and" if needed_bytes else "needs more:"
    return MissingResource(
        f"the disk is full: {path} {needs} {free_bytes(path.parent):,} are free; what was saved before is intact"
    )


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that may not be there yet."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def replace(path: Path, text: str) -> None:
    """Put a text in the place of a file, at once and for good. Raises MissingResource where that fails."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        said = unwritten(path, error, len(text.encode()))
        with suppress(OSError):
            temporary.unlink()
        raise said from error


def make_folder(folder: Path) -> None:
    """A folder, and those above it, that a power cut does not take back."""
    if folder.is_dir():
        return
    if folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def remove(folder: Path) -> None:
    """Delete a folder so that no half of it ever bears its name."""
    doomed = folder.with_name(f".tmp-removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    sync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a directory, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as a manifest has them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": {name: describe(folder / name) for name in names}}
    manifest["sha256"] = self_hash(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises InvalidFile where the manifest is missing, damaged, or from a later version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        recorded, version = manifest["sha256"], manifest["format_version"]
        if not isinstance(version, int) or not all(isinstance(each, dict) for each in manifest["files"].values()):
            raise ValueError("it is no manifest")
    except FileNotFoundError:
        raise InvalidFile(f"{folder} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise InvalidFile(f"{path} is damaged: {error}") from None
    if recorded != self_hash(manifest):
        raise InvalidFile(f"{path} is damaged: its own hash does not match")
    if version > FORMAT_VERSION:
        raise LaterFormat(f"{path} has format {version}; this version reads up to {FORMAT_VERSION}")
    return manifest


def check(folder: Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """The manifest of a sound folder. Raises InvalidFile naming the first file that is not as it says.

    `only` limits the check to the files about to be read. Two are hashed at a time.
    """
    manifest = read_manifest(folder)
    files = {name: each for name, each in manifest["files"].items() if only is None or name in only}
    with ThreadPoolExecutor(2) as pool:
        for damage in pool.map(lambda name: _damage(folder / name, files[name]), files):
            if damage is not None:
                pool.shutdown(cancel_futures=True)
                raise InvalidFile(damage)
    return manifest


def _damage(path: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file, if anything is."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected.get("bytes"):
            return f"{path} is damaged: its size is not what {MANIFEST} says"
        if describe(path) != expected:
            return f"{path} is damaged: its content is not what {MANIFEST} says"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def self_hash(manifest: dict[str, Any]) -> str:
    """sha256 of all that a manifest says, but for this."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
