"""A recipe's file -> a tree of plain values: TOML, YAML and JSON read as the same, and nothing else is read.

Whatever is in the file, this ends soon, with the tree or with one sentence that names the file and the place.
"""

import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from smolforge.errors import SettingError
from smolforge.settings import LONGEST_SHOWN, shown

LARGEST = 128 << 10
"""Bytes of a file: hundreds of times any recipe, and read in a second however it is made."""
DEEPEST = 16
MOST_DOTS = 1000
"""In one line of TOML, whose reader takes the square of that many steps."""


def read(path: Path) -> dict[str, Any]:
    """The tree of a file. Raises SettingError for one that cannot be read, or is made to be hard to read."""
    parse = PARSERS.get(path.suffix)
    if parse is None:
        raise SettingError(f"{path} is not a recipe: its name should end in .toml, .yaml or .json")
    text = ""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        text = content.decode("utf-8-sig")
        tree = parse(text)
        _check_depth(tree)
    except (ValueError, ArithmeticError, RecursionError, yaml.YAMLError, OSError) as error:
        raise SettingError(f"{path} cannot be read: {_reason(error, text)}") from None
    if not isinstance(tree, dict):
        raise SettingError(f"{path} is not a table of settings")
    return tree


def _toml(text: str) -> Any:
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MOST_DOTS:
            raise ValueError(f"there are more than {MOST_DOTS:,} dots (at line {number})")
    return tomllib.loads(text)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _yaml(text: str) -> Any:
    return yaml.load(text, _PlainLoader)


PARSERS = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}


class _PlainLoader(yaml.SafeLoader):
    """YAML that says no more than JSON can: an alias may stand for a billion values, a tag for anything."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor or event.tag:
            raise yaml.MarkedYAMLError(
                problem="a recipe has no anchors, aliases or tags", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for name, _ in node.value:
            if name.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a setting's name is text", problem_mark=name.start_mark)
        _once((name.value, None) for name, _ in node.value)
        return super().construct_mapping(node, deep)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Pairs as a dictionary. Raises ValueError for a key that is there twice, or is no text."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is set twice")
        found[key.encode().decode()] = value
    return found


def _check_depth(tree: Any) -> None:
    level = [tree]
    for _ in range(DEEPEST):
        within = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in within for value in values]
    if level:
        raise RecursionError


def _reason(error: Exception, text: str) -> str:
    """Why a file cannot be read, with the line at fault where one is known."""
    match error:
        case UnicodeDecodeError():
            said = f"byte {error.start} is not UTF-8 text"
        case UnicodeEncodeError():
            said = f"{shown(error.object)} is not UTF-8 text"
        case RecursionError():
            said = "it is nested too deeply for a recipe"
        case OSError():
            said = error.strerror or str(error)
        case json.JSONDecodeError():
            what = error.msg.removesuffix(" at").removesuffix(" starting")
            said = f"{what} (at line {error.lineno}, column {error.colno})"
        case yaml.MarkedYAMLError() if error.problem and error.problem_mark:
            said = f"{error.problem} (at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
        case ValueError() if "digits" in str(error):
            said = "a number in it has thousands of digits"
        case _:
            said = " ".join(str(error).split())
    return f"{said}{_quoted(said, text)}"


def _quoted(said: str, text: str) -> str:
    """The line that a sentence speaks of, from a little before the column where it is long."""
    place = re.search(r"at line (\d+)(?:, column (\d+))?", said)
    lines = re.split(r"\r?\n", text)
    if place is None or int(place[1]) > len(lines):
        return ""
    line = lines[int(place[1]) - 1]
    start = max(0, int(place[2] or 1) - LONGEST_SHOWN // 2) if len(line) > LONGEST_SHOWN else 0
    return f": {shown(line[start:].strip())}" if line.strip() else ""
