"""What each variant's runs will be: steps that make budgets equal, and what this machine decides, once for all.

Written into OUT/plan.json before the first run. A study that goes on reads it: seconds are not measured again, and
a dtype or micro-batch is the same in all runs of a variant.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolforge import __version__
from smolforge.comparison.study.benchmarks import write_json
from smolforge.comparison.study.spec import Budget, Study, StudySettings
from smolforge.config import Recipe
from smolforge.config.base import leaves, replace_settings
from smolforge.errors import ConfigError, InvalidFileError
from smolforge.formatting import flatten
from smolforge.models.stats import flops_per_token
from smolforge.runs.auto import AUTO_SETTINGS
from smolforge.runs.estimate import tokens_per_second
from smolforge.runs.resolve import resolve_recipe

PLAN = "plan.json"
BUDGET_TOLERANCE = 0.05
"""Of the budget, that whole steps may miss it by."""
BUDGET_UNITS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}


@dataclass(frozen=True)
class StudyPlan:
    """Of each variant, by its name."""

    steps: dict[str, int]
    decided: dict[str, dict[str, Any]]
    """Values of DECIDED."""


def load_or_make_plan(study: Study, out: Path) -> StudyPlan:
    """The plan in `out`, or a new one written there. Raises ConfigError where it is another study's."""
    study_content = study_as_json(study)
    path = out / PLAN
    if path.is_file():
        try:
            stored = json.loads(path.read_text("utf-8"))
            plan, before = StudyPlan(**stored["plan"]), stored["study"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidFileError(f"{path} is broken: {error!r}; give another --out") from None
        check_same_study(before, study_content, out)
        return plan
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not a study's folder; give another name")
    plan = make_plan(study)
    write_json(path, {"version": __version__, "study": study_content, "plan": asdict(plan)})
    return plan


def study_as_json(study: Study) -> dict[str, Any]:
    """All that defines the study, for its folder to be held to."""
    recipes = {name: leaves(recipe) for name, recipe in study.recipes.items()}
    settings = leaves(study.settings) | {"law": study.settings.law and study.settings.law.model_dump()}
    return json.loads(json.dumps({"settings": settings, "variants": recipes}))


def check_same_study(stored: Mapping[str, Any], current: Mapping[str, Any], out: Path) -> None:
    """Seeds and tests chosen before the runs stay, or the p values would mean nothing.

    A setting that the version which began the study did not have was at its default.
    """
    recipe = json.loads(json.dumps(leaves(Recipe())))
    defaults = {name: field.default for name, field in StudySettings.model_fields.items() if not field.is_required()}
    study = json.loads(json.dumps(defaults))
    before = {
        "settings": {**study, **stored["settings"]},
        "variants": {name: {**recipe, **part} for name, part in stored["variants"].items()},
    }
    flat_stored, flat_now = (part["settings"] | flatten({"variants": part["variants"]}) for part in (before, current))
    differing = [name for name in flat_stored | flat_now if flat_stored.get(name) != flat_now.get(name)]
    if differing:
        more_text = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"{out} holds a study that was begun with other settings: {', '.join(differing[:3])}{more_text}; "
            "what is chosen before the runs stays, so give another --out"
        )


def make_plan(study: Study) -> StudyPlan:
    """Steps by the budget, and what `auto` comes to on this machine."""
    steps: dict[str, int] = {}
    decided: dict[str, dict[str, Any]] = {}
    for name, recipe in study.recipes.items():
        resolved = resolve_recipe(replace_settings(recipe, {"optim.schedule.steps": None}))
        steps[name] = steps_for_budget(study.settings.budget, resolved, f"{study.path}: variants.{name}: ")
        # a run of so many steps, whose schedule ends with it
        planned = {"train.steps": steps[name], "optim.schedule.steps": None, "train.dtype": resolved.train.dtype}
        values = leaves(resolve_recipe(replace_settings(recipe, planned)))
        decided[name] = {setting: values[setting] for setting in AUTO_SETTINGS}
    return StudyPlan(steps, decided)


def steps_for_budget(budget: Budget, recipe: Recipe, prefix: str) -> int:
    """How many steps come nearest to a budget. Raises ConfigError where whole steps would miss it by much."""
    per_step = cost_per_step(budget, recipe)
    steps = max(1, round(budget.amount / per_step))
    if abs(steps * per_step / budget.amount - 1) > BUDGET_TOLERANCE:
        unit = BUDGET_UNITS[budget.kind]
        raise ConfigError(
            f"{prefix}a step takes {per_step:,.4g} {unit}, so no number of steps comes within {BUDGET_TOLERANCE:.0%} "
            f"of the budget of {budget.amount:,.4g} {unit}; a larger study.budget or a smaller train.batch_tokens would"
        )
    return steps


def cost_per_step(budget: Budget, recipe: Recipe) -> float:
    """In what the budget counts."""
    tokens = recipe.train.batch_tokens
    if budget.kind == "seconds":
        return tokens / tokens_per_second(recipe)
    return float(
        tokens * (flops_per_token(recipe.model, recipe.train.sequence_length) if budget.kind == "flops" else 1)
    )
