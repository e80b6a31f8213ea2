"""Recipe files and overrides to one validated `Recipe`: default < recipe < flag.

TOML, YAML and JSON are read through the same tree. "none" stands for off everywhere, and `model` may be
the name of a preset, or a table whose `preset` the other keys change.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from smolforge import presets
from smolforge.config import ModelConfig, Recipe
from smolforge.errors import SettingError, did_you_mean
from smolforge.settings import place, validated

NONE = "none"


def read_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a file, or of a shipped recipe's name, changed by dotted overrides.

    Raises SettingError with file, key and suggestion for whatever is wrong in it.
    """
    path = find(source)
    tree = _load(path)
    for dotted, value in (overrides or {}).items():
        place(tree, dotted, value)
    return to_recipe(tree, f"{path}: " if not overrides else "")


def model_settings(source: str | Path) -> set[str]:
    """Dotted names of the model's settings that a recipe file says itself, rather than by a preset's name."""
    model = _load(find(source)).get("model", {})
    return {f"model.{name}" for name in model if name in ModelConfig.model_fields} if isinstance(model, dict) else set()


def to_recipe(tree: dict[str, Any], where: str = "") -> Recipe:
    """Plain nested values as a Recipe, presets filled in and "none" understood."""
    tree = _without_none(tree)
    model = tree.get("model", {})
    if isinstance(model, str):
        model = {"preset": model}
    if isinstance(model, dict):
        model = dict(model)
        name = model.pop("preset", None)
        tree["model"] = {**(presets.shape(name) if name is not None else {}), **model}
    return validated(Recipe, tree, where)


def write_recipe(recipe: Recipe) -> str:
    """TOML that `read_recipe` reads back as the same recipe."""
    return tomli_w.dumps(_with_none(recipe.model_dump()))


def find(source: str | Path) -> Path:
    """A recipe file, or one of those that come with the package."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = {file.stem: file for folder in _shipped() for file in folder.rglob("*.toml")}
    if path.stem in shipped and path.parent.name in ("", "recipes"):
        return shipped[path.stem]
    raise SettingError(
        f"there is no recipe {str(source)!r}; a file is expected, or one of {', '.join(sorted(shipped))}."
        + did_you_mean(path.stem, shipped)
    )


def _shipped() -> list[Path]:
    package = Path(__file__).parents[1]
    return [folder for folder in (package / "recipes", package.parents[1] / "recipes") if folder.is_dir()]


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        match path.suffix:
            case ".toml":
                tree = tomllib.loads(text)
            case ".yaml" | ".yml":
                tree = yaml.safe_load(text)
            case ".json":
                tree = json.loads(text)
            case _:
                raise SettingError(f"{path} is not a recipe: its name should end in .toml, .yaml or .json")
    except (ValueError, yaml.YAMLError, OSError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise SettingError(f"{path} is not a table of settings")
    return tree


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items()}
    return None if value == NONE else value


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(inner) for key, inner in value.items()}
    return NONE if value is None else value
