"""Find runs in the folders that the user names, and give each run the shortest name that is unique among them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from smolforge.comparison.history import RunHistory, read_history
from smolforge.errors import ConfigError, InvalidFileError, did_you_mean
from smolforge.training.run_folder import LOCK, LOG, RECIPE

MAX_DEPTH = 2
"""Levels below a folder at which runs are looked for."""


class Selection(NamedTuple):
    """Runs in the order they were named in; by name, those that cannot be read, and the sentence that says why."""

    runs: list[RunHistory]
    broken: dict[str, str]


def select(folders: Sequence[Path]) -> Selection:
    """Read all runs in some folders, each a run or a folder of runs.

    Raises ConfigError for what is no run, and what `read_history` raises for a broken run that was named itself.
    """
    paths = list({run.resolve(): run for folder in folders for run in _expand(folder)}.values())
    names, requested = shortest_names(paths), set(folders)
    runs, broken = [], {}
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(read_history(path, name))
        except (InvalidFileError, ConfigError) as error:
            if path in requested:
                raise
            broken[name] = str(error)
    return Selection(runs, broken)


def holds_runs(folder: Path) -> bool:
    """Whether it is no run itself, but has some in it."""
    return folder.is_dir() and not _is_run(folder) and next(_runs_below(folder), None) is not None


def _is_run(folder: Path) -> bool:
    """Whether a run was begun in it; a lock alone may be anybody's."""
    return (folder / RECIPE).is_file() or ((folder / LOCK).is_file() and (folder / LOG).is_file())


def _expand(folder: Path) -> list[Path]:
    if _is_run(folder):
        return [folder]
    if runs := list(_runs_below(folder)):
        return runs
    raise ConfigError(_not_a_run_message(folder))


def _runs_below(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    for child in _folders(folder) if depth else []:
        if _is_run(child):
            yield child
        else:
            yield from _runs_below(child, depth - 1)


def _folders(folder: Path) -> list[Path]:
    """Sorted as people count: step-2 before step-10. What may not be looked into has none."""
    with suppress(OSError):
        return sorted(
            (child for child in folder.iterdir() if child.is_dir() and child.name[0] != "."), key=_natural_sort_key
        )
    return []


def _natural_sort_key(path: Path) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", path.name, re.ASCII)
    return [(int(part), "") if part[0].isdigit() and part.isascii() else (-1, part) for part in parts]


def _not_a_run_message(folder: Path) -> str:
    """Why there is no run under a name, and what may be meant."""
    inside = next((parent for parent in folder.absolute().parents if _is_run(parent)), None)
    if inside is not None and folder.exists():
        return f"{folder} is a part of the run {inside}; give that"
    if folder.is_dir():
        return f"{folder} holds no run; smolforge train RECIPE --run {folder / 'NAME'} makes one"
    if folder.exists():
        return f"{folder} is a file; a run is a folder that smolforge train made"
    suggestion = did_you_mean(str(folder), [str(run) for run in _runs_below(folder.parent, 1)])
    return f"there is no run {folder}.{suggestion or ' A run is a folder that smolforge train made.'}"


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as no other path ends in."""
    all_parts = [path.resolve().parts for path in paths]

    def name(parts: tuple[str, ...]) -> str:
        for count in range(1, len(parts)):
            if sum(other[-count:] == parts[-count:] for other in all_parts) == 1:
                return "/".join(parts[-count:])
        return str(Path(*parts))

    return [name(parts) for parts in all_parts]
