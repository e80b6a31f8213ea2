"""Errors for the user, each with the exit code that a script sees.

A message is one or two sentences: what is wrong, the value, the rule, the fix.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class ConfigError(ValueError):
    """A flag, a recipe or an argument is wrong."""

    exit_code: ClassVar[int] = 2


class InvalidFileError(ValueError):
    """Data or a model on disk is missing, empty, broken or does not fit."""

    exit_code: ClassVar[int] = 3


class NewerFormatError(InvalidFileError):
    """A file was written by a later version: perhaps valid, but this version cannot check it."""


class MissingResourceError(RuntimeError):
    """The machine lacks something: disk space, memory, a package, a network."""

    exit_code: ClassVar[int] = 4


class LostRankError(MissingResourceError):
    """Another process of the run has ended, or does not answer."""


class TrainingDivergedError(RuntimeError):
    """A run whose numbers went wrong too often."""

    exit_code: ClassVar[int] = 1


class Stopped(Exception):  # noqa: N818 (control flow, as KeyboardInterrupt is)
    """A run was stopped by a signal, with everything saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class FailedOnRankZeroError(Exception):
    """Rank 0 of a run ended, and says why; this process ends with the same exit code and says nothing."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(error: Exception) -> int:
    """What a script sees of an error; 1 for one that is none of ours."""
    match error:
        case (
            ConfigError()
            | InvalidFileError()
            | MissingResourceError()
            | TrainingDivergedError()
            | Stopped()
            | FailedOnRankZeroError()
        ):
            return error.exit_code
    return 1


def install_command(extra: str) -> str:
    """Return the command that installs an extra; every shell understands its double quotes."""
    return f'pip install "smolforge[{extra}]"'


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a closing sentence with the nearest of the choices, or an empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""
