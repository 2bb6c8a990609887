"""Statistics against closed forms, enumeration, scipy and published examples."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.measuring.statistics import (
    at_budget,
    interquartile_mean,
    mean_interval,
    pass_at_k,
    probability_of_improvement,
    time_ratio,
    time_to_target,
)


def width(interval) -> float:
    """Standard error that a normal interval of that width has."""
    return (interval.high - interval.low) / (2 * stats.norm.ppf(0.975))


def test_one_seed_has_the_standard_error_of_a_mean():
    right = np.random.default_rng(0).random(400) < 0.37
    found = mean_interval(right)
    assert found.value == right.mean()
    assert width(found) == pytest.approx(right.std(ddof=1) / np.sqrt(400), rel=0.03)


def test_agrees_with_scipy_bootstrap_on_questions():
    right = (np.random.default_rng(1).random(300) < 0.6).astype(float)
    theirs = stats.bootstrap((right,), np.mean, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    ours = mean_interval(right)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.008)


def test_two_factor_variance_against_the_random_effects_closed_form():
    """outcome = seed effect + question effect + noise: Var(mean) = s_S^2/S + s_Q^2/Q + s_E^2/(SQ)."""
    rng = np.random.default_rng(3)
    seeds, questions, effects = 12, 200, (0.05, 0.3, 0.1)
    tables = [
        effects[0] * rng.standard_normal((seeds, 1))
        + effects[1] * rng.standard_normal((1, questions))
        + effects[2] * rng.standard_normal((seeds, questions))
        for _ in range(40)
    ]
    found = np.mean([width(mean_interval(table, resamples=1000)) ** 2 for table in tables])
    wanted = effects[0] ** 2 / seeds + effects[1] ** 2 / questions + effects[2] ** 2 / (seeds * questions)
    assert found == pytest.approx(wanted, rel=0.15)


def test_two_seeds_do_not_halve_the_variance():
    """With the seed effect alone and S = 2 the variance of the mean is (a - b)^2 / 4, not / 8."""
    table = np.array([[0.4] * 50, [0.6] * 50])
    rng_mean = mean_interval(table)
    assert (rng_mean.low, rng_mean.high) == (pytest.approx(0.4), pytest.approx(0.6))


def test_pairing_takes_the_questions_out():
    """Two arms whose outcomes differ on few questions: the paired interval is far narrower than the unpaired ones."""
    rng = np.random.default_rng(4)
    ours = (rng.random((3, 400)) < rng.random(400)).astype(float)
    theirs = ours.copy()
    theirs[:, :8] = 1 - theirs[:, :8]
    paired = mean_interval(ours - theirs)
    unpaired = np.hypot(width(mean_interval(ours)), width(mean_interval(theirs)))
    assert width(paired) < unpaired / 2


def test_coverage_is_near_nominal_for_questions():
    rng = np.random.default_rng(5)
    held = [(i := mean_interval(rng.random((1, 200)) < 0.3, resamples=1000)).low <= 0.3 <= i.high for _ in range(300)]
    assert 0.91 <= np.mean(held) <= 0.985


def test_equal_outcomes_give_a_point_and_do_not_exclude_zero():
    found = mean_interval(np.zeros((2, 10)))
    assert found == (0.0, 0.0, 0.0) and not found.excludes_zero


def test_interval_is_deterministic_and_refuses_nothing():
    table = np.random.default_rng(6).random((2, 30))
    assert mean_interval(table) == mean_interval(table)
    with pytest.raises(ValueError, match="not empty"):
        mean_interval(np.zeros((0, 3)))


def test_interquartile_mean_of_known_numbers():
    assert interquartile_mean([0, 1, 2, 3, 4, 5, 6, 100]) == pytest.approx(np.mean([2, 3, 4, 5]))
    assert interquartile_mean([0.25, 0.75]) == 0.5


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
@settings(max_examples=400, deadline=None)
def test_probability_of_improvement_counts_pairs(ours, theirs):
    pairs = [(x > y) + 0.5 * (x == y) for x in ours for y in theirs]
    assert probability_of_improvement(ours, theirs) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_by_enumeration(samples):
    """The share of all subsets of k completions with a right one among them."""
    for right in range(samples + 1):
        outcomes = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            wanted = np.mean([any(chosen) for chosen in combinations(outcomes, k)])
            assert pass_at_k(right, samples, k) == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_matches_the_published_product_and_is_unbiased():
    def published(n: int, c: int, k: int) -> float:  # Chen et al. 2021, figure 3, as a formula
        return 1.0 if n - c < k else 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))

    assert pass_at_k(13, 200, 100) == pytest.approx(published(200, 13, 100))
    p, n, k = 0.3, 10, 4
    counts = np.arange(n + 1)
    assert stats.binom.pmf(counts, n, p) @ pass_at_k(counts, n, k) == pytest.approx(1 - (1 - p) ** k)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(1, 4, 5)


def test_at_budget_interpolates_between_evaluations():
    outcomes = [[0, 0], [1, 0], [1, 1]]
    spent = [0.0, 10.0, 30.0]
    assert at_budget(10, spent, outcomes).tolist() == [1, 0]
    assert at_budget(5, spent, outcomes).tolist() == [0.5, 0]
    assert at_budget(25, spent, outcomes).tolist() == pytest.approx([1, 0.75])
    assert at_budget(99, spent, outcomes).tolist() == [1, 1] and at_budget(-1, spent, outcomes).tolist() == [0, 0]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0, 1))
@settings(max_examples=400, deadline=None)
def test_time_to_target_is_the_first_crossing(accuracy, target):
    spent = list(np.arange(len(accuracy)) * 10.0)
    found = time_to_target(target, spent, accuracy)
    fine = np.sort([*np.linspace(0, spent[-1], 4001), *spent])
    reached = fine[np.interp(fine, spent, accuracy) >= target]
    if found is None:
        assert not len(reached)
    elif len(reached):
        assert found == pytest.approx(reached[0], abs=spent[-1] / 4000 + 1e-9)


def test_time_ratio_of_mean_curves():
    theirs = [([0, 10, 20, 30], [0.2, 0.4, 0.6, 0.8]), ([0, 10, 20, 30], [0.2, 0.3, 0.4, 0.6])]  # mean ends at 0.7
    twice = [([0, 5, 10, 15, 20], [*accuracy, 0.9]) for _, accuracy in theirs]
    found = time_ratio(twice, theirs)
    assert found == pytest.approx((0.5, 0.5, 0.5))
    above = [([0, 10, 20], [0.1, 0.2, 0.8]), ([0, 10, 20], [0.2, 0.5, 0.7])]  # mean reaches 0.7 at 10 + 10 * 0.35 / 0.4
    found = time_ratio(above, theirs)
    assert found.value == pytest.approx(18.75 / 30) and found.low < found.value < found.high
    assert np.isinf(time_ratio([([0, 30], [0.2, 0.5])] * 2, theirs).value)
    early = [([0, 10, 20], [0.2, 0.7, 0.7])]  # reaches what it ends with at 10
    assert time_ratio(early, early).value == 1 and time_ratio([([0, 20], [0.2, 0.7])], early).value == 2
