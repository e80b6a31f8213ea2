"""Dotted flags over a recipe: `--train.steps 500 --optim.schedule.decay none --data.sources a.txt,b.txt`.

Every setting is a flag; dashes and underscores are the same. Values are checked where all settings are,
in config, once they lie over the recipe.
"""

import tomllib
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from smolforge.config import Recipe
from smolforge.config.base import NONE, entered, fields, shown
from smolforge.errors import SettingError, did_you_mean

VARIABLES = (
    ("WANDB_WATCH", "report.watch", ("gradients", "parameters", "all")),
    ("WANDB_LOG_MODEL", "report.log_model", ("end", "checkpoint")),
)


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Dotted name to value, for what is left of a command line. Raises SettingError for what is no flag."""
    known = dict(fields(Recipe))
    known |= {"model": None, "model.preset": None}
    given: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise SettingError(f"{shown(word)} is one word too many; settings are flags such as --train.steps 500")
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in known and (field := in_a_table(name)) is not None:
            known[name] = field
        if name not in known:
            near = did_you_mean(name.lower(), known).replace("_", "-").replace("mean ", "mean --")
            raise SettingError(f"there is no setting --{flag:.60}.{near or ' smolforge inspect RECIPE lists all.'}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SettingError(f"--{flag} needs a value")
            value = rest.pop(0)
        field = known[name]
        name = "model.preset" if name == "model" else name
        if field is not None and _is_list(field.annotation) and not (value == NONE and _is_list_or_none(field)):
            given[name] = [*given.get(name, []), *items(f"--{flag}", value)]
        elif name in given:
            raise SettingError(f"--{flag} is given twice")
        else:
            given[name] = value
    return given


def in_a_table(name: str) -> Any:
    """The field of a setting such as data.mixture.NAME.weight, if it is one."""
    parts = name.split(".")
    way, group = entered(Recipe, parts)
    table = dict(fields(Recipe)).get(".".join(parts[: way - 1])) if way else None
    is_table = table is not None and any(get_origin(each) is dict for each in get_args(table.annotation))
    return dict(fields(group)).get(".".join(parts[way:])) if is_table else None


def from_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """Dotted name to value, of what W&B's users say in variables, as Transformers' trainer reads them."""
    given = {}
    for variable, name, allowed in VARIABLES:
        value = environment.get(variable, "").lower()
        if value in allowed:
            given[name] = value
        elif value in ("false", "none"):
            given[name] = NONE
        elif value:
            raise SettingError(f"{variable} is {shown(value)}; it should be {', '.join(allowed)} or false")
    return given


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(get_origin(each) is tuple for each in get_args(annotation))


def _is_list_or_none(field: Any) -> bool:
    return NoneType in get_args(field.annotation)


def items(name: str, value: str) -> list[Any]:
    """`a,b`, or a TOML list where an item has a comma in it."""
    if not value.startswith("["):
        return value.split(",")
    try:
        return tomllib.loads(f"items = {value}")["items"]
    except (ValueError, RecursionError):
        raise SettingError(f'{name} is {shown(value)}; it should be a list such as a,b or ["a", "b"]') from None
