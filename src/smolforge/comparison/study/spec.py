"""A study's file -> what to compare: variants of one recipe, each checked as a recipe, at an equal budget.

recipe = "nano"                              the recipe all begin from
[study]                                      seeds, budget, baseline, metric, test
[settings]                                   what all variants change in it
[variants.NAME]                              what one of them changes besides
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from smolforge.comparison.statistics import Test
from smolforge.config import Recipe, Seed, Share, Text, load
from smolforge.config.base import Settings, leaves, validate_settings
from smolforge.config.load import find_recipe, import_recipe_classes, read_recipe
from smolforge.errors import ConfigError, did_you_mean
from smolforge.formatting import flatten, format_value
from smolforge.operating_system import is_portable_name

TABLES = ("recipe", "study", "settings", "variants")
STUDY_OWNED = {
    "seed": "study.seeds has them",
    "budget": "study.budget is what all have",
    "train.steps": "they follow from study.budget",
    "optim.schedule.steps": "schedules end where the budget does",
}
"""What a study decides, and no variant."""
TEXT_SETTINGS = ("data.sources", "data.text_key", "data.group_key", "data.held_out")


class Budget(Settings):
    """What every run may spend; one of them."""

    tokens: PositiveInt | None = None
    """Tokens to learn from."""
    flops: PositiveFloat | None = None
    """Matrix FLOPs of training, attention counted as causal."""
    seconds: PositiveFloat | None = None
    """Seconds of training on this machine, as measured before the first run."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "Budget":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("it should be one of tokens, flops and seconds, such as { tokens = 1_000_000 }")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def amount(self) -> float:
        return float(next(iter(self.model_dump(exclude_none=True).values())))


class LawSettings(Settings):
    """The table [study.law]: variants of growing size, and what the loss of the largest follows from.

    metric = floor + A / N^alpha, fitted to the means over seeds of all variants but the predicted.
    """

    predicted: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Variants that are left out of the fit, and held against what it says of them."""
    over: Literal["parameters", "flops"] = "parameters"
    """N: all parameters, as Hoffmann et al. 2022 count, or the FLOPs of a run."""
    floor: NonNegativeFloat | Literal["fitted"] = 0.0
    """What no size goes below. Few sizes do not tell it apart from alpha, so it is chosen before the runs."""


class StudySettings(Settings):
    """The table [study]."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """One run of each variant with each."""
    budget: Budget
    """What is held equal."""
    baseline: Text
    """The variant that all others are held against."""
    metric: Literal["validation_loss", "validation_bits_per_byte", "loss_added_by_int4"] = "validation_loss"
    """What is compared, as measured after the last step; less is better."""
    group_size: PositiveInt = 32
    """Of loss_added_by_int4: neighbouring weights that share a scale."""
    test: Test = "paired-t"
    """Chosen before any run: paired-t by seed, or welch-t."""
    alpha: Share = 0.05
    """How often variants that are the same may be called different."""
    learning_rates: tuple[PositiveFloat, ...] = ()
    """Factors of the learning rates; each variant first takes its best of them, on seeds of their own."""
    learning_rate_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1000,)
    """The seeds those are tried with."""
    tasks: tuple[Text, ...] = ()
    """Multiple choice that each finished run is measured on, as evaluate takes it: names, and files of items."""
    law: LawSettings | None = None
    """Sizes that predict a larger one."""

    @model_validator(mode="after")
    def _check_seeds(self) -> "StudySettings":
        for name in ("seeds", "learning_rate_seeds", "learning_rates"):
            if len(set(self.__dict__[name])) < len(self.__dict__[name]):
                raise ValueError(f"study.{name} has something twice")
        if self.learning_rates and set(self.seeds) & set(self.learning_rate_seeds):
            raise ValueError("study.seeds and study.learning_rate_seeds share a seed: the choice would judge itself")
        return self


class StudyFile(Settings):
    """The file without its variants, which are recipes' settings."""

    recipe: Text
    study: StudySettings


@dataclass(frozen=True)
class Study:
    """What is to be compared."""

    path: Path
    recipe: Path
    settings: StudySettings
    common: dict[str, Any]
    """What all variants change in the recipe, by dotted name."""
    changes: dict[str, dict[str, Any]]
    """Each variant's, those of all included."""
    own: dict[str, dict[str, Any]]
    """Those of the variant alone."""
    recipes: dict[str, Recipe]

    @property
    def name(self) -> str:
        return self.path.stem


