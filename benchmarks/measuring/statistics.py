"""Statistics of comparisons: intervals that respect questions and seeds, robust means, pass@k, equal budgets.

Shape letters: S seeds, Q questions. An outcome is the share of right answers of a seed's model on a question, in
[0, 1]; 0 or 1 for one greedy completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import gammaln

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHUNK = 500  # resamples at a time, to bound memory


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of it."""
        return self.low > 0 or self.high < 0


def mean_interval(outcomes: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of [S, Q] outcomes with a percentile bootstrap interval over both factors.

    Questions and seeds are resampled independently of each other (Owen, "The pigeonhole bootstrap", Annals of Applied
    Statistics 2007), since every seed's model answers the same questions: resampling single answers would take S
    answers to one question for S independent ones. Of n units n - 1 are drawn (Rao and Wu, JASA 1988), which makes
    the variance of a mean unbiased for few units; with two seeds the ordinary bootstrap would halve it. With one seed
    the interval knows of the questions alone.

    For a paired comparison give the differences of two arms' outcomes on equal seeds and questions.
    """
    table = np.atleast_2d(np.asarray(outcomes, dtype=float))
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"outcomes must be [seeds, questions] and not empty, not of shape {table.shape}")
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        by_seed, by_question = (resampled_weights(n, count, rng) for n in table.shape)
        means.append(((by_seed @ table) * by_question).sum(1))
    return percentile_interval(table.mean(), np.concatenate(means))


def percentile_interval(
    value: float, resampled: ArrayLike, method: Literal["linear", "nearest"] = "linear"
) -> Interval:
    """``value`` with the middle 95 % of the same statistic of resampled data; ``nearest`` where some are infinite."""
    low, high = np.quantile(np.asarray(resampled), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method=method)
    return Interval(float(value), float(low), float(high))


def resampled_weights(units: int, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """[count, units] weights of resampled units; each row sums to 1."""
    drawn = max(1, units - 1)
    chosen = rng.integers(units, size=(count, drawn)) + units * np.arange(count)[:, None]
    return np.bincount(chosen.ravel(), minlength=units * count).reshape(count, units) / drawn


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of the runs' scores (Agarwal et al., "Deep RL at the edge of the statistical precipice",
    2021): less moved by one odd run than the mean, less wasteful than the median."""
    return float(stats.trim_mean(np.asarray(scores, dtype=float), 0.25, axis=None))


def probability_of_improvement(ours: ArrayLike, theirs: ArrayLike) -> float:
    """P(X > Y) + P(X = Y) / 2 for a run X of ``ours`` and an independent run Y of ``theirs`` (Agarwal et al. 2021):
    the Mann-Whitney U statistic over the number of pairs."""
    x, y = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    return float(stats.mannwhitneyu(x, y, alternative="greater").statistic / (x.size * y.size))


def pass_at_k(right: ArrayLike, samples: int, k: int) -> NDArray[np.float64]:
    """Unbiased estimate of the chance that at least one of k completions is right: 1 - C(n - c, k) / C(n, k) for c
    right ones of n (Chen et al., "Evaluating large language models trained on code", 2021, equation 1).

    Args:
        right: any shape, how many of the completions of a question are right.
        samples: n, completions a question.
        k: at most n.
    """
    c = np.asarray(right, dtype=float)
    if not 1 <= k <= samples or (c < 0).any() or (c > samples).any():
        raise ValueError(f"pass@{k} of {samples} samples with 0 <= right <= samples is needed")
    wrong = np.maximum(samples - c, k)  # with fewer than k wrong ones the chance is 1, set below
    log_none = gammaln(wrong + 1) - gammaln(wrong - k + 1) - gammaln(samples + 1) + gammaln(samples - k + 1)
    return np.where(samples - c < k, 1.0, -np.expm1(log_none))


def at_budget(budget: float, spent: Sequence[float], outcomes: ArrayLike) -> NDArray[np.float64]:
    """[Q] outcomes at a budget, between the evaluations ([N, Q] outcomes at N increasing budgets ``spent``) by linear
    interpolation; the ends hold beyond them."""
    table, x = np.asarray(outcomes, dtype=float), np.asarray(spent, dtype=float)
    after = int(np.searchsorted(x, budget))
    if after == 0:
        return table[0]
    if after == len(x):
        return table[-1]
    share = (budget - x[after - 1]) / (x[after] - x[after - 1])
    return (1 - share) * table[after - 1] + share * table[after]


def time_to_target(target: float, spent: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """The first budget at which the curve reaches ``target``, by linear interpolation; None if it never does."""
    for n, value in enumerate(accuracy):
        if value >= target:
            if n == 0 or value == accuracy[n - 1]:
                return float(spent[n])
            share = (target - accuracy[n - 1]) / (value - accuracy[n - 1])
            return float(spent[n - 1] + share * (spent[n] - spent[n - 1]))
    return None


def time_ratio(
    ours: Sequence[tuple[Sequence[float], Sequence[float]]],
    theirs: Sequence[tuple[Sequence[float], Sequence[float]]],
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Seconds until our mean curve reaches the accuracy that theirs ends with, over the seconds that theirs takes to.

    Curves are (spent, accuracy) of S runs, ours and theirs paired by seed; a mean curve takes the n-th evaluation of
    all runs together, as far as the shortest goes. The interval resamples seeds, as ``mean_interval`` does. Infinite
    where ours never gets there.
    """
    arms = []
    for runs in (ours, theirs):
        shortest = min(len(spent) for spent, _ in runs)
        arms.append(np.array([[spent[:shortest], accuracy[:shortest]] for spent, accuracy in runs], dtype=float))

    def ratio(weights: NDArray[np.float64]) -> float:
        (our_spent, our_accuracy), (their_spent, their_accuracy) = (np.tensordot(weights, arm, 1) for arm in arms)
        target = float(their_accuracy[-1])
        needed = time_to_target(target, our_spent.tolist(), our_accuracy.tolist())
        theirs_needed = time_to_target(target, their_spent.tolist(), their_accuracy.tolist())
        assert theirs_needed is not None  # at the latest at its end
        return np.inf if needed is None else needed / theirs_needed if theirs_needed > 0 else np.nan

    count = len(ours)
    weights = resampled_weights(count, resamples, np.random.default_rng(seed))
    return percentile_interval(ratio(np.full(count, 1 / count)), [ratio(one) for one in weights], "nearest")
