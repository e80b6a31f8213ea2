"""What a run's settings are: decided at its first start, held to ever after."""

from collections.abc import Set

from smolforge.checkpoint import resolve
from smolforge.config import FREE, Recipe, fields, leaves, replaced
from smolforge.errors import SettingError
from smolforge.recipe.plan import BUDGETED, within_budget


def settle(recipe: Recipe, explicit: Set[str]) -> Recipe:
    """Decide what a first start leaves open: the budget's run, the schedule's horizon."""
    if recipe.init_from is not None:
        shape = resolve.read_config(recipe.init_from)
        recipe = replaced(recipe, {"model": shape.model_dump()})
    if recipe.budget is not None:
        given = leaves(recipe)
        recipe = replaced(within_budget(recipe), {name: given[name] for name in BUDGETED if name in explicit})
    return with_schedule_over(recipe, recipe.train.steps)


def with_schedule_over(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with its schedule's horizon and lengths said in steps."""
    schedule = recipe.optim.schedule.over(steps)
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"schedule": schedule})})


def resumed(stored: Recipe, asked: Recipe, explicit: Set[str]) -> Recipe:
    """The stored recipe with what may change taken from the one asked for.

    What was left open (none) or derived by a budget is as stored, unless given by hand. Raises
    SettingError naming every fixed setting that differs.
    """
    assert stored.optim.schedule.steps is not None
    before, now = leaves(stored), leaves(with_schedule_over(asked, stored.optim.schedule.steps))
    changes, fixed = {}, []
    for name, field in fields():
        derived = stored.budget is not None and name in BUDGETED and name not in explicit
        chosen_model = stored.init_from is not None and name.startswith("model.") and name not in explicit
        if before[name] == now[name] or (now[name] is None and name not in explicit) or derived or chosen_model:
            continue
        if FREE in field.metadata:
            changes[name] = now[name]
        else:
            fixed.append(f"{name} ({before[name]!r}, now {now[name]!r})")
    changes.pop("budget", None)
    changes.pop("init_from", None)
    if fixed:
        more = f" and {len(fixed) - 5} more" if len(fixed) > 5 else ""
        raise SettingError(
            f"this run was begun with other settings that must not change: {', '.join(fixed[:5])}{more}; "
            "resume it as it was, or start another --run with --init-from this one"
        )
    return replaced(stored, changes)


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
