"""What a run's settings are: decided at its first start, held to ever after."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from smolforge.checkpoint import loading, optimizer_state
from smolforge.config import ModelConfig, Recipe
from smolforge.config.base import FREE, fields, leaves, replaced
from smolforge.config.load import covers, lay_over, to_recipe
from smolforge.errors import SettingError
from smolforge.runs.auto import DECIDED, in_the_fastest_dtype, on_this_machine
from smolforge.runs.estimate import BUDGETED, within_budget

log = logging.getLogger("smolforge")
NOT_AGAIN = ("budget", "init_from", "init_moments")
"""What only the first start applies."""
SIZES_A_HEAD = ("model.hidden_size", "model.num_attention_heads")
"""What head_dim follows from, where it is not given."""
ONE_TEXT = ("data.sources", "data.mixture", "data.stages")
"""Each of which says what the text is, so that one given by hand counts before what a file says of the others."""
ADAPTABLE = ("rope_theta", "max_position_embeddings")
"""What a model may change when it is the start of another."""


def settle(
    recipe: Recipe,
    explicit: Set[str] = frozenset(),
    written: Set[str] = frozenset(),
    ranks: int = 1,
    count_rows: Callable[[Recipe], int] | None = None,
) -> Recipe:
    """Decide what a first start leaves open: shape to start from, steps, budget's run, what fits the machine, horizon.

    `explicit` names what was given by hand, which counts before what epochs or a budget derive; `written` the settings
    of the model that stand in the recipe's file. `count_rows` says how many rows the text of a recipe is; without it
    epochs stay unresolved.
    """
    if recipe.init_from is not None:
        shape = shape_to_start_from(recipe, explicit, written)
        begun = loading.pinned(recipe.init_from)
        if recipe.keeps_its_beginning and Path(begun).exists():  # it will be read again, from wherever that is
            begun = str(loading.find(begun).resolve())
        recipe = replaced(recipe, {"model": shape.model_dump(), "init_from": begun})
        check_moments(recipe)
    recipe, most = in_the_fastest_dtype(recipe), None
    if recipe.train.epochs is not None and count_rows is not None and "train.steps" not in explicit:
        most = math.ceil(count_rows(recipe) * recipe.train.epochs)
        recipe = replaced(recipe, {"train.steps": math.ceil(most / recipe.train.rows)})
    if recipe.budget is not None:
        given = leaves(recipe)
        kept = {name: given[name] for name in BUDGETED if name in explicit}
        if "train.steps" in kept:
            kept.setdefault("optim.schedule.steps", None)
        recipe = replaced(within_budget(recipe, explicit, ranks, most), kept)
    return with_schedule_over(on_this_machine(recipe, ranks), recipe.train.steps)


def shape_to_start_from(recipe: Recipe, explicit: Set[str], written: Set[str]) -> ModelConfig:
    """The shape of --init-from, with what the recipe changes in it and needs no other weights.

    Special tokens that the recipe adds make its vocabulary as large as they need. What its file says of another
    shape is passed over with a warning; given by hand, it is refused.
    """
    assert recipe.init_from is not None
    given = recipe.model
    shape = loading.read_config(recipe.init_from)
    if loading.read_scheme(recipe.init_from) is not None:
        raise SettingError(f"{recipe.init_from} holds integers, which do not learn; start from what it was made from")
    changes = {name: given.__dict__[name] for name in ADAPTABLE if f"model.{name}" in explicit | written}
    for name in sorted(written - explicit):
        there, here = shape.__dict__[name.removeprefix("model.")], given.__dict__[name.removeprefix("model.")]
        if there != here:
            used = here if name.removeprefix("model.") in changes else there
            log.warning("%s is %r in the recipe and %r in --init-from; %r is used", name, here, there, used)
    if recipe.special_tokens:
        tokenizer = loading.tokenizer(recipe.tokenizer or recipe.init_from)
        changes["vocab_size"] = max(shape.vocab_size, len(tokenizer.with_special_tokens(recipe.special_tokens)))
    shape = shape.model_copy(update=changes)
    for name, value in shape.model_dump().items():
        if f"model.{name}" in explicit and value != given.__dict__[name]:
            raise SettingError(f"model.{name} is {given.__dict__[name]!r}, but the model of --init-from has {value!r}")
    return shape


def check_moments(recipe: Recipe) -> None:
    """Refuse moments that are not there before any text is prepared, and warn of a warm-up they have no need of."""
    if recipe.init_moments and recipe.init_from is not None:
        optimizer_state.check_there(loading.find(recipe.init_from))
        if recipe.optim.schedule.warmup_steps:
            log.warning(
                "optim.schedule.warmup_steps is %s, which only fresh moments need; "
                "--optim.schedule.warmup-steps 0 goes on at the full rate",
                recipe.optim.schedule.warmup_steps,
            )


def with_schedule_over(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with its schedule's horizon and lengths said in steps, and so the ends of the stages of its text."""
    schedule = recipe.optim.schedule.over(steps)
    data = recipe.data.settled(recipe.data.ends(recipe.train.batch_tokens, schedule))
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"schedule": schedule}), "data": data})


