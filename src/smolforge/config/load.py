"""Recipe files and overrides to one validated `Recipe`: default < recipe < flag.

"none" stands for off everywhere, and `model` may be the name of a preset, or a table whose `preset` the other
keys change.

A recipe's file -> a tree of plain values: TOML, YAML and JSON read as the same, and nothing else is read.

Whatever is in the file, this ends soon, with the tree or with one sentence that names the file and the place.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
import yaml

from smolforge.config import ModelConfig, Recipe, custom_classes, presets
from smolforge.config.base import LONGEST_SHOWN, NONE, place, shown, validated
from smolforge.errors import SettingError, did_you_mean

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


FOLDERS = {"recipe": "", "study": "studies"}
"""Of shipped files, below recipes/."""


def read_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a file, or of a shipped recipe's name, changed by dotted overrides.

    Raises SettingError with file, key and suggestion for whatever is wrong in it. A file must be right by itself, so
    that what is wrong after that is an override's fault, and a sentence about it needs no file.
    """
    path = find(source)
    tree = _load(path)
    recipe = to_recipe(tree, f"{path}: ")
    if not overrides:
        return recipe
    lay_over(tree, overrides)
    return to_recipe(tree, "", f"{path} with {', '.join(overrides)} changed: ")


def lay_over(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Put dotted overrides into a recipe's tree. Sources take the place of a mixture, and a mixture that of sources."""
    plain, named = "data.sources" in overrides, covers(overrides, "data.mixture")
    gone = () if plain == named else ("mixture", "stages") if plain else ("sources",)
    if isinstance(tree.get("data"), dict):
        tree["data"] = {name: inner for name, inner in tree["data"].items() if name not in gone}
    check_sources(tree, overrides)
    for dotted, value in overrides.items():
        place(tree, dotted, value)


def check_sources(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse overrides of a source that the mixture does not have and that they do not bring: a slip of the pen."""
    data = tree.get("data")
    there = (data.get("mixture") if isinstance(data, dict) else None) or {}
    said = [dotted.split(".")[2:] for dotted in overrides if dotted.startswith("data.mixture.")]
    known = {*there, *(name for name, *setting in said if setting in ([], ["source"]))}
    for name, *setting in said:
        if isinstance(there, dict) and name not in known and "data.mixture" not in overrides:
            raise SettingError(
                f"data.mixture.{'.'.join([name, *setting])}: the mixture has no source {shown(name)}."
                f"{did_you_mean(name, there)} With data.mixture.{name}.source it gets one"
            )


def covers(overrides: Iterable[str], name: str) -> bool:
    """Whether overrides say a setting, or a part of it."""
    return any(given == name or given.startswith(f"{name}.") for given in overrides)


def admitted(recipe: Recipe, source: str | Path) -> Recipe:
    """The same, once the classes it names are imported, from beside the file that names them or where Python looks.

    Only for what a person wrote, and never for a recipe that was found in a run.
    """
    custom_classes.admit(recipe.own_classes, [find(source).parent])
    return recipe


def model_settings(source: str | Path) -> set[str]:
    """Dotted names of the model's settings that a recipe file says itself, rather than by a preset's name."""
    model = _load(find(source)).get("model", {})
    return {f"model.{name}" for name in model if name in ModelConfig.model_fields} if isinstance(model, dict) else set()


def to_recipe(tree: dict[str, Any], where: str = "", together: str | None = None) -> Recipe:
    """Plain nested values as a Recipe, presets filled in and "none" understood; refused as `validated` does."""
    tree = _without_none(tree)
    model = tree.get("model", {})
    if isinstance(model, str):
        model = {"preset": model}
    if isinstance(model, dict):
        model = dict(model)
        name = model.pop("preset", None)
        tree["model"] = {**_shape(name, where), **model}
    return validated(Recipe, tree, where, together)


def _shape(preset: Any, where: str) -> dict[str, Any]:
    """The settings of a preset; of no preset, none."""
    try:
        return {} if preset is None else presets.shape(preset if isinstance(preset, str) else shown(preset))
    except SettingError as error:
        raise SettingError(f"{where}model.preset: {error}") from None


def write_recipe(recipe: Recipe) -> str:
    """TOML that `read_recipe` reads back as the same recipe."""
    text = tomli_w.dumps(_with_none(recipe.model_dump()))
    if len(text.encode()) > LARGEST:
        raise SettingError(
            f"this recipe has more than the {LARGEST:,} bytes that can be read again; "
            "folders and globs make data.sources shorter"
        )
    return text


def find(source: str | Path, kind: Literal["recipe", "study"] = "recipe") -> Path:
    """A recipe file, or a study's, or one of those that come with the package."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = {file.stem: file for folder in _shipped() for file in (folder / FOLDERS[kind]).glob("*.toml")}
    if path.stem in shipped and path.parent.name in ("", "recipes", FOLDERS[kind]):
        return shipped[path.stem]
    if os.path.lexists(path):
        raise SettingError(f"{path} is no file, but a folder, a device or a link to nothing; a {kind} is a file")
    if kind == "recipe" and any((folder / FOLDERS["study"] / f"{path}.toml").is_file() for folder in _shipped()):
        raise SettingError(f"{path} is a study, not a recipe: smolforge compare {path} --out DIR conducts it")
    raise SettingError(
        f"there is no {kind} {shown(str(source))}; a file is expected, or one of {', '.join(sorted(shipped))}."
        + did_you_mean(path.stem, shipped)
    )


def _shipped() -> list[Path]:
    package = Path(__file__).parents[1]
    return [folder for folder in (package / "recipes", package.parents[1] / "recipes") if folder.is_dir()]


def _load(path: Path) -> dict[str, Any]:
    """The tree of a file, where a preset's name alone is a table as well, so that overrides find their place in it."""
    tree = read(path)
    if "study" in tree and "variants" in tree:
        raise SettingError(f"{path} is a study, not a recipe: smolforge compare {path} --out DIR conducts it")
    model = tree.get("model")
    return tree | {"model": {"preset": model}} if isinstance(model, str) else tree


def _without_none(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_none(inner) for key, inner in value.items()}
        case list() | tuple():  # of tables; a word in a list is a word
            return [_without_none(inner) if isinstance(inner, dict) else inner for inner in value]
    return None if value == NONE else value


def _with_none(value: Any) -> Any:
    match value:
        case dict():
            return {key: _with_none(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_with_none(inner) if isinstance(inner, dict) else inner for inner in value]
    return NONE if value is None else value
