"""A run's settings: resolved at its first start, fixed ever after."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from smolforge.checkpoint import loading, optimizer_state
from smolforge.config import ModelConfig, Recipe
from smolforge.config.base import FREE, fields, leaves, replace_settings
from smolforge.config.load import apply_overrides, covers, to_recipe
from smolforge.errors import ConfigError
from smolforge.runs.auto import AUTO_SETTINGS, resolve_auto, resolve_dtype
from smolforge.runs.estimate import BUDGET_SETTINGS, within_budget

log = logging.getLogger("smolforge")
FIRST_START_ONLY = ("budget", "init_from", "init_moments")
"""What only the first start applies."""
HEAD_DIM_SETTINGS = ("model.hidden_size", "model.num_attention_heads")
"""What head_dim follows from, where it is not given."""
DATASET_SETTINGS = ("data.sources", "data.mixture", "data.stages")
"""Each of which says what the text is, so that one given by hand counts before what a file says of the others."""
ADAPTABLE = ("rope_theta", "rope_scaling", "max_position_embeddings")
"""What a model may change when it is the start of another."""


def resolve_recipe(
    recipe: Recipe,
    explicit: Set[str] = frozenset(),
    written: Set[str] = frozenset(),
    *,
    ranks: int = 1,
    count_rows: Callable[[Recipe], int] | None = None,
) -> Recipe:
    """Resolve what a first start leaves open: shape of the base model, steps, budget, `auto` settings, horizon.

    `explicit` names settings of the command line, which win over what epochs or a budget derive; `written` names
    those of the model that are in the recipe's file. `count_rows` returns the number of sequences in a recipe's
    dataset; without it epochs stay unresolved.
    """
    if recipe.init_from is not None:
        shape = resolve_base_shape(recipe, explicit, written)
        base_model = loading.pin_revision(recipe.init_from)
        if recipe.needs_base_model and Path(base_model).exists():  # it will be read again, from wherever that is
            base_model = str(loading.resolve_model_path(base_model).resolve())
        recipe = replace_settings(recipe, {"model": shape.model_dump(), "init_from": base_model})
        check_moments(recipe)
    recipe, max_rows = resolve_dtype(recipe), None
    if recipe.train.epochs is not None and count_rows is not None and "train.steps" not in explicit:
        max_rows = math.ceil(count_rows(recipe) * recipe.train.epochs)
        recipe = replace_settings(recipe, {"train.steps": math.ceil(max_rows / recipe.train.sequences_per_step)})
    if recipe.budget is not None:
        values = leaves(recipe)
        kept = {name: values[name] for name in BUDGET_SETTINGS if name in explicit}
        if "train.steps" in kept:
            kept.setdefault("optim.schedule.steps", None)
        recipe = replace_settings(within_budget(recipe, explicit, ranks, most_rows=max_rows), kept)
    return with_resolved_schedule(resolve_auto(recipe, ranks), recipe.train.steps)


def resolve_base_shape(recipe: Recipe, explicit: Set[str], written: Set[str]) -> ModelConfig:
    """Return the shape of --init-from, with the recipe's changes that need no other weights.

    Special tokens that the recipe adds enlarge its vocabulary. What the recipe's file says of another shape is
    ignored with a warning. Raises ConfigError for a shape on the command line that differs.
    """
    assert recipe.init_from is not None
    requested = recipe.model
    shape = loading.read_config(recipe.init_from)
    if loading.read_scheme(recipe.init_from) is not None:
        raise ConfigError(f"{recipe.init_from} holds integers, which do not learn; start from what it was made from")
    changes = {name: requested.__dict__[name] for name in ADAPTABLE if covers(explicit | written, f"model.{name}")}
    for name in sorted(written - explicit):
        base_value, recipe_value = (
            shape.__dict__[name.removeprefix("model.")],
            requested.__dict__[name.removeprefix("model.")],
        )
        if base_value != recipe_value:
            used = recipe_value if name.removeprefix("model.") in changes else base_value
            log.warning(
                "%s is %r in the recipe and %r in --init-from; %r is used", name, recipe_value, base_value, used
            )
    if recipe.special_tokens:
        tokenizer = loading.load_tokenizer(recipe.tokenizer or recipe.init_from)
        changes["vocab_size"] = max(shape.vocab_size, len(tokenizer.with_special_tokens(recipe.special_tokens)))
    shape = shape.model_copy(update=changes)
    for name, value in shape.model_dump().items():
        if f"model.{name}" in explicit and value != requested.__dict__[name]:
            raise ConfigError(
                f"model.{name} is {requested.__dict__[name]!r}, but the model of --init-from has {value!r}"
            )
    return shape


def check_moments(recipe: Recipe) -> None:
    """Raise an error for missing Adam moments before any data is prepared, and warn of a warm-up they do not need."""
    if recipe.init_moments and recipe.init_from is not None:
        optimizer_state.check_moments_exist(loading.resolve_model_path(recipe.init_from))
        if recipe.optim.schedule.warmup_steps:
            log.warning(
                "optim.schedule.warmup_steps is %s, which only fresh moments need; "
                "--optim.schedule.warmup-steps 0 goes on at the full rate",
                recipe.optim.schedule.warmup_steps,
            )


def with_resolved_schedule(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe with the lengths of its schedule, and the ends of its data stages, in steps."""
    schedule = recipe.optim.schedule.resolved(steps)
    data = recipe.data.with_stage_ends(recipe.data.stage_ends(recipe.train.batch_tokens, schedule))
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"schedule": schedule}), "data": data})


