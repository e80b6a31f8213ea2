"""What a few runs can tell: a difference, how sure it is, and how small a one they could have seen.

    losses by seed, of a variant and of the baseline -> the mean difference, its standard error, degrees of freedom
                                                     -> interval, p value, smallest visible difference

The test is named before anything is looked at. `paired-t` takes the difference of each seed, whose runs share initial
weights and the order of the data; `welch-t` does not use that the seeds are the same.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize, special

Test = Literal["paired-t", "welch-t"]
POWER = 0.8
"""How likely the smallest visible difference would have been called."""
FEWEST = 3
"""Of fewer pairs a spread is a guess, so nothing is called."""
SPREADS = 2000
"""That a power is the mean over."""


class Estimate(NamedTuple):
    """A mean difference, as every t test has it."""

    mean: float
    error: float
    """Its standard error."""
    freedom: float
    """Degrees of freedom of that."""


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline; what so few runs cannot tell is None."""

    n: int
    """Pairs of runs."""
    mean: float | None
    low: float | None
    high: float | None
    """Confidence interval of the mean, for this difference by itself."""
    p: float | None
    """Two-sided."""
    adjusted_p: float | None
    """After Holm, where several variants are held against one baseline."""
    smallest_visible: float | None
    """A true difference of this size would have been called with probability POWER."""
    called: bool
    """Whether adjusted_p is below alpha, and n is large enough."""


def paired(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of the differences of each pair; two pairs or more."""
    differences = [ours - theirs for ours, theirs in zip(variant, baseline, strict=True)]
    n = len(differences)
    return Estimate(statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n), float(n - 1))


def welch(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of two samples whose spreads may differ; two of each or more."""
    parts = [statistics.variance(each) / len(each) for each in (variant, baseline)]
    below = sum(part**2 for part in parts) / (len(variant) - 1)
    freedom = sum(parts) ** 2 / below if below else 2.0 * (len(variant) - 1)
    return Estimate(statistics.fmean(variant) - statistics.fmean(baseline), math.sqrt(sum(parts)), freedom)


TESTS: dict[Test, Callable[[Sequence[float], Sequence[float]], Estimate]] = {"paired-t": paired, "welch-t": welch}


def p_value(estimate: Estimate) -> float:
    """Two-sided, of Student's t; runs without any spread differ surely, or not at all."""
    if not estimate.error:
        return 1.0 if not estimate.mean else 0.0
    return 2 * float(special.stdtr(estimate.freedom, -abs(estimate.mean) / estimate.error))


def interval(estimate: Estimate, alpha: float) -> tuple[float, float]:
    """Where the true difference lies with confidence 1 - alpha."""
    half = float(special.stdtrit(estimate.freedom, 1 - alpha / 2)) * estimate.error
    return estimate.mean - half, estimate.mean + half


def smallest_visible(error: float, freedom: float, alpha: float, power: float = POWER) -> float:
    """The true difference that a two-sided test at `alpha` calls with probability `power`.

    The spread is taken for what was measured, so of a few runs this is as rough as their spread is.
    """
    return error * visible_errors(freedom, alpha, power)


@cache
def visible_errors(freedom: float, alpha: float, power: float) -> float:
    """The same in standard errors. scipy's noncentral t, which would say it directly, gives up on large shifts."""
    border = float(special.stdtrit(freedom, 1 - alpha / 2))
    places = (np.arange(SPREADS) + 0.5) / SPREADS
    spreads = np.sqrt(2 * special.gammaincinv(freedom / 2, places) / freedom)  # that runs may show, all equally likely

    def beyond(shift: float) -> float:
        called = special.ndtr(shift - border * spreads) + special.ndtr(-shift - border * spreads)
        return float(called.mean()) - power

    return float(optimize.root_scalar(beyond, bracket=(1e-9, 4 * border + 10)).root)


def holm(values: Sequence[float]) -> list[float]:
    """P values made larger, so that calling those below alpha is wrong about any of them with probability alpha.

    The smallest times their number, the next times one less, each at least the one before (Holm 1979).
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, least = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = least
    return adjusted


def differences(
    variants: dict[str, dict[int, float]], baseline: dict[int, float], test: Test = "paired-t", alpha: float = 0.05
) -> dict[str, Difference]:
    """Each variant's losses by seed held against the baseline's, on the seeds both have.

    The smallest visible difference is at alpha over the number of variants: what Holm asks of the first.
    """
    estimates: dict[str, Estimate | None] = {}
    common = {name: sorted(losses.keys() & baseline.keys()) for name, losses in variants.items()}
    for name, losses in variants.items():
        ours, theirs = [losses[seed] for seed in common[name]], [baseline[seed] for seed in common[name]]
        estimates[name] = TESTS[test](ours, theirs) if len(ours) > 1 else None
    known = {name: p_value(each) for name, each in estimates.items() if each is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    found = {}
    for name, estimate in estimates.items():
        n = len(common[name])
        if estimate is None:
            mean = variants[name][common[name][0]] - baseline[common[name][0]] if n else None
            found[name] = Difference(n, mean, None, None, None, None, None, False)
            continue
        visible = smallest_visible(estimate.error, estimate.freedom, alpha / len(known)) if n >= FEWEST else None
        called = n >= FEWEST and adjusted[name] < alpha
        low, high = interval(estimate, alpha)
        found[name] = Difference(n, estimate.mean, low, high, known[name], adjusted[name], visible, called)
    return found
