"""Custom classes in place of the built-in ones, which a recipe names as module:Class.

    a recipe that the user wrote, a flag -> import_classes -> instantiate
    a file of a checkpoint or of a run ---------------------> instantiate   refused, unless imported before

A module is code, and code never runs because some file names it (the idea of Transformers' trust_remote_code).
"""

import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from smolforge.errors import ConfigError, InvalidFileError, did_you_mean

T = TypeVar("T")
_classes: dict[str, type] = {}


def import_classes(names: Iterable[str], folders: Sequence[Path] = ()) -> None:
    """Import the classes of these names, from sys.path, from `folders`, or from the current folder.

    Only for names that the user gave. Raises ConfigError for what cannot be imported or is not a class.
    """
    for name in names:
        if name not in _classes:
            _classes[name] = _import_class(name, folders)


def _import_class(name: str, folders: Sequence[Path]) -> type:
    module, _, class_name = name.partition(":")
    with _extra_sys_path([*folders, Path.cwd()]):
        try:
            members = vars(import_module(module))
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise ConfigError(f"{name}: {module} needs a module {error.name}, which is not here") from error
            searched = ", ".join(dict.fromkeys(str(folder.resolve()) for folder in [*folders, Path.cwd()]))
            raise ConfigError(f"{name}: there is no module {module} where Python looks, nor in {searched}") from None
        except Exception as error:
            raise ConfigError(f"{name}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if class_name not in members:
        raise ConfigError(f"{name}: the module {module} has no {class_name}.{did_you_mean(class_name, members)}")
    if not isinstance(members[class_name], type):
        raise ConfigError(f"{name}: {class_name} is no class")
    return members[class_name]


@contextmanager
def _extra_sys_path(folders: Sequence[Path]) -> Iterator[None]:
    """Append folders to sys.path, for this block only: later, a folder with a package's name would hide it."""
    added = [path for path in dict.fromkeys(map(str, folders)) if path not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for path in added:
            sys.path.remove(path)


def get_class(setting: str, name: str) -> type:
    """Return the class that a setting names. Raises InvalidFileError if the user did not allow it."""
    check_imported(setting, name)
    return _classes[name]


def instantiate(setting: str, name: str, kind: type[T], *args: Any, **kwargs: Any) -> T:
    """Return an object of the class that a setting names, made with the arguments of its constructor.

    Raises InvalidFileError if the class was not imported, ConfigError if it is of another kind or its constructor
    fails.
    """
    cls = get_class(setting, name)
    if not issubclass(cls, kind):
        raise ConfigError(f"{setting} is {name}, which is no {kind.__module__}.{kind.__qualname__}")
    try:
        return cls(*args, **kwargs)
    except Exception as error:
        raise ConfigError(f"{setting}: {name} cannot be made: {type(error).__name__}: {error}") from error


def check_imported(setting: str, name: str, prefix: str = "") -> None:
    """Raise InvalidFileError, with a hint, for a class that the user did not allow."""
    if name not in _classes:
        raise InvalidFileError(
            f"{prefix}{setting} is {name}, code that is not run because a file names it; "
            f"if it is yours, --own {name} loads it (in Python, own=[{name!r}])"
        )


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """Return the code's identity by class name: the sha256 of the file that defines the class."""
    files = {name: inspect.getsourcefile(_classes[name]) for name in names}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}


def error_location(error: BaseException) -> str | None:
    """Return the line in which the code of a custom class raised an error: `mylab.py, line 12`. None if it did not."""
    modules, location, frame = {name.partition(":")[0] for name in _classes}, None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__") in modules:
            location = f"{Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno}"
        frame = frame.tb_next
    return location
