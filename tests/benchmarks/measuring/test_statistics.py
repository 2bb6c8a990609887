"""Statistics against closed forms, enumeration, scipy and published examples."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.measuring.statistics import (
    Components,
    Estimate,
    MeanSquares,
    at_budget,
    holm,
    interquartile_mean,
    mean_curve,
    mean_estimate,
    mean_interval,
    mean_squares,
    pass_at_k,
    probability_of_improvement,
    time_ratio,
    time_to_target,
)


def test_one_seed_is_a_t_interval_over_questions():
    right = np.random.default_rng(0).random(400) < 0.37
    theirs = stats.ttest_1samp(right.astype(float), 0).confidence_interval()
    ours = mean_interval(right)
    assert ours.value == right.mean() and (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert mean_interval(right[:, None]) == pytest.approx(ours)  # nor is one question another formula


def test_mean_squares_by_their_definition():
    """Against sums over cells, and the split of the total sum of squares."""
    table = np.random.default_rng(1).normal(size=(4, 7))
    grand = table.mean()
    by_seed, by_question, rest = mean_squares(table)
    sums = {"s": 0.0, "q": 0.0, "e": 0.0}
    for s in range(4):
        for q in range(7):
            seed, question = table[s].mean() - grand, table[:, q].mean() - grand
            sums["s"] += seed**2
            sums["q"] += question**2
            sums["e"] += (table[s, q] - grand - seed - question) ** 2
    assert (by_seed, by_question, rest) == pytest.approx((sums["s"] / 3, sums["q"] / 6, sums["e"] / 18))
    assert 3 * by_seed + 6 * by_question + 18 * rest == pytest.approx(((table - grand) ** 2).sum())


def test_error_is_unbiased_for_the_random_effects_variance():
    """outcome = seed effect + question effect + noise: Var(mean) = s_S^2/S + s_Q^2/Q + s_E^2/(SQ)."""
    rng = np.random.default_rng(3)
    seeds, questions, effects = 6, 50, (0.1, 0.3, 0.2)
    squared = [
        mean_estimate(
            effects[0] * rng.standard_normal((seeds, 1))
            + effects[1] * rng.standard_normal((1, questions))
            + effects[2] * rng.standard_normal((seeds, questions))
        ).error
        ** 2
        for _ in range(3000)
    ]
    wanted = effects[0] ** 2 / seeds + effects[1] ** 2 / questions + effects[2] ** 2 / (seeds * questions)
    assert np.mean(squared) == pytest.approx(wanted, rel=0.04)


def test_error_and_degrees_of_freedom_of_balanced_random_effects():
    """By hand: the variance of the mean is (MS_s + MS_q - MS_e) / SQ. Satterthwaite's degrees of freedom of a sum of
    mean squares are (sum)^2 / sum(square^2 / df); here of the seeds' alone, weighed by 1 + 12 / S^3."""
    seeds, questions = 5, 200
    mean, error, df = MeanSquares(2.0, 3.5, 1.0).estimate(0.1, seeds, questions)
    assert (mean, error) == (0.1, pytest.approx(np.sqrt(4.5 / 1000)))
    satterthwaite = 4.5**2 / (2.0**2 / 4)
    assert df == pytest.approx(satterthwaite / (1 + 12 / 125))
    assert MeanSquares(50.0, 1.0, 1.0).estimate(0, seeds, questions).df == 4  # the seeds' own, where they are all
    assert MeanSquares(1.0, 90.0, 1.0).estimate(0, seeds, questions).df == 199  # the questions'
    least = MeanSquares(0.1, 1.0, 1.0).estimate(0, seeds, questions)  # less than the questions alone can explain
    assert least.error == pytest.approx(np.sqrt(0.5 / 1000))


def test_components_and_the_width_that_they_foretell():
    """Of a large table the components are those that it was made with; widths at another size are those measured."""
    rng = np.random.default_rng(11)
    effects = (0.05, 0.2, 0.4)

    def table(seeds: int, questions: int) -> np.ndarray:
        shapes = ((seeds, 1), (1, questions), (seeds, questions))
        return sum(size * rng.standard_normal(shape) for size, shape in zip(effects, shapes, strict=True))

    parts = Components.of(table(200, 2000))
    assert parts == pytest.approx([size**2 for size in effects], rel=0.25)
    widths = [mean_interval(table(6, 150)) for _ in range(400)]
    assert parts.half_width(6, 150) == pytest.approx(np.mean([one.high - one.value for one in widths]), rel=0.15)


def test_seed_effects_alone_are_a_t_test_over_seeds():
    accuracy = np.random.default_rng(7).normal(0.6, 0.05, size=12)
    table = np.repeat(accuracy[:, None], 300, axis=1)
    theirs = stats.ttest_1samp(accuracy, 0).confidence_interval()
    ours = mean_interval(table)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_many_seeds_of_independent_answers_are_a_t_test_over_all():
    """Without effects of seeds and questions S * Q answers are so many independent ones."""
    table = (np.random.default_rng(1).random((60, 400)) < 0.4).astype(float)
    low, high = stats.ttest_1samp(table.ravel(), 0).confidence_interval()
    assert mean_interval(table) == pytest.approx((table.mean(), low, high), abs=0.15 * (high - low))


