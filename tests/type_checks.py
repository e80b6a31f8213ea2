"""What jaxtyping's import hook puts around each function of smolforge.

jaxtyping's own wrapper checks all arguments twice, and for each call keeps the sizes that names stand for. Most
functions have no array in their signature: beartype alone checks as much of them. The others are checked once.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator

import jaxtyping

BY_JAXTYPING = jaxtyping.jaxtyped


def parts(hint: object) -> Iterator[object]:
    """Return a hint and all that stands within its brackets."""
    yield hint
    for part in typing.get_args(hint):
        yield from parts(part)


def check_calls(target: Callable, *, typechecker: Callable) -> Callable:
    """Wrap a function, or the __init__ of a dataclass, so that each call checks types and shapes.

    What stays with jaxtyping: a hint that is a string, of which it checks nothing where the name is imported for
    type checkers only; and a generator, whose return annotation is of what it yields.
    """
    if isinstance(target, type):
        if dataclasses.is_dataclass(target) and "__wrapped__" not in vars(target.__init__):
            target.__init__ = check_calls(target.__init__, typechecker=typechecker)
        return target
    found = [part for hint in target.__annotations__.values() for part in parts(hint)]
    arrays = any(isinstance(part, type) and issubclass(part, jaxtyping.AbstractArray) for part in found)
    unresolved = any(isinstance(part, str | typing.ForwardRef) for part in found)
    if unresolved or (arrays and inspect.isgeneratorfunction(target)):
        return BY_JAXTYPING(target, typechecker=typechecker)
    types = typechecker(target)
    if not arrays:
        return types

    @functools.wraps(target)
    def with_shapes(*arguments: object, **options: object) -> object:
        if jaxtyping.config.jaxtyping_disable:
            return target(*arguments, **options)
        with BY_JAXTYPING("context"):
            return types(*arguments, **options)

    return with_shapes


jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(check_calls, typechecker=typechecker)
