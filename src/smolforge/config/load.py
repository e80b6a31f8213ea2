"""Load recipe files and overrides into one validated `Recipe`: default < recipe < flag.

    file (TOML, YAML or JSON) -> tree of plain values -> overrides -> Recipe

"none" means off everywhere. A key may be dotted, as `train.steps`. `model` may be the name of a preset, or a table
whose `preset` the other keys change.
Reading any file ends soon, with the tree or with one sentence that names the file and the line.
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
from smolforge.config.base import NONE, set_dotted, validate_settings
from smolforge.errors import ConfigError, did_you_mean
from smolforge.formatting import MAX_SHOWN_CHARACTERS, format_value

MAX_BYTES = 128 << 10
"""Bytes of a file: hundreds of times any recipe, and read in a second however it is made."""
MAX_DEPTH = 16
MAX_DOTS = 1000
"""In one line of TOML, whose reader takes the square of that many steps."""


def read_tree(path: Path) -> dict[str, Any]:
    """Read the tree of a file. Raises ConfigError for one that cannot be read, or that is too large or too deep."""
    parse = PARSERS.get(path.suffix)
    if parse is None:
        raise ConfigError(f"{path} is not a recipe: its name should end in .toml, .yaml or .json")
    text = ""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        text = content.decode("utf-8-sig")
        tree = parse(text)
        _check_depth(tree)
    except (ValueError, ArithmeticError, RecursionError, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {_error_reason(error, text)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a table of settings")
    return tree


def _toml(text: str) -> Any:
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MAX_DOTS:
            raise ValueError(f"there are more than {MAX_DOTS:,} dots (at line {number})")
    return tomllib.loads(text)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys)


def _yaml(text: str) -> Any:
    return yaml.load(text, _PlainLoader)


PARSERS = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}


class _PlainLoader(yaml.SafeLoader):
    """YAML that says no more than JSON can: an alias may stand for a billion values, a tag for anything.

    Plain words are what they are in YAML 1.2 (YAML_TYPES), not in 1.1: `no` is text and `1e-3` a number; 1:30 is text,
    not 90. A setting that is true or false takes `no`, as a flag does.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (add_implicit_resolver writes to it)

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
        _unique_keys((name.value, None) for name, _ in node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        if re.fullmatch(LEADING_ZERO, node.value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} begins with 0, which some read as octal; write it without, or text in quotes",
                problem_mark=node.start_mark,
            )
        return super().construct_yaml_int(node)


LEADING_ZERO = "[-+]?0[0-9_]+"
YAML_TYPES = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": rf"{LEADING_ZERO}|[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?",
}
for _name, _pattern in YAML_TYPES.items():
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), None)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dictionary. Raises ValueError for a key that occurs twice, or is not valid text."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{format_value(key)} is set twice")
        result[key.encode().decode()] = value
    return result


def _check_depth(tree: Any) -> None:
    level = [tree]
    for _ in range(MAX_DEPTH):
        children = [
            node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)
        ]
        level = [value for values in children for value in values]
    if level:
        raise RecursionError


def _error_reason(error: Exception, text: str) -> str:
    """Return why a file cannot be read, with the line at fault if it is known."""
    match error:
        case UnicodeDecodeError():
            message = f"byte {error.start} is not UTF-8 text"
        case UnicodeEncodeError():
            message = f"{format_value(error.object)} is not UTF-8 text"
        case RecursionError():
            message = "it is nested too deeply for a recipe"
        case OSError():
            message = error.strerror or str(error)
        case json.JSONDecodeError():
            problem = error.msg.removesuffix(" at").removesuffix(" starting")
            message = f"{problem} (at line {error.lineno}, column {error.colno})"
        case yaml.MarkedYAMLError() if error.problem and error.problem_mark:
            message = f"{error.problem} (at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
        case ValueError() if "digits" in str(error):
            message = "a number in it has thousands of digits"
        case _:
            message = " ".join(str(error).split())
    return f"{message}{_quoted_line(message, text)}"