def resumed(stored: Recipe, written: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The stored recipe of a run, with what was given by hand for this start and may change.

    The recipe as `written` in its file changes nothing any more, but must be the run's: what it leaves
    open (none) or a budget derived is as stored. Raises SettingError naming every fixed setting that
    differs.
    """
    horizon = stored.optim.schedule.steps
    assert horizon is not None
    tree = stored.model_dump()
    overrides = {name: value for name, value in overrides.items() if not (name in DECIDED and value == "auto")}
    lay_over(tree, overrides)
    now = with_schedule_over(to_recipe(tree), horizon)
    resized = not overrides.keys().isdisjoint(SIZES_A_HEAD)
    before, asked, file = leaves(stored), leaves(now), leaves(with_schedule_over(written, horizon))
    fixed = []
    for name in fixed_settings(stored):
        derived = (stored.budget is not None and name in BUDGETED) or (
            (stored.init_from is not None and name.startswith("model.")) or (resized and name == "model.head_dim")
        )
        left_open = file[name] is None or (name in DECIDED and file[name] == "auto")
        given = covers(overrides, name) or (name in ONE_TEXT and any(covers(overrides, each) for each in ONE_TEXT))
        differs = not left_open and file[name] != before[name] and not derived and not given
        if asked[name] != before[name] or differs:
            other = asked[name] if asked[name] != before[name] else file[name]
            fixed.append(difference(name, before[name], other))
    if fixed:
        more = f" and {len(fixed) - 5} more" if len(fixed) > 5 else ""
        raise SettingError(
            f"this run was begun with other settings that must not change: {', '.join(fixed[:5])}{more}; "
            "resume it as it was, or start another --run with --init-from this one"
        )
    return now.model_copy(update={name: before[name] for name in NOT_AGAIN})


def difference(name: str, before: Any, now: Any) -> str:
    """The first place at which a setting is another, and what it was and is there."""
    match before, now:
        case dict(), dict():
            keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
            return difference(f"{name}.{keys[0]}", before.get(keys[0]), now.get(keys[0]))
        case (tuple(), tuple()) if len(before) == len(now) and isinstance(before[0], dict):
            place = next(place for place in range(len(now)) if before[place] != now[place])
            return difference(f"{name}.{place + 1}", before[place], now[place])
    return f"{name} ({briefly(before)}, now {briefly(now)})"


def briefly(value: Any) -> str:
    """A value in a sentence; of a table its keys, of a list of tables how many."""
    match value:
        case dict():
            return f"a table of {', '.join(value)}"
        case [dict(), *_]:
            return f"a list of {len(value)} tables"
    return "none" if value is None else repr(value)


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted name to value, as JSON has it, of all that is part of what a run is."""
    values, balanced = leaves(recipe), balances_experts(recipe)
    fixed = {
        name: values[name]
        for name, field in fields(Recipe)
        if FREE not in field.metadata or (balanced and name == "train.micro_batch_size")
    }
    return json.loads(json.dumps(fixed))


def balances_experts(recipe: Recipe) -> bool:
    """Whether a micro-batch's size is part of the training: the balance of experts is taken over it."""
    return recipe.model.model_type == "mixtral" and recipe.model.router_aux_loss_coef > 0


def check_shares(recipe: Recipe, ranks: int) -> None:
    """Refuse more ranks than rows, or shares that would change what experts are balanced over."""
    rows, micro = recipe.train.rows, recipe.train.micro_rows
    if rows < ranks:
        raise SettingError(
            f"train.batch_tokens ({recipe.train.batch_tokens}) is {rows} rows of train.sequence_length, and "
            f"{ranks} ranks need one each; start at most {rows}"
        )
    if ranks > 1 and balances_experts(recipe) and rows % (ranks * micro):
        raise SettingError(
            f"the balance of experts is taken over train.micro_batch_size ({micro}) rows, and each of the "
            f"{ranks} ranks needs a whole number of such micro-batches of the {rows} rows"
        )


def check_going_on(recipe: Recipe, step: int) -> None:
    """Refuse to stop before where the run stands, or to go on without learning."""
    schedule, steps = recipe.optim.schedule, recipe.train.steps
    if steps < step:
        raise SettingError(f"train.steps is {steps} and the run is at step {step} already")
    beyond = schedule.steps is not None and steps > schedule.steps and step < steps
    if beyond and schedule.decay is not None and schedule.final_learning_rate == 0:
        raise SettingError(
            f"train.steps ({steps}) goes beyond the schedule's {schedule.steps} steps, where the learning rate is 0: "
            "nothing would be learned. optim.schedule.final_learning_rate is fixed for this run; "
            "--init-from it starts another"
        )
