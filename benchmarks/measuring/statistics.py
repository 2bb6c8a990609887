"""Statistics of comparisons: intervals over questions and seeds, many arms, robust means, pass@k, equal budgets.

Shape letters: S seeds, Q questions. An outcome is the share of right answers of a seed's model on a question, in
[0, 1]; 0 or 1 for one greedy completion. ``benchmarks.calibration`` simulates what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import gammaln

CONFIDENCE = 0.95
SIGNIFICANCE = 1 - CONFIDENCE
SHARE_OF_GAIN = 0.75  # of the gain that two arms share, where their times are compared
FEWEST_SEEDS = 4  # of an interval of times
TAILS = (SIGNIFICANCE, SIGNIFICANCE / 2)  # of a one-sided test, and of each side of an interval
ROUNDING = 1e-9  # a smaller error of a mean of outcomes is none

Curve = tuple[Sequence[float], Sequence[float]]


class Interval(NamedTuple):
    """An estimate and its confidence interval; what is not defined is nan."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of it."""
        return self.low > 0 or self.high < 0

    def within(self, least: float, most: float) -> Interval:
        """Its part that is possible."""
        return Interval(self.value, max(self.low, least), min(self.high, most))


class Estimate(NamedTuple):
    """A mean with its standard error, which is known to ``df`` degrees of freedom; the error of one number is nan."""

    mean: float
    error: float
    df: float

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """mean +- t_df * error."""
        half = float(stats.t.ppf((1 + confidence) / 2, self.df)) * self.error
        return Interval(self.mean, self.mean - half, self.mean + half)

    def p_above(self, bound: float) -> float:
        """One-sided p value against the hypothesis that the mean is at most ``bound``."""
        return float(stats.t.sf((self.mean - bound) / self.error, self.df))

    @property
    def p_different(self) -> float:
        """Two-sided p value against a mean of zero."""
        return min(1.0, 2 * Estimate(abs(self.mean), self.error, self.df).p_above(0.0))

    def p_equivalent(self, margin: float) -> float:
        """p value against a mean of at least ``margin`` from zero: the larger of two one-sided tests (TOST, Schuirmann,
        "A comparison of the two one-sided tests procedure and the power approach", 1987). Below .05 the 90 % interval
        lies within the margin."""
        return Estimate(-abs(self.mean), self.error, self.df).p_above(-margin)


class MeanSquares(NamedTuple):
    """Mean squares of an [S, Q] table: of its seeds, of its questions, and of what neither explains (two-way analysis
    of variance without replication). In expectation they are the rest's variance, plus Q times that of the seeds'
    effects in ``seeds`` and S times that of the questions' in ``questions``."""

    seeds: float
    questions: float
    rest: float

    def estimate(self, mean: float, seeds: int, questions: int) -> Estimate:
        """``mean`` of an [S, Q] table with these mean squares, whose seeds and questions are both random.

        The variance of the mean is (MS_s + MS_q - MS_rest) / (S Q), unbiased, at least MS_q / (2 S Q). Its degrees of
        freedom are Satterthwaite's ("An approximate distribution of estimates of variance components", 1946), with two
        changes that keep the coverage where seeds are few: the seeds' square alone counts, at 1 + 12 / S^3 times its
        weight, since with few seeds it is more often too small than too large, and there are at least S - 1. The floor
        and the weight are no theory: they were chosen among some twenty-five by simulation of normal outcomes.
        """
        total = max(self.seeds + self.questions - self.rest, self.questions / 2)
        df: float = questions - 1
        if self.seeds > 0:
            df = min(df, (seeds - 1) * max(1.0, (total / self.seeds) ** 2 / (1 + 12 / seeds**3)))
        return Estimate(mean, float(np.sqrt(total / (seeds * questions))), df)


