"""Rows to texts: a column, several put together, or what an address made of columns names."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from smolforge.config import Data
from smolforge.config.data import CONDITION
from smolforge.data.sources.types import SourceRow
from smolforge.errors import ConfigError, InvalidFileError, did_you_mean

_FIELD = re.compile(r"\{([\w.-]+)\}")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
RowFilter = Callable[[SourceRow], bool]


def column(row: SourceRow, key: str, setting: str) -> Any:
    """A value by its key, or, by keys with dots between them, one inside. Raises InvalidFileError where it is not."""
    value = row.record
    for part in [key] if isinstance(value, Mapping) and key in value else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise missing_key_error(row, key, setting)
        value = value[part]
    return value


def missing_key_error(row: SourceRow, key: str, setting: str) -> InvalidFileError:
    """Return the error for a column that a row does not have."""
    columns = list(row.record) if isinstance(row.record, Mapping) else []
    available = f"; it has {', '.join(map(str, columns[:12]))}." if columns else ""
    return InvalidFileError(
        f"{row.location} has no key {key!r} (data.{setting}){available}{did_you_mean(key, map(str, columns))}"
    )


def fill_template(template: str, row: SourceRow, setting: str) -> str:
    """Fill a template's {column} fields with the row's values."""
    return _FIELD.sub(lambda match: as_text(column(row, match[1], setting), row, match[1], setting=setting), template)


def as_text(value: Any, row: SourceRow, key: str, *, setting: str) -> str:
    """Return a value as text; None is an empty one."""
    if isinstance(value, Mapping | list):
        raise InvalidFileError(f"{row.location} has no text or number under the key {key!r} (data.{setting})")
    return "" if value is None else str(value)


def row_filters(data: Data) -> list[RowFilter]:
    """Return the conditions of data.filters. A value that is null meets none."""
    return [row_filter(condition) for condition in data.filters]


def row_filter(condition: str) -> RowFilter:
    """Parse a condition. The filter raises InvalidFileError for a missing column, ConfigError for unlike types."""
    match = re.fullmatch(CONDITION, condition)
    assert match is not None, "the setting was validated"
    key, sign, text = match.groups()
    compare, number = _COMPARISONS[sign], as_number(text)

    def meets(row: SourceRow) -> bool:
        value = column(row, key, "filters")
        if value is None:
            return False
        if isinstance(value, bool):
            return compare(str(value).lower(), text.lower())
        if isinstance(value, str):
            return compare(value, text.strip("\"'"))
        if not isinstance(value, int | float) or number is None:
            raise ConfigError(f"data.filters: {condition!r} compares {value!r} ({row.location}) with what is no number")
        return compare(value, number)

    return meets


def as_number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def needed_columns(names: Iterable[str], data: Data) -> list[str] | None:
    """Return the table's columns to read, or None for all, also where a needed one is missing."""
    keys = {data.group_key, data.encoding_key} - {None}
    keys |= {match[1] for text in (data.text_template, data.text_url) for match in _FIELD.finditer(text or "")}
    keys |= {match[1] for condition in data.filters if (match := re.fullmatch(CONDITION, condition))}
    if data.text_template is None and data.text_url is None and data.format == "text":
        keys.add(data.text_key)
    available = set(names)
    top = {key if key in available else key.split(".")[0] for key in keys if key is not None}
    if data.format != "text":
        return None
    return sorted(top) if top <= available else None
