"""What a few runs can tell: held to the textbook, to simulation, and to its own limits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from smolforge.comparison import statistics
from smolforge.comparison.statistics import compare_means, differences, holm, smallest_visible

POOL = json.loads((Path(__file__).parent / "fixtures" / "nano-losses.json").read_text())["validation_loss"]
LOSSES = st.floats(0.1, 12).map(lambda value: round(value, 4))
PAIRS = st.lists(st.tuples(LOSSES, LOSSES), min_size=3, max_size=12).filter(
    lambda pairs: (
        np.std([ours - theirs for ours, theirs in pairs]) > 1e-3
        and all(np.std(side) > 1e-3 for side in zip(*pairs, strict=True))
    )
)


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(float(value) for value in values))


def by_the_book(ours, theirs, test) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom, as a textbook has them."""
    n, mean = len(ours), np.mean(ours) - np.mean(theirs)
    if test == "paired-t":
        return mean, np.std(np.subtract(ours, theirs), ddof=1) / math.sqrt(n), n - 1
    parts = np.var([ours, theirs], axis=1, ddof=1) / n
    return mean, math.sqrt(parts.sum()), parts.sum() ** 2 / (parts**2 / (n - 1)).sum()


@pytest.mark.parametrize("test", ["paired-t", "welch-t"])
@given(PAIRS)
def test_t_tests_follow_the_textbook(test, pairs):
    ours, theirs = zip(*pairs, strict=True)
    mean, error, freedom = by_the_book(ours, theirs, test)
    found = compare_means(ours, theirs, test, alpha=0.1)
    assert found.mean == pytest.approx(mean, rel=1e-6, abs=1e-9)
    assert found.p == pytest.approx(2 * special.stdtr(freedom, -abs(mean) / error), rel=1e-6, abs=1e-12)
    half = special.stdtrit(freedom, 0.95) * error
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-6, abs=1e-9)
    assert found.smallest_visible == pytest.approx(smallest_visible(error, float(freedom), 0.1), rel=1e-6)


@given(PAIRS, st.floats(-3, 3))
def test_differences_ignore_a_common_shift(pairs, shift):
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    (found,) = differences({"a": by_seed(ours)}, by_seed(theirs)).values()
    (moved,) = differences({"a": by_seed(ours + shift)}, by_seed(theirs + shift)).values()
    (turned,) = differences({"a": by_seed(theirs)}, by_seed(ours)).values()
    assert moved.p == pytest.approx(found.p, rel=1e-4, abs=1e-9)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert found.called == (found.low > 0 or found.high < 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_equals_the_step_down_procedure(values):
    adjusted = holm(values)
    for alpha in (0.01, 0.05, 0.3):
        called, order = set(), sorted(range(len(values)), key=lambda index: values[index])
        for place, index in enumerate(order):
            if values[index] * (len(values) - place) >= alpha:
                break
            called.add(index)
        assert {index for index, each in enumerate(adjusted) if each < alpha} == called
    assert all(value <= each <= 1 for value, each in zip(values, adjusted, strict=True))


def test_holm_equals_hand_results():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


@pytest.mark.parametrize(("n", "alpha"), [(3, 0.05), (5, 0.05), (5, 0.025), (12, 0.05)])
def test_smallest_visible_has_80_percent_power(n, alpha):
    visible = smallest_visible(1 / math.sqrt(n), n - 1.0, alpha)
    drawn = np.random.default_rng(n).normal(visible, 1, (20_000, n))
    called = stats.ttest_1samp(drawn, 0, axis=1).pvalue < alpha
    assert called.mean() == pytest.approx(statistics.POWER, abs=0.012)


def test_smallest_visible_equals_gpower_and_scipy():
    """1.68 standard deviations of the differences, as G*Power has it; the noncentral t says the same."""
    assert smallest_visible(1 / math.sqrt(5), 4.0, 0.05) == pytest.approx(1.68, abs=0.005)
    for freedom in (4.0, 9.0, 30.0):
        shift, border = smallest_visible(1.0, freedom, 0.05), stats.t.ppf(0.975, freedom)
        assert stats.nct.sf(border, freedom, shift) == pytest.approx(statistics.POWER, abs=1e-3)


@pytest.mark.parametrize("test", ["paired-t", "welch-t"])
@pytest.mark.parametrize("n", [pytest.param(3, marks=pytest.mark.long), 5])
def test_differences_keep_the_false_positive_rate(test, n):
    """Studies whose variants are the same, of final losses of real nano runs. A test that is right at alpha calls
    10 of 200 in the mean, so of 200 a bound that chance exceeds once in a hundred times, and the rate of many.
    """
    draw, called = np.random.default_rng(0), []
    for _ in range(200 if test == "welch-t" else 3000):
        a, b = draw.choice(POOL, (2, n), replace=False)
        (found,) = differences({"b": by_seed(b)}, by_seed(a), test).values()
        called.append(found.called)
    assert sum(called[:200]) <= stats.binom.ppf(0.99, 200, 0.05)
    assert len(called) == 200 or np.mean(called) < 0.06


def test_differences_keep_the_error_rate_of_many_variants():
    draw, called = np.random.default_rng(0), 0
    for _ in range(200):
        a, *others = (by_seed(each) for each in draw.choice(POOL, (5, 4), replace=False))
        called += any(each.called for each in differences(dict(zip("bcde", others, strict=True)), a).values())
    assert called <= stats.binom.ppf(0.99, 200, 0.05)


def test_differences_need_enough_runs():
    none = differences({"a": {}}, {0: 1.0})["a"]
    assert (none.n, none.mean, none.p, none.called) == (0, None, None, False)
    one = differences({"a": {0: 2.0}}, {0: 1.0})["a"]
    assert (one.n, one.mean, one.low, one.p, one.called) == (1, 1.0, None, None, False)
    two = differences({"a": {0: 2.0, 1: 2.0}}, {0: 1.0, 1: 1.001})["a"]
    assert two.p < 0.01
    assert (two.called, two.smallest_visible) == (False, None)


def test_differences_skip_unpaired_seeds():
    found = differences({"a": {0: 2.0, 1: 3.0, 2: 4.5, 7: 9.0}}, {0: 1.0, 1: 1.5, 2: 2.0, 3: 0.0})["a"]
    assert found.n == 3
    assert found.mean == pytest.approx((1 + 1.5 + 2.5) / 3)


def test_differences_work_without_variance():
    """Two variants that compute the same are the same, and not a number that is none."""
    same, baseline = {0: 2.0, 1: 3.0, 2: 4.0}, {0: 2.0, 1: 3.0, 2: 4.0}
    found = differences({"same": same, "shifted": {seed: loss + 1 for seed, loss in same.items()}}, baseline)
    assert (found["same"].mean, found["same"].p, found["same"].called) == (0.0, 1.0, False)
    assert (found["shifted"].p, found["shifted"].called) == (0.0, True)
