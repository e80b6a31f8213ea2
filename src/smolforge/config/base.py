"""The base of all settings: frozen typed groups, addressed by dotted names, with errors of one sentence."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from smolforge.errors import ConfigError, did_you_mean
from smolforge.formatting import format_value

FREE = "may change on resume"
NONE = "none"
"""The spelling of off in recipes and flags."""
TYPE_NAMES = {
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "text",
    "null": "none",
}
BOUND_TEMPLATES = {
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
        items = value.values() if isinstance(value, dict) and nested_group(annotation) is None else [value]
        if bool not in (annotation, *get_args(annotation)) and any(isinstance(item, bool) for item in items):
            raise ValueError(f"it should be {allowed_values(cls, info.field_name)}")
        value = validate(value)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and item >= 2**63:
                raise ValueError("it should be a whole number below 2**63")
            if isinstance(item, str) and item.encode(errors="ignore").decode() != item:
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
            return {key: _plain_values(item) for key, item in value.items()}
        case tuple():
            return tuple(_plain_values(item) for item in value)
    return value


def nested_group(annotation: Any) -> type[Settings] | None:
    """Return the group of which a setting holds several, in a table or a list; None for any other setting."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    groups = (nested_group(argument) for argument in get_args(annotation))
    return next((group for group in groups if group is not None), None)


def find_nested_group(group: type[Settings], parts: Sequence[str]) -> tuple[int, type[Settings]]:
    """Return how many parts of a dotted name lead to a group that a setting holds, and that group; 0 if to none."""
    for name, field in fields(group):
        path, inner = name.split("."), nested_group(field.annotation)
        if inner is not None and list(parts[: len(path)]) == path and len(parts) > len(path):
            return len(path) + 1, inner
    return 0, group


def replace_settings(settings: S, changes: dict[str, Any]) -> S:
    """Return a copy with some settings changed, given by dotted name, and validate it."""
    tree = settings.model_dump()
    for dotted, value in changes.items():
        set_dotted(tree, dotted, value)
    return validate_settings(type(settings), tree)


def set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a value in nested dictionaries by its dotted name."""
    *path, last = dotted.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted} cannot be set: {part} is a single value here, not a table")
    tree[last] = value


def validate_settings(
    group: type[S], tree: Mapping[str, Any], prefix: str = "", *, conflict_prefix: str | None = None
) -> S:
    """Return a tree of plain values as settings.

    Raises ConfigError with one sentence that names the key, the value and the rule. It starts with `prefix`, or,
    if settings that are right by themselves contradict each other, with `conflict_prefix`.
    """
    try:
        return group.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise ConfigError(_error_message(group, first, prefix, conflict_prefix=conflict_prefix))


def _error_message(group: type[Settings], error: Mapping[str, Any], prefix: str, *, conflict_prefix: str | None) -> str:
    """Return the sentence for an error of pydantic."""
    kind, value = error["type"], format_value(error["input"])
    parts, in_list = [str(part) for part in error["loc"]], False
    consumed, inner = find_nested_group(group, parts)
    if consumed:  # positions in a list are counted from 1
        container = [str(part + 1) if isinstance(part, int) else part for part in error["loc"][:consumed]]
        prefix, conflict_prefix, group, parts = f"{prefix}{'.'.join(container)}: ", None, inner, parts[consumed:]
    names = [name for name, _ in fields(group)]
    known_names = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    if kind == "extra_forbidden":
        dotted = ".".join(parts)
        return f"{prefix}there is no setting {format_value(dotted)}.{did_you_mean(dotted, known_names)}"
    while parts and ".".join(parts) not in known_names:
        in_list = parts.pop().isdigit()  # the position in a list; pydantic also adds the branch of a union
    dotted = ".".join(parts)
    reason = str(error["ctx"]["error"]) if kind == "value_error" else None
    if reason is not None and dotted not in names:
        return f"{prefix if conflict_prefix is None else conflict_prefix}{dotted}{dotted and ': '}{reason}"
    if not dotted:
        return (
            f"{prefix}it is {value} and should be a table of settings"
            if consumed
            else f"{prefix}there is no setting {value}."
        )
    problem = f"has {value} in it" if in_list and kind != "missing" else f"is {value}"
    problem = "is not given" if kind == "missing" and not in_list else problem
    return f"{prefix}{dotted} {problem}; {reason or f'it should be {allowed_values(group, dotted)}'}"


def allowed_values(group: type[Settings], dotted: str) -> str:
    """Return what a setting may be, in words: `a whole number above 0, or none`."""
    *path, last = dotted.split(".")
    inner: Any = group
    for part in path:
        inner = inner.model_fields[part].annotation
    return describe_schema(inner.model_json_schema()["properties"][last])


def describe_schema(schema: Mapping[str, Any]) -> str:
    """Return the JSON schema of one value in words."""
    match schema:
        case {"anyOf": parts}:
            return ", or ".join(describe_schema(part) for part in parts)
        case {"enum": [*values, last]}:
            return f"{', '.join(values)} or {last}" if values else str(last)
        case {"const": value}:
            return str(value)
        case {"type": "string", "title": str(title), "pattern": _}:
            return title
        case {"type": "array", "prefixItems": [item, *_] as items}:
            return f"a list of {len(items)}, each {describe_schema(item)}"
        case {"type": "array", "items": item}:
            return "a list of tables" if "$ref" in item else f"a list of {describe_schema(item)}"
        case {"type": "object", "additionalProperties": item}:
            return (
                "a table of tables by name"
                if "$ref" in item
                else f"a table of names, each with {describe_schema(item)}"
            )
        case {"type": kind} if kind in TYPE_NAMES:
            bounds = [
                template.format(_format_bound(schema[bound]))
                for bound, template in BOUND_TEMPLATES.items()
                if bound in schema
            ]
            return " ".join([TYPE_NAMES[kind], " and ".join(bounds)]).rstrip()
    return "a table of settings"


def _format_bound(bound: int | float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