class Components(NamedTuple):
    """Variances of an outcome: of its seed's effect, of its question's, and of what neither explains."""

    seeds: float
    questions: float
    rest: float

    @staticmethod
    def of(outcomes: ArrayLike) -> Components:
        """From the mean squares of [S, Q] outcomes; none is below zero."""
        squares, (seeds, questions) = mean_squares(outcomes), np.shape(outcomes)
        return Components(
            seeds=max(0.0, (squares.seeds - squares.rest) / questions),
            questions=max(0.0, (squares.questions - squares.rest) / seeds),
            rest=squares.rest,
        )

    def half_width(self, seeds: int, questions: int) -> float:
        """Of the 95 % interval of the mean of that many seeds and questions, at the expected mean squares."""
        expected = MeanSquares(self.rest + questions * self.seeds, self.rest + seeds * self.questions, self.rest)
        return expected.estimate(0.0, seeds, questions).interval().high


def mean_squares(outcomes: ArrayLike) -> MeanSquares:
    """Of [S, Q] outcomes, with S and Q at least 2."""
    table = np.asarray(outcomes, dtype=float)
    seeds, questions = table.shape
    by_seed, by_question = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    rest = table - by_seed - by_question + table.mean()
    return MeanSquares(
        seeds=questions * float(by_seed.var(ddof=1)),
        questions=seeds * float(by_question.var(ddof=1)),
        rest=float((rest**2).sum()) / ((seeds - 1) * (questions - 1)),
    )


def mean_estimate(outcomes: ArrayLike, least: float = -1.0) -> Estimate:
    """Mean of [S, Q] outcomes, for all seeds and questions like these.

    Both vary: every seed's model answers the same questions, so answers are not S * Q independent ones. With one seed
    the error knows of the questions alone. For a paired comparison give the differences of two arms' outcomes on equal
    seeds and questions. Outcomes without any spread are no certainty: their error is that of ``alike``.

    Args:
        outcomes: [S, Q], or [Q] of one seed.
        least: the least that an outcome can be, 0 of an accuracy and -1 of a difference; the most is 1.
    """
    table = np.atleast_2d(np.asarray(outcomes, dtype=float))
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"outcomes must be [seeds, questions] and not empty, not of shape {table.shape}")
    mean, (seeds, questions) = float(table.mean()), table.shape
    if table.size == 1:
        return Estimate(mean, float("nan"), float("nan"))
    if min(seeds, questions) == 1:
        spread = Estimate(mean, float(table.std(ddof=1)) / table.size**0.5, table.size - 1)
    else:
        spread = mean_squares(table).estimate(mean, seeds, questions)
    return spread if spread.error > ROUNDING else alike(mean, questions, least)


def alike(mean: float, questions: int, least: float) -> Estimate:
    """What Q questions show whose outcomes do not differ: no more than that others are rare.

    Q questions miss a share p of others with a chance of (1 - p)^Q, so p is below 1 - .05^(1/Q), near 3 / Q, with 95 %
    confidence (Clopper and Pearson, "The use of confidence or fiducial limits", 1934; Hanley and Lippman-Hand, "If
    nothing goes wrong, is everything all right?", 1983, the rule of three), and each may lie as far from the mean as
    outcomes go. The error is that of a normal estimate whose one-sided test at .05 and whose 95 % interval both allow
    for it.
    """
    farthest = max(1 - mean, mean - least)
    error = max((1 - tail ** (1 / questions)) / float(stats.norm.isf(tail)) for tail in TAILS)
    return Estimate(mean, farthest * error, float("inf"))


def mean_interval(outcomes: ArrayLike, least: float = -1.0) -> Interval:
    """Mean of [S, Q] outcomes with its 95 % interval over seeds and questions (see ``mean_estimate``)."""
    return mean_estimate(outcomes, least).interval()


