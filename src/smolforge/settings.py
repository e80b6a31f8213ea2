"""What settings are made of: frozen typed groups, addressed by dotted names, refused in one sentence."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from smolforge.errors import SettingError, did_you_mean

FREE = "may change on resume"

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """What all groups of settings share: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def fields(group: type[Settings], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic field) of every single setting below a group."""
    for name, field in group.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def leaves(settings: Settings) -> dict[str, Any]:
    """Dotted name to value, for every single setting of a tree."""
    values = {}
    for dotted, _ in fields(type(settings)):
        value: Any = settings
        for part in dotted.split("."):
            value = value.__dict__[part]
        values[dotted] = value
    return values


def replaced(settings: S, changes: dict[str, Any]) -> S:
    """A copy with some settings changed, given by dotted name, and validated again."""
    tree = settings.model_dump()
    for dotted, value in changes.items():
        place(tree, dotted, value)
    return validated(type(settings), tree)


def place(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Put a value into nested dictionaries under its dotted name."""
    *path, last = dotted.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SettingError(f"{dotted} cannot be set: {part} is a single value here, not a table")
    tree[last] = value


def validated(group: type[S], tree: Mapping[str, Any], where: str = "") -> S:
    """A tree of plain values as settings.

    Raises SettingError with one sentence that names the key, the value, the rule and, if given, the file.
    """
    try:
        return group.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    known = {name for name, _ in fields(group)} | set(group.model_fields)
    parts = [str(part) for part in first["loc"]]
    while len(parts) > 1 and first["type"] != "extra_forbidden" and ".".join(parts) not in known:
        parts.pop()  # pydantic adds the place in a list, or the branch of a union
    dotted = ".".join(parts)
    if first["type"] == "extra_forbidden":
        raise SettingError(f"{where}there is no setting {dotted!r}.{did_you_mean(dotted, known)}")
    rule = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        raise SettingError(f"{where}{dotted + ': ' if dotted else ''}{rule}")
    if first["type"] == "missing":
        raise SettingError(f"{where}{dotted} has too few values")
    raise SettingError(f"{where}{dotted} is {first['input']!r}; it should be {rule}")
