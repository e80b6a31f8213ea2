"""The ways a user can be told that something will not work, each with the exit code a script sees.

A message is one or two sentences: what is wrong, the value, the rule, the way out.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class SettingError(ValueError):
    """A flag, a recipe or an argument is wrong."""

    exit_code: ClassVar[int] = 2


class InvalidFile(ValueError):
    """Data or a model on disk is missing, empty, broken or does not fit."""

    exit_code: ClassVar[int] = 3


class LaterFormat(InvalidFile):
    """Written by a later version: whole, perhaps, but not for this one to judge."""


class MissingResource(RuntimeError):
    """The machine lacks something: disk space, memory, a package, a network."""

    exit_code: ClassVar[int] = 4


class LostRank(MissingResource):
    """Another process of the run has ended, or does not answer."""


class Diverged(RuntimeError):
    """A run whose numbers went wrong too often."""

    exit_code: ClassVar[int] = 1


class Stopped(Exception):
    """A run was stopped by a signal, with everything saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Elsewhere(Exception):
    """Rank 0 of a run ended, and says why; this process ends with the same exit code and says nothing."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(error: Exception) -> int:
    """What a script sees of an error; 1 for one that is none of ours."""
    match error:
        case SettingError() | InvalidFile() | MissingResource() | Diverged() | Stopped() | Elsewhere():
            return error.exit_code
    return 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A closing sentence that names the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
