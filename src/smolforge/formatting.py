"""Values as text: durations, sizes in bytes, settings; nested tables as dotted names."""

import datetime
from collections.abc import Mapping
from typing import Any

MAX_SHOWN_CHARACTERS = 60


def format_duration(seconds: int | float) -> str:
    """Return a time as `33 s`, `12 min`, `1.6 h` or `3 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129600 else f"{seconds / 86400:,.0f} days"


def format_bytes(size: int | float) -> str:
    """Return a size as `1.50 GiB`, `727 MiB` or `12 KiB`."""
    if size >= 2**30:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def format_value(value: Any) -> str:
    """Return a value as error messages show it: as a recipe writes it, a long one cut."""
    if value is None or isinstance(value, bool):
        return format_setting(value)
    try:
        text = value.isoformat() if isinstance(value, datetime.date | datetime.time) else repr(value)
    except (ValueError, RecursionError):  # Python writes no more than 4,300 digits, or 1,000 lists in each other
        text = "a value too long to show"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def format_setting(value: Any) -> str:
    """Return a value of a recipe in words, as tables show it: text without quotes, the items of a list in a row."""
    match value:
        case None | True | False:
            return {None: "none", True: "true", False: "false"}[value]
        case Mapping():
            items = [f"{key} {format_setting(item)}" for key, item in value.items() if item is not None]
            return ", ".join(items) or "nothing"
        case list() | tuple():
            return ", ".join(map(format_setting, value)) or "nothing"
    return str(value) or '""'


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one with dotted names; an empty table has none."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
