"""Rows to texts: a column, several put together, or what an address made of columns names."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from smolforge.config import Data
from smolforge.config.data import CONDITION
from smolforge.data.sources.types import Row
from smolforge.errors import InvalidFile, SettingError, did_you_mean

_FIELD = re.compile(r"\{([\w.-]+)\}")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
Test = Callable[[Row], bool]
CHAT = ("messages", "prompt", "completion", "chosen", "rejected")
"""Columns that conversations and pairs consist of."""


def column(row: Row, key: str, setting: str) -> Any:
    """A value by its key, or, by keys with dots between them, one inside. Raises InvalidFile where it is not."""
    value = row.record
    for part in [key] if isinstance(value, Mapping) and key in value else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise missing(row, key, setting)
        value = value[part]
    return value


def missing(row: Row, key: str, setting: str) -> InvalidFile:
    """The sentence for a column that is not there."""
    there = list(row.record) if isinstance(row.record, Mapping) else []
    known = f"; it has {', '.join(map(str, there[:12]))}." if there else ""
    return InvalidFile(f"{row.place} has no key {key!r} (data.{setting}){known}{did_you_mean(key, map(str, there))}")


def filled(template: str, row: Row, setting: str) -> str:
    """A template with the row's values in place of the columns' names."""
    return _FIELD.sub(lambda found: said(column(row, found[1], setting), row, found[1], setting), template)


def said(value: Any, row: Row, key: str, setting: str) -> str:
    """A value as text; none is nothing."""
    if isinstance(value, Mapping | list):
        raise InvalidFile(f"{row.place} has no text or number under the key {key!r} (data.{setting})")
    return "" if value is None else str(value)


def tests(data: Data) -> list[Test]:
    """The conditions a row must meet. A value that is null meets none."""
    return [test_of(condition) for condition in data.filters]


def test_of(condition: str) -> Test:
    """Its use raises InvalidFile where a row has no such column, SettingError where the two do not compare."""
    found = re.fullmatch(CONDITION, condition)
    assert found is not None, "the setting was validated"
    key, sign, text = found.groups()
    compare, number = _COMPARISONS[sign], as_number(text)

    def meets(row: Row) -> bool:
        value = column(row, key, "filters")
        if value is None:
            return False
        if isinstance(value, bool):
            return compare(str(value).lower(), text.lower())
        if isinstance(value, str):
            return compare(value, text.strip("\"'"))
        if not isinstance(value, int | float) or number is None:
            raise SettingError(f"data.filters: {condition!r} compares {value!r} ({row.place}) with what is no number")
        return compare(value, number)

    return meets


def as_number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def needed(names: Iterable[str], data: Data) -> list[str] | None:
    """Those of a table's columns that are read; all, where one that is needed is not among them."""
    asked = {data.group_key, data.encoding_key} - {None}
    asked |= {found[1] for text in (data.text_template, data.text_url) for found in _FIELD.finditer(text or "")}
    asked |= {found[1] for condition in data.filters if (found := re.fullmatch(CONDITION, condition))}
    if data.text_template is None and data.text_url is None and data.format == "text":
        asked.add(data.text_key)
    there = set(names)
    top = {key if key in there else key.split(".")[0] for key in asked if key is not None}
    if data.format != "text":
        return None
    return sorted(top) if top <= there else None