def merge_resume_overrides(stored: Recipe, written: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return a run's stored recipe with the overrides of this start that may change.

    The recipe's file, as `written`, changes nothing any more, but must be the run's: what it leaves open (none) or a
    budget derived is as stored. Raises ConfigError naming every fixed setting that differs.
    """
    horizon = stored.optim.schedule.steps
    assert horizon is not None
    tree = stored.model_dump()
    overrides = {name: value for name, value in overrides.items() if not (name in AUTO_SETTINGS and value == "auto")}
    apply_overrides(tree, overrides)
    merged = with_resolved_schedule(to_recipe(tree), horizon)
    resized = not overrides.keys().isdisjoint(HEAD_DIM_SETTINGS)
    before, requested, in_file = leaves(stored), leaves(merged), leaves(with_resolved_schedule(written, horizon))
    fixed = []
    for name in fixed_settings(stored):
        derived = (stored.budget is not None and name in BUDGET_SETTINGS) or (
            (stored.init_from is not None and name.startswith("model.")) or (resized and name == "model.head_dim")
        )
        left_open = in_file[name] is None or (name in AUTO_SETTINGS and in_file[name] == "auto")
        overridden = covers(overrides, name) or (
            name in DATASET_SETTINGS and any(covers(overrides, other_name) for other_name in DATASET_SETTINGS)
        )
        differs = not left_open and in_file[name] != before[name] and not derived and not overridden
        if requested[name] != before[name] or differs:
            other = requested[name] if requested[name] != before[name] else in_file[name]
            fixed.append(difference(name, before[name], other))
    if fixed:
        more = f" and {len(fixed) - 5} more" if len(fixed) > 5 else ""
        raise ConfigError(
            f"this run was begun with other settings that must not change: {', '.join(fixed[:5])}{more}; "
            "resume it as it was, or start another --run with --init-from this one"
        )
    return merged.model_copy(update={name: before[name] for name in FIRST_START_ONLY})


def difference(name: str, before: Any, after: Any) -> str:
    """Return the first place at which a setting differs, with its values before and after."""
    match before, after:
        case dict(), dict():
            keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
            return difference(f"{name}.{keys[0]}", before.get(keys[0]), after.get(keys[0]))
        case (tuple(), tuple()) if len(before) == len(after) and isinstance(before[0], dict):
            index = next(index for index in range(len(after)) if before[index] != after[index])
            return difference(f"{name}.{index + 1}", before[index], after[index])
    return f"{name} ({short_repr(before)}, now {short_repr(after)})"


def short_repr(value: Any) -> str:
    """Return a value for a sentence: of a table its keys, of a list of tables their number."""
    match value:
        case dict():
            return f"a table of {', '.join(value)}"
        case [dict(), *_]:
            return f"a list of {len(value)} tables"
    return "none" if value is None else repr(value)


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """Return all settings that must not change on resume, as JSON values by dotted name."""
    values, balanced = leaves(recipe), has_balance_loss(recipe)
    fixed = {
        name: values[name]
        for name, field in fields(Recipe)
        if FREE not in field.metadata or (balanced and name == "train.micro_batch_size")
    }
    return json.loads(json.dumps(fixed))


def has_balance_loss(recipe: Recipe) -> bool:
    """Whether the size of a micro-batch is part of the training: the balance loss of experts is taken over it."""
    return recipe.model.has_experts and recipe.model.router_aux_loss_coef > 0


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raise ConfigError for more ranks than sequences, or shares that would change the balance loss of experts."""
    rows, micro = recipe.train.sequences_per_step, recipe.train.sequences_per_micro_batch
    if rows < ranks:
        raise ConfigError(
            f"train.batch_tokens ({recipe.train.batch_tokens}) is {rows} rows of train.sequence_length, and "
            f"{ranks} ranks need one each; start at most {rows}"
        )
    if ranks > 1 and has_balance_loss(recipe) and rows % (ranks * micro):
        raise ConfigError(
            f"the balance of experts is taken over train.micro_batch_size ({micro}) rows, and each of the "
            f"{ranks} ranks needs a whole number of such micro-batches of the {rows} rows"
        )


def check_resume_step(recipe: Recipe, step: int) -> None:
    """Raise ConfigError where the run would stop before its present step, or continue without learning."""
    schedule, steps = recipe.optim.schedule, recipe.train.steps
    if steps < step:
        raise ConfigError(f"train.steps is {steps} and the run is at step {step} already")
    beyond = schedule.steps is not None and steps > schedule.steps and step < steps
    if beyond and schedule.decay is not None and schedule.final_learning_rate == 0:
        raise ConfigError(
            f"train.steps ({steps}) goes beyond the schedule's {schedule.steps} steps, where the learning rate is 0: "
            "nothing would be learned. optim.schedule.final_learning_rate is fixed for this run; "
            "--init-from it starts another"
        )