def read_study(name_or_path: str | Path) -> Study:
    """The study in a file, or a shipped one by its name. Raises ConfigError with file, key and suggestion."""
    path = find_recipe(name_or_path, "study")
    tree = load.read_tree(path)
    for key in tree:
        if key not in TABLES:
            raise ConfigError(f"{path}: there is no table {format_value(key)} in a study.{did_you_mean(key, TABLES)}")
    head = {key: value for key, value in tree.items() if key in ("recipe", "study")}
    head = validate_settings(StudyFile, head, f"{path}: ", conflict_prefix=f"{path}: ")
    variants, common = tree.get("variants", {}), flat_changes(tree.get("settings", {}))
    if not isinstance(variants, dict) or len(variants) < 2:
        raise ConfigError(f"{path}: a study needs two variants or more, each a table [variants.NAME]")
    check_variant_names(head.study, variants, path)
    local_recipe = path.parent / head.recipe
    recipe = local_recipe if local_recipe.is_file() else find_recipe(head.recipe)
    check_owned_settings(common, f"{path}: settings: ")
    read_recipe(recipe)
    own = {name: variant_changes(name, table, path) for name, table in variants.items()}
    changes = {name: common | settings for name, settings in own.items()}
    recipes = {
        name: variant_recipe(path, recipe, overrides, prefix=f"{path}: variants.{name}: ")
        for name, overrides in changes.items()
    }
    study = Study(path, recipe, head.study, common, changes, own, recipes)
    check_comparable(study)
    return study


def check_variant_names(settings: StudySettings, variants: Mapping[str, Any], path: Path) -> None:
    """Refuse variants that are named and not there, and a law through fewer sizes than it has numbers and one more."""
    law = settings.law
    references = [("study.baseline is", settings.baseline)]
    references += [("study.law.predicted has", name) for name in (law.predicted if law else ())]
    for label, name in references:
        if name not in variants:
            raise ConfigError(
                f"{path}: {label} {format_value(name)}, which is no variant.{did_you_mean(name, variants)}"
            )
    for first, second in itertools.combinations(variants, 2):
        if first.lower() == second.lower():
            raise ConfigError(f"{path}: variants.{first} and variants.{second} are one folder on Windows and macOS")
    min_sizes = 4 if law and law.floor == "fitted" else 3
    if law and len(set(variants) - set(law.predicted)) < min_sizes:
        raise ConfigError(
            f"{path}: study.law is fitted to the variants that are not predicted, and needs {min_sizes} of them or more"
        )


def flat_changes(table: Any) -> dict[str, Any]:
    """Dotted name to value; `optim.name = ...` and a table [optim] are the same."""
    flat = flatten(table) if isinstance(table, Mapping) else {"": table}
    return {
        "model.preset" if name == "model" and isinstance(value, str) else name: value for name, value in flat.items()
    }


def variant_changes(name: str, table: Any, path: Path) -> dict[str, Any]:
    """What a variant changes. Raises ConfigError for a name or a setting that is not its to choose."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,40}", name, re.ASCII) or not is_portable_name(name):
        rule = "up to 41 letters, digits, dots, dashes and underscores, a letter or digit first (nor CON, NUL, ...)"
        raise ConfigError(f"{path}: variants.{format_value(name)} names folders, so it should be {rule}")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: variants.{name} is {format_value(table)}; it should be a table of settings")
    changes = flat_changes(table)
    check_owned_settings(changes, f"{path}: variants.{name}: ")
    return changes


def check_owned_settings(changes: Mapping[str, Any], prefix: str) -> None:
    """Refuse what a study decides itself."""
    for setting, reason in STUDY_OWNED.items():
        if setting in changes:
            raise ConfigError(f"{prefix}{setting} is the study's to decide: {reason}")


def variant_recipe(path: Path, recipe: Path, changes: Mapping[str, Any], *, prefix: str) -> Recipe:
    """The recipe of a variant of the study at `path`. Raises ConfigError that says which."""
    try:
        parsed = import_recipe_classes(read_recipe(recipe, changes), path)
        if parsed.data.mixture is not None:
            raise ConfigError(
                "data.mixture is no text of a study: all its runs learn from one, which data.sources names"
            )
        return parsed
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def check_comparable(study: Study) -> None:
    """Refuse variants that could not be held against each other."""
    values = {name: leaves(recipe) for name, recipe in study.recipes.items()}
    baseline = values[study.settings.baseline]
    for name, settings in values.items():
        prefix = f"{study.path}: variants.{name}: "
        if other := next((setting for setting in TEXT_SETTINGS if settings[setting] != baseline[setting]), None):
            raise ConfigError(f"{prefix}{other} differs from the baseline's; all variants learn from the same text")
        if settings["train.evaluate_every"] is None or not settings["data.held_out"]:
            setting = "train.evaluate_every" if settings["data.held_out"] else "data.held_out"
            raise ConfigError(f"{prefix}{setting} is off, and {study.settings.metric} is measured on held-out text")
        if settings["train.evaluate_tokens"] != baseline["train.evaluate_tokens"]:
            raise ConfigError(f"{prefix}train.evaluate_tokens differs from the baseline's; all are measured alike")
        differs = tokenization_key(study.recipes[name]) != tokenization_key(study.recipes[study.settings.baseline])
        if differs and study.settings.metric != "validation_bits_per_byte":
            raise ConfigError(
                f"{prefix}its tokens are not the baseline's, so losses a token say nothing; "
                'study.metric = "validation_bits_per_byte" compares them'
            )


def tokenization_key(recipe: Recipe) -> tuple[Any, ...]:
    """What decides a corpus' tokens: runs that agree in it share one."""
    size = recipe.model.vocab_size if recipe.tokenizer is None and recipe.init_from is None else None
    return recipe.tokenizer, recipe.special_tokens, recipe.init_from if recipe.tokenizer is None else None, size