def _quoted_line(message: str, text: str) -> str:
    """Return the line that a message names, from shortly before the column if it is long."""
    match = re.search(r"at line (\d+)(?:, column (\d+))?", message)
    lines = re.split(r"\r?\n", text)
    if match is None or int(match[1]) > len(lines):
        return ""
    line = lines[int(match[1]) - 1]
    start = max(0, int(match[2] or 1) - MAX_SHOWN_CHARACTERS // 2) if len(line) > MAX_SHOWN_CHARACTERS else 0
    return f": {format_value(line[start:].strip())}" if line.strip() else ""


FOLDERS = {"recipe": "", "study": "studies"}
"""Of shipped files, below recipes/."""


def read_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a file, or of a shipped recipe's name, changed by dotted overrides.

    Raises ConfigError with file, key and suggestion for whatever is wrong in it. A file must be right by itself, so
    that what is wrong after that is an override's fault, and a sentence about it needs no file.
    """
    path = find_recipe(source)
    tree = _load_tree(path)
    recipe = to_recipe(tree, f"{path}: ")
    if not overrides:
        return recipe
    apply_overrides(tree, overrides)
    return to_recipe(tree, "", f"{path} with {', '.join(overrides)} changed: ")


def apply_overrides(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Apply dotted overrides to a recipe's tree. Sources replace a mixture, and a mixture replaces sources."""
    has_sources, has_mixture = "data.sources" in overrides, covers(overrides, "data.mixture")
    dropped = () if has_sources == has_mixture else ("mixture", "stages") if has_sources else ("sources",)
    if isinstance(tree.get("data"), dict):
        tree["data"] = {name: inner for name, inner in tree["data"].items() if name not in dropped}
    check_sources(tree, overrides)
    for dotted, value in overrides.items():
        set_dotted(tree, dotted, value)


def check_sources(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse overrides of a source that the mixture does not have and that they do not add: a typing error."""
    data = tree.get("data")
    mixture = (data.get("mixture") if isinstance(data, dict) else None) or {}
    changes = [dotted.split(".")[2:] for dotted in overrides if dotted.startswith("data.mixture.")]
    known_names = {*mixture, *(name for name, *setting in changes if setting in ([], ["source"]))}
    for name, *setting in changes:
        if isinstance(mixture, dict) and name not in known_names and "data.mixture" not in overrides:
            raise ConfigError(
                f"data.mixture.{'.'.join([name, *setting])}: the mixture has no source {format_value(name)}."
                f"{did_you_mean(name, mixture)} With data.mixture.{name}.source it gets one"
            )


def covers(overrides: Iterable[str], name: str) -> bool:
    """Return whether overrides set a setting, or a part of it."""
    return any(dotted == name or dotted.startswith(f"{name}.") for dotted in overrides)


def import_recipe_classes(recipe: Recipe, source: str | Path) -> Recipe:
    """Import the custom classes of a recipe, from next to its file or from sys.path, and return the recipe.

    Only for a file that the user wrote, never for the recipe in a run's folder.
    """
    custom_classes.import_classes(recipe.custom_classes, [find_recipe(source).parent])
    return recipe


def model_settings(source: str | Path) -> set[str]:
    """Return the dotted names of the model's settings that a recipe file sets itself, not through a preset."""
    model = _load_tree(find_recipe(source)).get("model", {})
    return {f"model.{name}" for name in model if name in ModelConfig.model_fields} if isinstance(model, dict) else set()


def to_recipe(tree: dict[str, Any], prefix: str = "", conflict_prefix: str | None = None) -> Recipe:
    """Return plain nested values as a Recipe, with presets and "none" resolved. Raises as `validate_settings` does."""
    tree = _without_none(tree)
    model = tree.get("model", {})
    if isinstance(model, str):
        model = {"preset": model}
    if isinstance(model, dict):
        model = dict(model)
        name = model.pop("preset", None)
        tree["model"] = {**_shape(name, prefix), **model}
    return validate_settings(Recipe, tree, prefix, conflict_prefix=conflict_prefix)


def _shape(preset: Any, prefix: str) -> dict[str, Any]:
    """Return the settings of a preset; none if there is no preset."""
    try:
        return {} if preset is None else presets.shape(preset if isinstance(preset, str) else format_value(preset))
    except ConfigError as error:
        raise ConfigError(f"{prefix}model.preset: {error}") from None


def write_recipe(recipe: Recipe) -> str:
    """Return TOML that `read_recipe` reads back as the same recipe."""
    text = tomli_w.dumps(_with_none(recipe.model_dump()))
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(
            f"this recipe has more than the {MAX_BYTES:,} bytes that can be read again; "
            "folders and globs make data.sources shorter"
        )
    return text


def find_recipe(source: str | Path, kind: Literal["recipe", "study"] = "recipe") -> Path:
    """Return the path of a recipe file or a study file, or of one that comes with the package."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = {file.stem: file for folder in _recipe_folders() for file in (folder / FOLDERS[kind]).glob("*.toml")}
    if path.stem in shipped and path.parent.name in ("", "recipes", FOLDERS[kind]):
        return shipped[path.stem]
    if os.path.lexists(path):
        raise ConfigError(f"{path} is no file, but a folder, a device or a link to nothing; a {kind} is a file")
    if kind == "recipe" and any((folder / FOLDERS["study"] / f"{path}.toml").is_file() for folder in _recipe_folders()):
        raise ConfigError(f"{path} is a study, not a recipe: smolforge compare {path} --out DIR conducts it")
    raise ConfigError(
        f"there is no {kind} {format_value(str(source))}; a file is expected, or one of {', '.join(sorted(shipped))}."
        + did_you_mean(path.stem, shipped)
    )


def _recipe_folders() -> list[Path]:
    package = Path(__file__).parents[1]
    return [folder for folder in (package / "recipes", package.parents[1] / "recipes") if folder.is_dir()]


def _load_tree(path: Path) -> dict[str, Any]:
    """Read the tree of a file, with a preset's name as a table, so that overrides can be set in it."""
    tree = read_tree(path)
    if "study" in tree and "variants" in tree:
        raise ConfigError(f"{path} is a study, not a recipe: smolforge compare {path} --out DIR conducts it")
    if isinstance(tree.get("model"), str):
        tree = tree | {"model": {"preset": tree["model"]}}
    return _nest_dotted(tree, f"{path}: ")


def _nest_dotted(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a tree with dotted keys as tables. Raises ConfigError for a setting that has two values."""
    nested: dict[str, Any] = {}
    for key, value in tree.items():
        *path, last = key.split(".") if all(key.split(".")) else [key]
        value = _nest_dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for part in reversed(path):
            last, value = part, {last: value}
        _merge_tables(nested, {last: value}, prefix)
    return nested


def _merge_tables(tree: dict[str, Any], other: Mapping[str, Any], prefix: str) -> None:
    """Add the settings of another tree to a tree. Raises ConfigError for one that has another value there."""
    for key, value in other.items():
        present = tree.setdefault(key, value)
        if isinstance(present, dict) and isinstance(value, dict):
            tree[key] = present = dict(present)
            _merge_tables(present, value, f"{prefix}{key}.")
        elif (type(present), present) != (type(value), value):
            values = f"{format_value(present)} and {format_value(value)}"
            raise ConfigError(f"{prefix}{key} is set twice, to {values}; keep one of them")


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
