"""What a few runs can tell: a difference, how sure it is, and how small a one they could have seen.

    losses by seed, of a variant and of the baseline -> scipy's t test -> interval, p value, smallest visible difference

The test is named before anything is looked at. `paired-t` takes the difference of each seed, whose runs share initial
weights and the order of the data; `welch-t` does not use that the seeds are the same.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from scipy import special, stats

Test = Literal["paired-t", "welch-t"]
TESTS: dict[Test, Callable[..., Any]] = {
    "paired-t": stats.ttest_rel,
    "welch-t": partial(stats.ttest_ind, equal_var=False),
}
POWER = 0.8
"""How likely the smallest visible difference would have been called."""
MIN_PAIRS = 3
"""Of fewer pairs a spread is a guess, so nothing is called."""


@dataclass(frozen=True)
class MeanDifference:
    """A variant minus the baseline; what so few runs cannot tell is None."""

    n: int
    """Pairs of runs."""
    mean: float | None
    low: float | None = None
    high: float | None = None
    """Confidence interval of the mean, for this difference by itself."""
    p: float | None = None
    """Two-sided."""
    adjusted_p: float | None = None
    """After Holm, where several variants are held against one baseline."""
    smallest_visible: float | None = None
    """A true difference of this size would have been called with probability POWER."""
    called: bool = False
    """Whether adjusted_p is below alpha, and n is large enough."""


def compare_means(
    ours: Sequence[float], theirs: Sequence[float], test: Test = "paired-t", *, alpha: float = 0.05, tests: int = 1
) -> MeanDifference:
    """Hold runs against as many others, one of several `tests`, by which alpha is divided for what is visible.

    Runs without any spread differ surely, or not at all.
    """
    n = len(ours)
    mean = statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True)) if n else None
    if mean is None or n < 2:
        return MeanDifference(n, mean)
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):  # scipy's, of runs without spread
        result = TESTS[test](ours, theirs)
        low, high = map(float, result.confidence_interval(1 - alpha))
    p, error = float(result.pvalue), (high - low) / 2 / float(stats.t.ppf(1 - alpha / 2, result.df))
    if math.isnan(p):
        p, low, high, error = float(not mean), mean, mean, 0.0
    visible = error and smallest_visible(error, float(result.df), alpha / tests)
    return MeanDifference(n, mean, low, high, p, smallest_visible=visible if n >= MIN_PAIRS else None)


def smallest_visible(error: float, df: float, alpha: float, *, power: float = POWER) -> float:
    """Return the true difference that a two-sided test at `alpha` calls with probability `power`.

    Solves the noncentral t distribution for its shift; its other side, which a true difference hardly reaches, is left
    out. The spread is taken for what was measured, so of a few runs this is as rough as their spread is.
    """
    return error * float(special.nctdtrinc(df, 1 - power, stats.t.ppf(1 - alpha / 2, df)))


def holm(values: Sequence[float]) -> list[float]:
    """P values made larger, so that calling those below alpha is wrong about any of them with probability alpha.

    The smallest times their number, the next times one less, each at least the one before (Holm 1979).
    """
    order, adjusted = np.argsort(values), np.empty(len(values))
    factors = np.arange(len(values), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, factors * np.asarray(values)[order]))
    return adjusted.tolist()


def differences(
    variants: dict[str, dict[int, float]], baseline: dict[int, float], test: Test = "paired-t", *, alpha: float = 0.05
) -> dict[str, MeanDifference]:
    """Each variant's losses by seed held against the baseline's, on the seeds both have.

    The smallest visible difference is at alpha over the number of variants: what Holm asks of the first.
    """
    seeds = {name: sorted(losses.keys() & baseline.keys()) for name, losses in variants.items()}
    tests = sum(len(shared) > 1 for shared in seeds.values())
    results = {
        name: compare_means(
            [variants[name][seed] for seed in shared],
            [baseline[seed] for seed in shared],
            test,
            alpha=alpha,
            tests=tests,
        )
        for name, shared in seeds.items()
    }
    p_values = {name: result.p for name, result in results.items() if result.p is not None}
    for name, adjusted in zip(p_values, holm(list(p_values.values())), strict=True):
        called = results[name].n >= MIN_PAIRS and adjusted < alpha
        results[name] = replace(results[name], adjusted_p=adjusted, called=called)
    return results
