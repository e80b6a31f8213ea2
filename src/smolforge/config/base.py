"""What settings are made of: frozen typed groups, addressed by dotted names, refused in one sentence."""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from smolforge.errors import SettingError, did_you_mean

FREE = "may change on resume"
NONE = "none"
"""How recipes and flags say off."""
LONGEST_SHOWN = 60
KINDS = {
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "text",
    "null": "none",
}
BOUNDS = {
    "exclusiveMinimum": "above {}",
    "minimum": "of at least {}",
    "exclusiveMaximum": "below {}",
    "maximum": "at most {}",
    "minLength": "that is not empty",
}

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """What all groups of settings share: immutable, an unknown key is an error, and a value is what it looks like."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _as_it_looks(cls, value: Any, validate: Callable[[Any], Any], info: Any) -> Any:
        """Refuse what pydantic would take, but nobody means or no file holds: true for 1, 2**99, half a character."""
        annotation = cls.model_fields[info.field_name].annotation
        looked_at = value.values() if isinstance(value, dict) and inside(annotation) is None else [value]
        if bool not in (annotation, *get_args(annotation)) and any(isinstance(each, bool) for each in looked_at):
            raise ValueError(f"it should be {rule(cls, info.field_name)}")
        value = validate(value)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int) and each >= 2**63:
                raise ValueError("it should be a whole number below 2**63")
            if isinstance(each, str) and each.encode(errors="ignore").decode() != each:
                raise ValueError("it should be text that can be written as UTF-8")
        return value


def fields(group: type[Settings], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic field) of every single setting below a group."""
    for name, field in group.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def leaves(settings: Settings) -> dict[str, Any]:
    """Dotted name to value, for every single setting of a tree; groups inside tables and lists as plain values."""
    values = {}
    for dotted, _ in fields(type(settings)):
        value: Any = settings
        for part in dotted.split("."):
            value = value.__dict__[part]
        values[dotted] = _plain_values(value)
    return values


def _plain_values(value: Any) -> Any:
    match value:
        case Settings():
            return value.model_dump()
        case dict():
            return {key: _plain_values(each) for key, each in value.items()}
        case tuple():
            return tuple(_plain_values(each) for each in value)
    return value


def inside(annotation: Any) -> type[Settings] | None:
    """The group of which a setting holds several, in a table or a list; None for any other setting."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    found = (inside(each) for each in get_args(annotation))
    return next((each for each in found if each is not None), None)


def entered(group: type[Settings], parts: Sequence[str]) -> tuple[int, type[Settings]]:
    """How many parts of a dotted name lead to one of the groups that a setting holds, and that group; 0 to none."""
    for name, field in fields(group):
        way, inner = name.split("."), inside(field.annotation)
        if inner is not None and list(parts[: len(way)]) == way and len(parts) > len(way):
            return len(way) + 1, inner
    return 0, group


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


def validated(group: type[S], tree: Mapping[str, Any], where: str = "", together: str | None = None) -> S:
    """A tree of plain values as settings.

    Raises SettingError with one sentence that names the key, the value and the rule. It begins with `where`, or,
    where settings that are right by themselves contradict each other, with `together`.
    """
    try:
        return group.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise SettingError(_sentence(group, first, where, together))


def _sentence(group: type[Settings], error: Mapping[str, Any], where: str, together: str | None) -> str:
    """What pydantic found, said in our words."""
    kind, value = error["type"], shown(error["input"])
    parts, in_list = [str(part) for part in error["loc"]], False
    way, inner = entered(group, parts)
    if way:  # a list's places are counted from 1
        before = [str(part + 1) if isinstance(part, int) else part for part in error["loc"][:way]]
        where, together, group, parts = f"{where}{'.'.join(before)}: ", None, inner, parts[way:]
    names = [name for name, _ in fields(group)]
    known = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    if kind == "extra_forbidden":
        dotted = ".".join(parts)
        return f"{where}there is no setting {shown(dotted)}.{did_you_mean(dotted, known)}"
    while parts and ".".join(parts) not in known:
        in_list = parts.pop().isdigit()  # the place in a list; pydantic also adds the branch of a union
    dotted = ".".join(parts)
    told = str(error["ctx"]["error"]) if kind == "value_error" else None
    if told is not None and dotted not in names:
        return f"{where if together is None else together}{dotted}{dotted and ': '}{told}"
    if not dotted:
        return (
            f"{where}it is {value} and should be a table of settings" if way else f"{where}there is no setting {value}."
        )
    said = f"has {value} in it" if in_list and kind != "missing" else f"is {value}"
    said = "is not given" if kind == "missing" and not in_list else said
    return f"{where}{dotted} {said}; {told or f'it should be {rule(group, dotted)}'}"


def rule(group: type[Settings], dotted: str) -> str:
    """What a setting may be, in words: `a whole number above 0, or none`."""
    *path, last = dotted.split(".")
    inner: Any = group
    for part in path:
        inner = inner.model_fields[part].annotation
    return in_words(inner.model_json_schema()["properties"][last])


def in_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema of one value as a person says it."""
    match schema:
        case {"anyOf": parts}:
            return ", or ".join(in_words(part) for part in parts)
        case {"enum": [*words, last]}:
            return f"{', '.join(words)} or {last}" if words else str(last)
        case {"const": word}:
            return str(word)
        case {"type": "string", "title": str(said), "pattern": _}:
            return said
        case {"type": "array", "prefixItems": [each, *_] as places}:
            return f"a list of {len(places)}, each {in_words(each)}"
        case {"type": "array", "items": each}:
            return "a list of tables" if "$ref" in each else f"a list of {in_words(each)}"
        case {"type": "object", "additionalProperties": each}:
            return "a table of tables by name" if "$ref" in each else f"a table of names, each with {in_words(each)}"
        case {"type": kind} if kind in KINDS:
            bounds = [words.format(_plain(schema[bound])) for bound, words in BOUNDS.items() if bound in schema]
            return " ".join([KINDS[kind], " and ".join(bounds)]).rstrip()
    return "a table of settings"


def _plain(bound: int | float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def shown(value: Any) -> str:
    """A value as a sentence shows it: as a recipe writes it, and not all of a long one."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    try:
        text = value.isoformat() if isinstance(value, datetime.date | datetime.time) else repr(value)
    except (ValueError, RecursionError):  # Python writes no more than 4,300 digits, or 1,000 lists in each other
        text = "a value too long to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
