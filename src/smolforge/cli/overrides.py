"""Dotted flags over a recipe: `--train.steps 500 --optim.schedule.decay none --data.sources a.txt,b.txt`.

Every setting is a flag; dashes and underscores are the same. Values are checked where all settings are,
in config, once they lie over the recipe.
"""

import tomllib
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from cyclopts import Parameter

from smolforge.config import Recipe
from smolforge.config.base import NONE, fields, find_nested_group
from smolforge.errors import ConfigError, did_you_mean
from smolforge.formatting import format_value

RecipeSettings = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
"""What is left of a command line, for `parse_overrides`."""
ENV_VARIABLES = (
    ("WANDB_WATCH", "report.watch", ("gradients", "parameters", "all")),
    ("WANDB_LOG_MODEL", "report.log_model", ("end", "checkpoint")),
)


def parse_overrides(args: Sequence[str]) -> dict[str, Any]:
    """Return dotted name to value for the rest of a command line. Raises ConfigError for an unknown flag."""
    known_fields = dict(fields(Recipe))
    known_fields |= {"model": None, "model.preset": None}
    overrides: dict[str, Any] = {}
    remaining = list(args)
    while remaining:
        arg = remaining.pop(0)
        if not arg.startswith("--"):
            raise ConfigError(f"{format_value(arg)} is one word too many; settings are flags such as --train.steps 500")
        flag, equals, value = arg[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in known_fields and (field := table_entry_field(name)) is not None:
            known_fields[name] = field
        if name not in known_fields:
            suggestion = did_you_mean(name.lower(), known_fields).replace("_", "-").replace("mean ", "mean --")
            raise ConfigError(
                f"there is no setting --{flag:.60}.{suggestion or ' smolforge inspect RECIPE lists all.'}"
            )
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"--{flag} needs a value")
            value = remaining.pop(0)
        field = known_fields[name]
        name = "model.preset" if name == "model" else name
        if field is not None and takes_list(field.annotation, value):
            overrides[name] = [*overrides.get(name, []), *split_list(f"--{flag}", value)]
        elif name in overrides:
            raise ConfigError(f"--{flag} is given twice")
        else:
            overrides[name] = value
    return overrides


def table_entry_field(name: str) -> Any:
    """Return the field of a setting such as data.mixture.NAME.weight, None where it is not one."""
    parts = name.split(".")
    depth, group = find_nested_group(Recipe, parts)
    table = dict(fields(Recipe)).get(".".join(parts[: depth - 1])) if depth else None
    is_table = table is not None and any(get_origin(member) is dict for member in get_args(table.annotation))
    return dict(fields(group)).get(".".join(parts[depth:])) if is_table else None


def overrides_from_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return dotted name to value of W&B's environment variables, read as by Transformers' Trainer."""
    overrides = {}
    for variable, name, allowed in ENV_VARIABLES:
        value = environment.get(variable, "").lower()
        if value in allowed:
            overrides[name] = value
        elif value in ("false", "none"):
            overrides[name] = NONE
        elif value:
            raise ConfigError(f"{variable} is {format_value(value)}; it should be {', '.join(allowed)} or false")
    return overrides


def takes_list(annotation: Any, value: str) -> bool:
    """Return whether a value is one of a setting that has a list of them; `none` is where there may be no list."""
    kinds = (annotation, *get_args(annotation))
    return any(get_origin(kind) is tuple for kind in kinds) and not (value == NONE and NoneType in kinds)


def split_list(name: str, value: str) -> list[Any]:
    """Split `a,b`; an item with a comma in it needs a TOML list."""
    if not value.startswith("["):
        return value.split(",")
    try:
        return tomllib.loads(f"items = {value}")["items"]
    except (ValueError, RecursionError):
        raise ConfigError(f'{name} is {format_value(value)}; it should be a list such as a,b or ["a", "b"]') from None
