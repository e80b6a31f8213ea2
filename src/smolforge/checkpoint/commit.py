"""A folder appears whole or not at all, and says of every file what it must be.

    .tmp-step-00000500/  files, each fsynced  ->  manifest.json (bytes, sha256), fsynced
    -> rename to step-00000500  ->  fsync of the parent

A folder is sound when its manifest is there and every file has the size and hash it names. The
manifest carries a hash of itself, so that a flipped bit in it is noticed as well.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFile, LaterFormat, MissingResource, SettingError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def write_whole(folder: Path, fill: Callable[[Path], None], facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Let `fill` write into a temporary folder, then make it `folder`. Returns the manifest, which has `facts`.

    Without facts there is no manifest: the folder is for others. Raises MissingResource when the disk is
    full, and what `fill` raises of ours; what was there before is untouched in any case.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        manifest = _write_manifest(temporary, facts) if facts is not None else {}
        for path in [temporary / name for name in _files(temporary)]:
            _sync(path)
        for directory in {path.parent for path in temporary.rglob("*")}:
            _sync(directory)
        temporary.rename(folder)
        _sync(folder.parent)
    except (SettingError, InvalidFile, MissingResource, AssertionError, KeyboardInterrupt):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own for a failed write
        needed = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        shutil.rmtree(temporary, ignore_errors=True)
        if not _no_room(error):
            raise MissingResource(f"{folder} could not be written: {error}") from error
        free = shutil.disk_usage(folder.parent).free
        raise MissingResource(
            f"the disk is full: {folder} could not be written after {needed:,} bytes, {free:,} are free; "
            "what was saved before is intact"
        ) from error
    return manifest


def _write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    files = {name: describe(folder / name) for name in _files(folder)}
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    manifest["sha256"] = _self_hash(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _no_room(error: Exception) -> bool:
    """Whether a write failed for want of space; Rust libraries say so in their message alone."""
    said = str(error)
    return any(f"Errno {number}]" in said or f"os error {number})" in said for number in _NO_ROOM)


def describe(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as a manifest has them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises InvalidFile where the manifest is missing, damaged, or from a later version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        recorded, version = manifest["sha256"], manifest["format_version"]
        if not isinstance(version, int) or not isinstance(manifest["files"], dict):
            raise ValueError("it is no manifest")
    except FileNotFoundError:
        raise InvalidFile(f"{folder} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InvalidFile(f"{path} is damaged: {error!r}") from None
    if version > FORMAT_VERSION:
        raise LaterFormat(f"{path} has format {version}; this version reads up to {FORMAT_VERSION}")
    if recorded != _self_hash(manifest):
        raise InvalidFile(f"{path} is damaged: its own hash does not match")
    return manifest


def check(folder: Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """The manifest of a sound folder. Raises InvalidFile naming the first file that is not as it says.

    `only` limits the check to the files about to be read.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if only is not None and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise InvalidFile(f"{path} is missing")
        found = describe(path)
        if found != expected:
            what = "size" if found["bytes"] != expected["bytes"] else "content"
            raise InvalidFile(f"{path} is damaged: its {what} is not what {MANIFEST} says")
    return manifest


def remove(folder: Path) -> None:
    """Delete a folder so that no half of it ever bears its name."""
    doomed = folder.with_name(f".tmp-removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _self_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Make a file or directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
