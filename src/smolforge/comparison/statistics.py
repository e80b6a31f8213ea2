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
MIN_PAIRS = 3
"""Of fewer pairs a spread is a guess, so nothing is called."""
NUM_SPREADS = 2000
"""That a power is the mean over."""


class Estimate(NamedTuple):
    """A mean difference, as every t test has it."""

    mean: float
    error: float
    """Its standard error."""
    freedom: float
    """Degrees of freedom of that."""


@dataclass(frozen=True)
class MeanDifference:
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


def paired_t(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of the differences of each pair; two pairs or more."""
    differences = [variant_loss - baseline_loss for variant_loss, baseline_loss in zip(variant, baseline, strict=True)]
    n = len(differences)
    return Estimate(statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n), float(n - 1))


def welch_t(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of two samples whose spreads may differ; two of each or more."""
    parts = [statistics.variance(losses) / len(losses) for losses in (variant, baseline)]
    denominator = sum(part**2 for part in parts) / (len(variant) - 1)
    df = sum(parts) ** 2 / denominator if denominator else 2.0 * (len(variant) - 1)
    return Estimate(statistics.fmean(variant) - statistics.fmean(baseline), math.sqrt(sum(parts)), df)


TESTS: dict[Test, Callable[[Sequence[float], Sequence[float]], Estimate]] = {"paired-t": paired_t, "welch-t": welch_t}


def p_value(estimate: Estimate) -> float:
    """Two-sided, of Student's t; runs without any spread differ surely, or not at all."""
    if not estimate.error:
        return 1.0 if not estimate.mean else 0.0
    return 2 * float(special.stdtr(estimate.freedom, -abs(estimate.mean) / estimate.error))


def confidence_interval(estimate: Estimate, alpha: float) -> tuple[float, float]:
    """Where the true difference lies with confidence 1 - alpha."""
    half = float(special.stdtrit(estimate.freedom, 1 - alpha / 2)) * estimate.error
    return estimate.mean - half, estimate.mean + half


def smallest_visible(error: float, df: float, alpha: float, *, power: float = POWER) -> float:
    """The true difference that a two-sided test at `alpha` calls with probability `power`.

    The spread is taken for what was measured, so of a few runs this is as rough as their spread is.
    """
    return error * visible_errors(df, alpha, power)


@cache
def visible_errors(df: float, alpha: float, power: float) -> float:
    """The same in standard errors. scipy's noncentral t, which would say it directly, gives up on large shifts."""
    critical_t = float(special.stdtrit(df, 1 - alpha / 2))
    quantiles = (np.arange(NUM_SPREADS) + 0.5) / NUM_SPREADS
    spreads = np.sqrt(2 * special.gammaincinv(df / 2, quantiles) / df)  # that runs may show, all equally likely

    def power_excess(shift: float) -> float:
        called = special.ndtr(shift - critical_t * spreads) + special.ndtr(-shift - critical_t * spreads)
        return float(called.mean()) - power

    return float(optimize.root_scalar(power_excess, bracket=(1e-9, 4 * critical_t + 10)).root)


def holm(values: Sequence[float]) -> list[float]:
    """P values made larger, so that calling those below alpha is wrong about any of them with probability alpha.

    The smallest times their number, the next times one less, each at least the one before (Holm 1979).
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, running_max = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        running_max = max(running_max, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = running_max
    return adjusted


def differences(
    variants: dict[str, dict[int, float]], baseline: dict[int, float], test: Test = "paired-t", *, alpha: float = 0.05
) -> dict[str, MeanDifference]:
    """Each variant's losses by seed held against the baseline's, on the seeds both have.

    The smallest visible difference is at alpha over the number of variants: what Holm asks of the first.
    """
    estimates: dict[str, Estimate | None] = {}
    seeds_in_both = {name: sorted(losses.keys() & baseline.keys()) for name, losses in variants.items()}
    for name, losses in variants.items():
        variant_losses, baseline_losses = (
            [losses[seed] for seed in seeds_in_both[name]],
            [baseline[seed] for seed in seeds_in_both[name]],
        )
        estimates[name] = TESTS[test](variant_losses, baseline_losses) if len(variant_losses) > 1 else None
    p_values = {name: p_value(estimate) for name, estimate in estimates.items() if estimate is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    results = {}
    for name, estimate in estimates.items():
        n = len(seeds_in_both[name])
        if estimate is None:
            mean = variants[name][seeds_in_both[name][0]] - baseline[seeds_in_both[name][0]] if n else None
            results[name] = MeanDifference(n, mean, None, None, None, None, None, False)
            continue
        visible = smallest_visible(estimate.error, estimate.freedom, alpha / len(p_values)) if n >= MIN_PAIRS else None
        called = n >= MIN_PAIRS and adjusted[name] < alpha
        low, high = confidence_interval(estimate, alpha)
        results[name] = MeanDifference(n, estimate.mean, low, high, p_values[name], adjusted[name], visible, called)
    return results