def holm(p_values: Sequence[float]) -> list[float]:
    """p values that allow for their number: declared at .05, they make one false claim or more in at most 5 % of
    families (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.sort(p_values) * np.arange(len(order), 0, -1))
    return np.minimum(adjusted, 1.0).tolist()


def percentile_interval(value: float, resampled: ArrayLike) -> Interval:
    """``value`` with the middle 95 % of the same statistic of resampled data."""
    low, high = np.quantile(np.asarray(resampled), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
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
    """[Q] outcomes at a budget, between the evaluations ([N, Q] outcomes at N rising budgets ``spent``) by linear
    interpolation; the ends hold beyond them. Of several at one budget the last counts."""
    table, x = np.asarray(outcomes, dtype=float), np.asarray(spent, dtype=float)
    after = int(np.searchsorted(x, budget, side="right"))
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


class TimeRatio(NamedTuple):
    """The time that one arm takes to an accuracy over the time that another takes.

    Attributes:
        ratio: with its interval; nan what is not defined.
        target: the accuracy, 0 to 1; None where there is none.
        missing: what is not defined, and why; empty where nothing is missing.
    """

    ratio: Interval
    target: float | None = None
    missing: Literal["", "no times", "no gain", "ours behind", "theirs behind", "few seeds", "unsteady"] = ""


def mean_curve(runs: Sequence[Curve]) -> Curve:
    """Mean accuracy of runs, between whose evaluations lines are drawn, up to where the first of them ends."""
    end = min(spent[-1] for spent, _ in runs)
    x = np.unique([one for spent, _ in runs for one in spent if one <= end] + [end])
    return x.tolist(), np.mean([np.interp(x, spent, accuracy) for spent, accuracy in runs], axis=0).tolist()


def time_ratio(ours: Sequence[Curve], theirs: Sequence[Curve]) -> TimeRatio:
    """The time of our mean curve to an accuracy that both arms reach, over the time of theirs.

    Curves are (spent, accuracy) of S runs, ours and theirs paired by seed. The target is three quarters of the way from
    where the two mean curves begin to the lower of their two ends, so that neither arm is favoured: exchanged arms give
    the inverse. An arm that gains less than half of the other's gain does not come near enough to compare times. The
    interval is a jackknife over seeds of the log ratio, target included, with t(S - 1) (Tukey 1958; Efron and Stein,
    "The jackknife estimate of variance", 1981); there is none below four seeds.
    """
    nothing = float("nan")
    value, target, missing = _log_time_ratio(ours, theirs)
    if missing:
        return TimeRatio(Interval(nothing, nothing, nothing), None, missing)
    alone = Interval(float(np.exp(value)), nothing, nothing)
    count = len(ours)
    if count < FEWEST_SEEDS:
        return TimeRatio(alone, target, "few seeds")
    left = [_log_time_ratio([*ours[:n], *ours[n + 1 :]], [*theirs[:n], *theirs[n + 1 :]]) for n in range(count)]
    if any(why for _, _, why in left):
        return TimeRatio(alone, target, "unsteady")
    values = [one for one, _, _ in left]
    error = float(np.sqrt((count - 1) * np.var(values)))
    return TimeRatio(Interval(*np.exp(Estimate(value, error, count - 1).interval()).tolist()), target)


def _log_time_ratio(
    ours: Sequence[Curve], theirs: Sequence[Curve]
) -> tuple[float, float, Literal["", "no gain", "ours behind", "theirs behind"]]:
    """The log ratio, its target, and why there is none."""
    curves = [mean_curve(runs) for runs in (ours, theirs)]
    (our_gain, their_gain) = (accuracy[-1] - accuracy[0] for _, accuracy in curves)
    start = sum(accuracy[0] for _, accuracy in curves) / 2
    target = start + SHARE_OF_GAIN * (min(accuracy[-1] for _, accuracy in curves) - start)
    if 0 < max(our_gain, their_gain) > 2 * min(our_gain, their_gain):
        return 0.0, target, "ours behind" if our_gain < their_gain else "theirs behind"
    if any(accuracy[0] >= target for _, accuracy in curves):
        return 0.0, target, "no gain"
    needed = [time_to_target(target, *curve) for curve in curves]
    assert needed[0] is not None and needed[1] is not None  # at the latest at the end
    return float(np.log(needed[0] / needed[1])), target, ""
