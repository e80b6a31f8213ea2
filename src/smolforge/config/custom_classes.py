"""Classes of a person's own in place of ours, which a recipe names as module:Class.

    a recipe that a person wrote, a flag -> admit (imports the module) -> made
    a file of a checkpoint or of a run ---------------------------------> made   refused, unless admitted before

A module is code, and code is never run because a file that was found somewhere names it.
"""

import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from smolforge.errors import InvalidFile, SettingError, did_you_mean

T = TypeVar("T")
_admitted: dict[str, type] = {}


def admit(names: Iterable[str], folders: Sequence[Path] = ()) -> None:
    """Import the classes of these names, from where Python looks, from `folders`, or from where one is.

    Only for names that a person gave. Raises SettingError for what cannot be imported or is no class.
    """
    for name in names:
        if name not in _admitted:
            _admitted[name] = _imported(name, folders)


def _imported(name: str, folders: Sequence[Path]) -> type:
    module, _, wanted = name.partition(":")
    with _also_in([*folders, Path.cwd()]):
        try:
            found = vars(import_module(module))
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise SettingError(f"{name}: {module} needs a module {error.name}, which is not here") from error
            where = ", ".join(dict.fromkeys(str(folder.resolve()) for folder in [*folders, Path.cwd()]))
            raise SettingError(f"{name}: there is no module {module} where Python looks, nor in {where}") from None
        except Exception as error:
            raise SettingError(f"{name}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if wanted not in found:
        raise SettingError(f"{name}: the module {module} has no {wanted}.{did_you_mean(wanted, found)}")
    if not isinstance(found[wanted], type):
        raise SettingError(f"{name}: {wanted} is no class")
    return found[wanted]


@contextmanager
def _also_in(folders: Sequence[Path]) -> Iterator[None]:
    """Python looks in these last. Only in here: later, a folder named as a package is would be taken for it."""
    more = [each for each in dict.fromkeys(map(str, folders)) if each not in sys.path]
    sys.path.extend(more)
    try:
        yield
    finally:
        for each in more:
            sys.path.remove(each)


def admitted(setting: str, name: str) -> type:
    """The class that a setting names. Raises InvalidFile where no person named it."""
    refuse_unless_admitted(setting, name)
    return _admitted[name]


def made(setting: str, name: str, kind: type[T], *given: Any, **named: Any) -> T:
    """An object of the class that a setting names, from what its constructor is given.

    Raises InvalidFile where the class was not admitted, SettingError where it is of another kind or cannot be made.
    """
    chosen = admitted(setting, name)
    if not issubclass(chosen, kind):
        raise SettingError(f"{setting} is {name}, which is no {kind.__module__}.{kind.__qualname__}")
    try:
        return chosen(*given, **named)
    except Exception as error:
        raise SettingError(f"{setting}: {name} cannot be made: {type(error).__name__}: {error}") from error


def refuse_unless_admitted(setting: str, name: str, where: str = "") -> None:
    """Raises InvalidFile, with the way out, for a class that no person named."""
    if name not in _admitted:
        raise InvalidFile(
            f"{where}{setting} is {name}, code that is not run because a file names it; "
            f"if it is yours, --own {name} loads it (in Python, own=[{name!r}])"
        )


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """What identifies the code of admitted classes: the hash of the file that each is from."""
    files = {name: inspect.getsourcefile(_admitted[name]) for name in names}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}


def blamed(error: BaseException) -> str | None:
    """The line in which the code of an admitted class raised an error: `mylab.py, line 12`. None where it did not."""
    modules, place, frame = {each.partition(":")[0] for each in _admitted}, None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__") in modules:
            place = f"{Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno}"
        frame = frame.tb_next
    return place
