"""The named shapes, one small TOML each: `smollm2-135m`, `smollm2-nano`, ..."""

import tomllib
from importlib import resources
from typing import Any

from smolforge.errors import ConfigError, did_you_mean


def names() -> list[str]:
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def shape(name: str) -> dict[str, Any]:
    """The fields of ModelConfig a preset sets."""
    return _read(name)["model"]


def hub_id(name: str) -> str | None:
    """Where the published weights of this shape are, if there are any."""
    return _read(name).get("hub_id")


def _read(name: str) -> dict[str, Any]:
    if name not in names():
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(names())}.{did_you_mean(name, names())}")
    return tomllib.loads((resources.files(__name__) / f"{name}.toml").read_text("utf-8"))
