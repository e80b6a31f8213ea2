"""A mirror: copies of a run's checkpoints and journals in another folder, often on a disk that comes and goes.

    MIRROR/recipe.toml, metrics.jsonl, ...   as in the run's folder, for all that reads a run
    MIRROR/checkpoints/step-N/               exact copies of checkpoints
    MIRROR/journals/step-N/                  recipe and journals at that step; the manifest names the run

A copy has a temporary name, different in each process, until every file was read back and has its hash. Such a disk
may fail in any call, refuse to sync, and rename by copying, so that a folder is believed only for its hashes.
Errors of the disk are OSError; InvalidFileError is about content.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from smolforge import atomic, operating_system
from smolforge.checkpoint import training_state
from smolforge.checkpoint.training_state import step_from_dir
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, NewerFormatError
from smolforge.operating_system import fsync_path
from smolforge.training import run_folder
from smolforge.training.environment import ENVIRONMENT

log = logging.getLogger("smolforge")
CHECKPOINTS, JOURNALS = "checkpoints", "journals"
MIRROR = "mirror.json"
"""In a run's folder: the run's id, and the path of the mirror it has."""
COPIED = (run_folder.RECIPE, ENVIRONMENT, MIRROR, run_folder.TRACKING, *run_folder.JOURNALS)
"""What a step needs of the run's folder, beside its checkpoint."""
CHUNK_BYTES = 4 << 20


