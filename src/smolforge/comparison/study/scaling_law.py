"""What small sizes say of a larger one: a power law through some variants' means, held against others.

    metric = E + A / N^alpha

Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, equation 2) at one number of tokens D, so that E holds their
B / D^beta too; with E = 0 it is Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361, equation 1.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize

from smolforge.comparison.study.spec import LawSettings

NUM_DRAWS = 1000
"""Of the seeds, with replacement."""
Values = Float[np.ndarray, " n"]


class PowerLaw(NamedTuple):
    """E, A and alpha."""

    floor: float
    scale: float
    exponent: float

    def predict(self, sizes: Values) -> Values:
        return self.floor + self.scale * sizes**-self.exponent


@dataclass(frozen=True)
class Prediction:
    """Of a variant that the law was not fitted to."""

    name: str
    size: float
    predicted: float
    low: float
    high: float
    """Where the law would have put it with other draws of the seeds; whether the law holds is not in it."""
    measured: float
    missed_low: float
    missed_high: float
    """The same of what was measured minus what was predicted, whose mean is their difference."""


@dataclass(frozen=True)
class FittedLaw:
    """A law and what it said."""

    over: str
    power: PowerLaw
    exponents: tuple[float, float]
    floors: tuple[float, float]
    """Interval of each over draws of the seeds."""
    sizes: dict[str, float]
    fitted: list[str]
    seeds: list[int]
    """That every variant has a run of."""
    predictions: list[Prediction]


def fit_power_law(sizes: Values, means: Values, floor: float | Literal["fitted"]) -> PowerLaw:
    """Least squares in the logarithm of the metric; of a fitted floor anything from 0 to the lowest mean.

    A floor that is not below all means leaves nothing for a power to be: then all numbers are NaN.
    """
    if floor == "fitted":
        bounds = (0.0, float(means.min()) * (1 - 1e-6))
        optimum = optimize.minimize_scalar(squared_error, bounds=bounds, args=(sizes, means), options={"xatol": 1e-6})
        return fit_line(sizes, means, float(optimum.x))
    return fit_line(sizes, means, floor)


def fit_line(sizes: Values, means: Values, floor: float) -> PowerLaw:
    """The line of log(metric - floor) over log N."""
    if floor >= means.min():
        return PowerLaw(floor, np.nan, np.nan)
    slope, start = np.polyfit(np.log(sizes), np.log(means - floor), 1)
    return PowerLaw(floor, float(np.exp(start)), float(-slope))


def squared_error(floor: float, sizes: Values, means: Values) -> float:
    """How far a floor's best law is from the means."""
    return float(((np.log(fit_line(sizes, means, floor).predict(sizes)) - np.log(means)) ** 2).sum())


def fit_law(
    law: LawSettings, sizes: Mapping[str, float], values: Mapping[str, Mapping[int, float]], *, alpha: float
) -> FittedLaw | None:
    """Fit and predict, on the seeds that every variant finished; None where there is none, or no law with its floor."""
    names = list(sizes)
    seeds = sorted(set.intersection(*(set(values[name]) for name in names)))
    losses = np.array([[values[name][seed] for seed in seeds] for name in names])
    fitted = [name for name in names if name not in law.predicted]
    is_fitted = np.array([name in fitted for name in names])
    x = np.array([float(sizes[name]) for name in names])
    if not seeds or not np.isfinite((power := fit_power_law(x[is_fitted], losses[is_fitted].mean(1), law.floor)).scale):
        return None
    rng = np.random.default_rng(0)
    mean_draws = [losses[:, rng.integers(len(seeds), size=len(seeds))].mean(1) for _ in range(NUM_DRAWS)]
    powers = [fit_power_law(x[is_fitted], means[is_fitted], law.floor) for means in mean_draws]
    predicted_draws = np.array([power_law.predict(x) for power_law in powers])
    ends = [100 * alpha / 2, 100 * (1 - alpha / 2)]
    low, high = np.nanpercentile(predicted_draws, ends, axis=0)
    gap_low, gap_high = np.nanpercentile(np.array(mean_draws) - predicted_draws, ends, axis=0)
    measured, predicted = losses.mean(1), power.predict(x)
    columns = zip(names, x, predicted, low, high, measured, gap_low, gap_high, strict=True)
    predictions = [Prediction(name, *map(float, numbers)) for name, *numbers in columns if name in law.predicted]
    exponents = percentile_interval([power_law.exponent for power_law in powers], ends)
    floors = percentile_interval([power_law.floor for power_law in powers], ends)
    return FittedLaw(law.over, power, exponents, floors, dict(sizes), fitted, seeds, predictions)


def percentile_interval(values: list[float], ends: list[float]) -> tuple[float, float]:
    low, high = np.nanpercentile(values, ends)
    return float(low), float(high)