def test_two_seeds_that_differ_have_the_interval_of_two_numbers():
    """The seed effect alone and S = 2: m +- t_1 |a - b| / 2."""
    table = np.array([[0.4] * 50, [0.6] * 50])
    half = stats.t.ppf(0.975, 1) * 0.1
    assert mean_interval(table) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert mean_interval(table).within(0, 1) == (0.5, 0, 1)


@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_p_values_and_intervals_agree(seeds, questions, seed):
    """p < .05 where the interval excludes zero; equivalent where the 90 % interval lies within the margin."""
    rng = np.random.default_rng(seed)
    estimate = mean_estimate(rng.normal(rng.normal(0, 0.5), 1, size=(seeds, questions)))
    assert (estimate.p_different < 0.05) == estimate.interval().excludes_zero
    narrow, margin = estimate.interval(0.90), float(rng.uniform(0.05, 1.5))
    assert (estimate.p_equivalent(margin) < 0.05) == (-margin < narrow.low and narrow.high < margin)


def test_one_sided_p_values_are_scipys():
    x = np.random.default_rng(8).normal(0.3, 1, size=40)
    estimate = mean_estimate(x)
    assert estimate.p_above(0.1) == pytest.approx(stats.ttest_1samp(x, 0.1, alternative="greater").pvalue)
    assert estimate.p_different == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    two = [stats.ttest_1samp(x, bound, alternative=side).pvalue for bound, side in ((-0.7, "greater"), (0.7, "less"))]
    assert estimate.p_equivalent(0.7) == pytest.approx(max(two))
    mirrored = Estimate(-estimate.mean, estimate.error, estimate.df)
    assert mirrored.p_equivalent(0.7) == estimate.p_equivalent(0.7)