class MirrorFolder:
    """One mirror, as one process reads and writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_moved = 0
        """Read and written so far: it grows as long as the disk answers."""
        self.whole: set[Path] = set()
        """Folders whose files this process has read back."""
        self.temporary = f".tmp-{secrets.token_hex(4)}"

    def attach(self, run_id: str | None, *, known: bool) -> str | None:
        """Return the id of the run that is mirrored here, None in a new mirror, whose folder is created.

        Parents are not created: where a disk is not mounted, they would be on another one. Raises ConfigError for the
        mirror of another run than `run_id`, or another folder; MissingResourceError where a mirror that is `known` to
        exist does not.
        """
        owner = self.owner()
        if owner is None and known and not self.steps(JOURNALS):
            raise MissingResourceError(f"the mirror {self.path} is gone; probably its disk is not mounted")
        if owner is None:
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
            if not {name for name in names if name[0] != "."} <= {CHECKPOINTS, JOURNALS, *COPIED}:
                raise ConfigError(f"{self.path} exists and is not a mirror; give --train.mirror another folder")
            self.path.mkdir(exist_ok=True)
        elif run_id is not None and owner != run_id:
            raise ConfigError(
                f"{self.path} is the mirror of another run; give --train.mirror another folder, "
                "or --run a new one to go on with the run that is mirrored"
            )
        return owner

    def owner(self) -> str | None:
        """Return the id of the run that is mirrored here; None where nothing is yet."""
        journals = self.newest_journals()
        if journals is not None:
            return str(read_manifest(journals)["run"])
        if self.steps(CHECKPOINTS):
            raise InvalidFileError(f"{self.path} has checkpoints, but no journals of them that are whole")
        return None

    def newest_journals(self) -> Path | None:
        """Return the newest folder of journals that is whole."""
        return next((folder for folder in reversed(self.steps(JOURNALS)) if self.is_whole(folder)), None)

    def steps(self, kind: str) -> list[Path]:
        """Return the folders of steps of a kind, oldest first, whole or not."""
        try:
            folders = [path for path in (self.path / kind).iterdir() if re.fullmatch(r"step-\d{8,18}", path.name)]
        except FileNotFoundError:
            return []
        return sorted(folders, key=step_from_dir)

    # Writing

    def put(self, source: Path, kind: str) -> None:
        """Copy a folder with a manifest, unless it is here. The oldest copies give way where the disk is full.

        Raises MissingResourceError where it is still full then.
        """
        manifest, target = atomic.read_manifest(source), self.path / kind / source.name
        if self.is_whole(target, manifest):
            return
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f"{self.temporary}-{target.name}")
        while True:
            try:
                self.copy(source, temporary, manifest=manifest)
                break
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                if error.errno not in operating_system.DISK_FULL_ERRORS:
                    raise
                if not self.make_room(target):
                    needed = sum(entry["bytes"] for entry in manifest["files"].values())
                    raise atomic.write_error(target, error, needed) from error
        self.remove(target)
        operating_system.replace(temporary, target)
        fsync_path(target.parent)
        self.whole.add(target)

    def publish(self, journals: Path) -> None:
        """Replace the mirror's recipe and journals by those of a folder."""
        for name in atomic.read_manifest(journals)["files"]:
            temporary = self.path / f"{self.temporary}-{name}"
            shutil.copyfile(journals / name, temporary)
            fsync_path(temporary)
            operating_system.replace(temporary, self.path / name)
        fsync_path(self.path)

    def make_room(self, target: Path) -> bool:
        """Delete the oldest checkpoint, if another one is whole. Returns whether there was one to delete."""
        others = [folder for folder in self.steps(CHECKPOINTS) if folder != target]
        newest_whole = next((folder for folder in reversed(others) if self.is_whole(folder)), None)
        oldest = next((folder for folder in others if folder != newest_whole), None)
        if newest_whole is None or oldest is None:
            return False
        self.remove_step(oldest)
        return True

    def prune(self, keep_last: int, keep_best: bool, *, incidents: list[dict[str, Any]]) -> None:
        """Delete checkpoints by the rule of a run's folder, and those that these incidents rolled back."""
        for folder in self.steps(CHECKPOINTS):
            with suppress(InvalidFileError):
                if is_rolled_back(folder, incidents):
                    self.remove_step(folder)
        expendable = training_state.expendable_checkpoints
        for folder in expendable(self.path, keep_last, keep_best, is_valid=self.is_whole):
            self.remove_step(folder)
        checkpoints = {folder.name for folder in self.steps(CHECKPOINTS)}
        for folder in self.steps(JOURNALS)[:-1]:
            if folder.name not in checkpoints:
                self.remove(folder)

    def remove_step(self, checkpoint: Path) -> None:
        self.remove(checkpoint)
        self.remove(self.path / JOURNALS / checkpoint.name)

    def remove(self, folder: Path) -> None:
        """Delete a folder so that no half of it has its name."""
        self.whole.discard(folder)
        if os.path.lexists(folder):
            temporary = folder.with_name(f"{self.temporary}-removed-{folder.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            operating_system.replace(folder, temporary)
            shutil.rmtree(temporary, ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Delete what processes that were killed left unfinished, also of a rename that copies."""
        for folder in [*self.steps(CHECKPOINTS), *self.steps(JOURNALS)]:
            if is_interrupted(folder) and not self.is_whole(folder):
                self.remove(folder)
        for folder in (self.path, self.path / CHECKPOINTS, self.path / JOURNALS):
            for path in folder.glob(".tmp-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # Reading

    def restore(self, run: Path, after: int, incidents: list[dict[str, Any]]) -> int | None:
        """Copy the newest whole checkpoint after a step, and its journals, into a run's folder. Returns its step.

        None where there is no such checkpoint, apart from those that were rolled back, by `incidents` of that folder
        or by the mirror's. Raises InvalidFileError where there are only damaged ones, and nothing before them.
        """
        paths = [folder / run_folder.INCIDENTS for folder in self.steps(JOURNALS)]
        mirrored = [run_folder.whole_records(path.read_bytes()) for path in paths if path.is_file()]
        incidents, damaged = max([incidents, *mirrored], key=len), list[Path]()
        for checkpoint in reversed(self.steps(CHECKPOINTS)):
            step = step_from_dir(checkpoint)
            try:
                if step > after and not is_rolled_back(checkpoint, incidents):
                    self._restore(checkpoint, run, after)
                    return step
            except NewerFormatError:
                raise
            except InvalidFileError as error:
                log.warning("%s of the mirror is skipped: %s", checkpoint.name, error)
                damaged += [] if is_interrupted(checkpoint) else [checkpoint]
        if damaged and not after:
            raise InvalidFileError(f"no checkpoint of the mirror {self.path} is sound; delete it to begin again")
        return None

    def _restore(self, checkpoint: Path, run: Path, after: int) -> None:
        """Copy a checkpoint and its journals; the checkpoint gets its name last."""
        journals = self.path / JOURNALS / checkpoint.name
        manifest, journals_manifest = read_manifest(checkpoint), read_manifest(journals)

        def fill(temporary: Path) -> None:
            self.copy(checkpoint, temporary, manifest=manifest)
            staged = run / CHECKPOINTS / f".tmp-{JOURNALS}"
            self.copy(journals, staged, manifest=journals_manifest)
            training_state.quarantine_later(run, after)
            for name in journals_manifest["files"]:
                atomic.write_file_atomic(run / name, partial(shutil.copyfile, staged / name))
            shutil.rmtree(staged)

        atomic.write_dir_atomic(training_state.checkpoint_dir(run, step_from_dir(checkpoint)), fill)

    def copy(self, source: Path, target: Path, *, manifest: dict[str, Any]) -> None:
        """Copy the files of a manifest, each read back. Raises InvalidFileError for one that is not as it says."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(exist_ok=True)
        for name, expected in manifest["files"].items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InvalidFileError(f"{source / atomic.MANIFEST} names {name}, which is outside its folder")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not (source / name).exists():
                raise InvalidFileError(f"{source / name} is missing")
            with (source / name).open("rb") as reader, (target / name).open("wb") as writer:
                for chunk in self._chunks(reader):
                    writer.write(chunk)
            fsync_path(target / name)
            if self._digest(target / name) != expected:
                raise InvalidFileError(f"{source / name}, or its copy, is damaged: it is not what the manifest says")
        shutil.copyfile(source / atomic.MANIFEST, target / atomic.MANIFEST)
        fsync_path(target / atomic.MANIFEST)
        if read_manifest(target) != manifest:
            raise InvalidFileError(f"{target} has another manifest than was written")

    def is_whole(self, folder: Path, manifest: dict[str, Any] | None = None) -> bool:
        """Whether all files of a folder are as its manifest says, and that is as `manifest`, where one is given."""
        try:
            current = read_manifest(folder)
            if folder not in self.whole and any(
                self._digest(folder / name) != expected for name, expected in current["files"].items()
            ):
                return False
        except (InvalidFileError, FileNotFoundError):
            return False
        self.whole.add(folder)
        return manifest is None or current == manifest

    def _digest(self, path: Path) -> dict[str, Any]:
        """Return the size and hash of a file, as a manifest has them."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            for chunk in self._chunks(file):
                digest.update(chunk)
                size += len(chunk)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def _chunks(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield the content of a file; an error names the file, which tells it from an error of writing elsewhere."""
        try:
            while chunk := file.read(CHUNK_BYTES):
                self.bytes_moved += len(chunk)
                yield chunk
        except OSError as error:
            error.filename = error.filename or file.name
            raise


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest as `atomic.read_manifest` does, where an error of the disk is one, and no damage."""
    with suppress(FileNotFoundError):
        (folder / atomic.MANIFEST).read_bytes()
    return atomic.read_manifest(folder)


def is_interrupted(folder: Path) -> bool:
    """Whether a copy to a folder, or its removal, was not finished: its temporary folder is still there."""
    return any(folder.parent.glob(f".tmp-*-{folder.name}"))


def is_rolled_back(checkpoint: Path, incidents: list[dict[str, Any]]) -> bool:
    """Whether the run went back to before a checkpoint after it was saved, as the run's incidents say.

    Raises InvalidFileError where the checkpoint cannot say which it knew.
    """
    if not any(incident["kind"] == "rewind" for incident in incidents):
        return False
    later = incidents[len(training_state.read_metadata(checkpoint).get("incidents", [])) :]
    return any(incident["kind"] == "rewind" and incident["to"] < step_from_dir(checkpoint) for incident in later)