def test_holm_on_a_worked_example():
    """Sorted .005, .01, .03, .04: times 4, 3, 2, 1 is .02, .03, .06, .04, and none below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
@settings(max_examples=200, deadline=None)
def test_holm_declares_what_the_step_down_procedure_declares(p_values):
    declared, left = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
    for n, index in enumerate(left):
        if p_values[index] > 0.05 / (len(p_values) - n):
            break
        declared.add(index)
    assert {n for n, p in enumerate(holm(p_values)) if p <= 0.05 + 1e-12} == declared


def test_pairing_takes_the_questions_out():
    """Two arms whose outcomes differ on few questions: the paired error is far smaller than the unpaired ones."""
    rng = np.random.default_rng(4)
    ours = (rng.random((3, 400)) < rng.random(400)).astype(float)
    theirs = ours.copy()
    theirs[:, :8] = 1 - theirs[:, :8]
    unpaired = np.hypot(mean_estimate(ours).error, mean_estimate(theirs).error)
    assert mean_estimate(ours - theirs).error < unpaired / 2


@pytest.mark.parametrize("questions", [1, 2, 4, 6, 30, 152, 153, 1000])
def test_outcomes_all_alike_show_what_so_many_questions_can(questions):
    """By the binomial: so many questions miss a share p of others with a chance of (1 - p)^Q."""
    missed = 1 - 0.05 ** (1 / questions)
    two_sided = stats.binomtest(0, questions).proportion_ci(method="exact").high
    tables = [np.zeros((seeds, questions)) for seeds in (1, 2, 5) if seeds * questions > 1]
    rounded = np.tile([[0.1 + 0.2], [0.3]], questions) - 0.3
    signs = (-1.0) ** np.arange(questions)  # with their opposites: equal sums, though no answer is
    for table in (*tables, rounded, *([np.array([signs, -signs])] if questions > 1 else [])):
        same = mean_estimate(table)
        assert same.p_different == pytest.approx(1) and (same.p_equivalent(0.02) < 0.05) == (questions >= 153)
        assert same.p_equivalent(missed - 1e-9) >= 0.05 and same.interval().high >= two_sided - 1e-9
        assert same.interval().high == pytest.approx(max(two_sided, missed * 1.959964 / 1.644854))
    if questions > 1:
        better = mean_estimate(np.ones((1, questions)))
        assert (better.p_different < 0.05) == (questions >= 6) == better.interval().excludes_zero  # the sign test's
        accurate = mean_interval(np.ones((3, questions)), least=0).within(0, 1)
        assert accurate.high == 1 and accurate.low == pytest.approx(1 - same.interval().high)


def test_one_answer_that_differs_is_spread_enough():
    one = np.eye(1, 400)[0]
    assert mean_interval(one) == pytest.approx((1 / 400, *stats.ttest_1samp(one, 0).confidence_interval()))


def test_one_answer_has_no_interval_and_none_is_refused():
    alone = mean_estimate([[1.0]])
    assert np.isnan(alone.interval().low) and not alone.interval().excludes_zero
    assert not alone.p_different < 0.05 and not alone.p_equivalent(0.9) < 0.05
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


@pytest.mark.parametrize("spent", [[0, 100, 100], [100, 100, 100], [0, 0, 100], [0, 100, 100, 200]])
def test_at_budget_the_last_of_equal_budgets_counts(spent):
    """Iterations may cost no tokens, and what they taught counts."""
    outcomes = np.arange(len(spent))[:, None]
    for budget in set(spent):
        last = max(n for n, one in enumerate(spent) if one == budget)
        assert at_budget(budget, spent, outcomes) == [last]


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


def test_mean_curve_is_the_mean_at_each_time():
    spent, accuracy = mean_curve([([0, 10, 20], [0.2, 0.4, 0.4]), ([0, 5, 30], [0.0, 0.5, 0.75])])
    assert spent == [0, 5, 10, 20]
    assert accuracy == pytest.approx([0.1, (0.3 + 0.5) / 2, (0.4 + 0.55) / 2, (0.4 + 0.65) / 2])


def lines(ends: list[float], pace: float = 1.0, last: float = 0.8):
    """Curves that rise in a line from .2 and reach ``last`` at the times given."""
    return [([0, end / pace], [0.2, last]) for end in ends]


def test_time_ratio_against_a_jackknife_by_hand():
    """Lines from .2: the mean curve of both arms rises by .6 * mean(1 / end) a second, so times are harmonic means."""
    ours, theirs = [20.0, 25.0, 40.0, 50.0], [30.0, 36.0, 45.0, 60.0]

    def log_ratio(a: list[float], b: list[float]) -> float:
        return np.log(np.mean([1 / end for end in b]) / np.mean([1 / end for end in a]))

    left = [log_ratio(ours[:n] + ours[n + 1 :], theirs[:n] + theirs[n + 1 :]) for n in range(4)]
    error = np.sqrt(3 / 4 * sum((one - np.mean(left)) ** 2 for one in left))
    middle, half = log_ratio(ours, theirs), stats.t.ppf(0.975, 3) * error
    long_enough = ([([0, 100], [0.2, 0.2 + 0.6 * 100 / end]) for end in ends] for ends in (ours, theirs))
    measured = time_ratio(*long_enough)
    assert measured.missing == "" and measured.ratio == pytest.approx(np.exp([middle, middle - half, middle + half]))


def test_time_ratio_of_a_pace_is_exact_and_its_target_is_of_both():
    theirs = lines([30, 30, 30, 30])
    measured = time_ratio(lines([30, 30, 30, 30], pace=2.0), theirs)
    assert measured.ratio == pytest.approx((0.5, 0.5, 0.5)) and measured.target == pytest.approx(0.2 + 0.75 * 0.6)
    lower = time_ratio(lines([30, 30, 30, 30], last=0.6), theirs)
    assert lower.target == pytest.approx(0.2 + 0.75 * 0.4) and lower.ratio.value == pytest.approx(1.5)


@given(st.integers(0, 10**6), st.integers(4, 8))
@settings(max_examples=60, deadline=None)
def test_time_ratio_is_symmetric(seed, seeds):
    rng = np.random.default_rng(seed)

    def arm():
        spent = np.cumsum(rng.uniform(0.5, 2, size=(seeds, 6)), axis=1)
        rise = np.linspace(0.3, 0.7, 6) + rng.normal(0, 0.05, size=(seeds, 6))
        return list(zip(spent.tolist(), rise.tolist(), strict=True))

    ours, theirs = arm(), arm()
    one, other = time_ratio(ours, theirs), time_ratio(theirs, ours)
    mirrored = {"ours behind": "theirs behind", "theirs behind": "ours behind"}
    assert other.missing == mirrored.get(one.missing, one.missing) and other.target == one.target
    value, low, high = one.ratio
    assert other.ratio == pytest.approx((1 / value, 1 / high, 1 / low), nan_ok=True)


def test_what_is_missing_of_a_time_ratio_is_said():
    theirs = lines([30, 30, 30, 30])
    few = time_ratio(lines([30, 30, 30], pace=2.0), theirs[:3])
    assert few.missing == "few seeds" and few.ratio.value == pytest.approx(0.5) and np.isnan(few.ratio.low)
    behind = time_ratio(lines([30] * 4, last=0.45), theirs)
    assert behind.missing == "ours behind" and np.isnan(behind.ratio.value) and behind.target is None
    assert time_ratio(theirs, lines([30] * 4, last=0.1)).missing == "theirs behind"
    assert time_ratio(lines([30] * 4, last=0.2), lines([30] * 4, last=0.1)).missing == "no gain"
    leaning = [*lines([30] * 3, last=0.21), *lines([30], last=1.6)]  # without its last seed it gains next to nothing
    assert time_ratio(leaning, theirs).missing == "unsteady"
