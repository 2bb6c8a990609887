"""Two arms against each other: paired differences at equal budgets, what may be concluded of them, and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan

from benchmarks.comparison.outcomes import AXES, END, ArmOutcome
from benchmarks.measuring.statistics import (
    SIGNIFICANCE,
    Interval,
    TimeRatio,
    holm,
    mean_estimate,
    probability_of_improvement,
    time_ratio,
)

MARGIN = 0.02  # of accuracy: differences within it are called equivalent
NO_TIMES = TimeRatio(Interval(nan, nan, nan), None, "no times")


@dataclass(frozen=True)
class Difference:
    """Two arms at an equal budget.

    Attributes:
        budget: iterations, rollout tokens or training seconds; the largest that all runs of both arms reached. None at
            the end of runs that do not say what they spent.
        difference: of greedy accuracy, 0 to 1, paired by question and by seed.
        p: two-sided, against a difference of zero.
        p_holm: the same, allowing for all arms that are compared with the baseline at equal budgets of this kind.
        p_equivalent: against a difference of the margin or more (two one-sided tests).
    """

    budget: float | None
    difference: Interval
    p: float
    p_holm: float
    p_equivalent: float

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``not distinguishable``, of this arm alone."""
        return self._verdict(self.p)

    @property
    def verdict_holm(self) -> str:
        """The same among all arms."""
        return self._verdict(self.p_holm)

    def _verdict(self, p: float) -> str:
        if not p < SIGNIFICANCE:
            return "not distinguishable"
        return "better" if self.difference.value > 0 else "worse"

    @property
    def equivalent(self) -> bool:
        """Whether the arms are equivalent within the margin."""
        return self.p_equivalent < SIGNIFICANCE


@dataclass(frozen=True)
class Pair:
    """An arm against a baseline, over the seeds that both have. The fields are those of results.json.

    Attributes:
        label, baseline: of the two arms.
        seeds: those in common.
        at_equal: axis (of ``AXES``, or ``END``) -> the arm's accuracy less the baseline's at an equal budget;
            results.json has each under the name of its axis.
        probability_of_improvement: chance that a run of the arm ends above a run of the baseline.
        speed_up_rollout: rollout tokens a second, the arm's over the baseline's; None where one of the two writes none.
        time_ratio: training seconds to an accuracy that both reach, the arm's over the baseline's.
        speed_up: training seconds of a run, the baseline's over the arm's; None where they were not taken.
    """

    label: str
    baseline: str
    seeds: list[int]
    at_equal: dict[str, Difference]
    probability_of_improvement: float
    speed_up_rollout: float | None
    time_ratio: TimeRatio
    speed_up: float | None


@dataclass(frozen=True)
class NoPair:
    """Two arms without a seed in common: nothing can be said of their difference."""

    label: str
    baseline: str
    seeds: tuple[()] = ()


def against(arm: ArmOutcome, baseline: ArmOutcome, margin: float = MARGIN, axes: Sequence[str] = AXES) -> Pair | NoPair:
    """Paired differences of an arm from the baseline at the largest budgets, on those of ``axes`` that both have, that
    all of their runs reached.

    The same seed deals the same problems to both and both are measured on the same questions, so differences are taken
    question by question and seed by seed.
    """
    seeds = [seed for seed in arm.seeds if seed in baseline.seeds]
    if not seeds:
        return NoPair(arm.label, baseline.label)
    ours, theirs = arm.of(seeds), baseline.of(seeds)

    def difference(axis: str) -> Difference:
        budget = None if axis == END else min(run.spent(axis)[-1] for run in (*arm.runs, *baseline.runs))
        one, other = (part.ends(-1) if budget is None else part.at(axis, budget) for part in (ours, theirs))
        estimate = mean_estimate(one - other)
        p = estimate.p_different
        return Difference(budget, estimate.interval().within(-1, 1), p, p, estimate.p_equivalent(margin))

    our_speed, their_speed = arm.tokens_per_second, baseline.tokens_per_second
    our_seconds, their_seconds = arm.over_runs("seconds"), baseline.over_runs("seconds")
    shared = tuple(axis for axis in axes if axis in arm.axes and axis in baseline.axes) or (END,)
    return Pair(
        label=arm.label,
        baseline=baseline.label,
        seeds=seeds,
        at_equal={axis: difference(axis) for axis in shared},
        probability_of_improvement=probability_of_improvement(ours.ends(-1).mean(1), theirs.ends(-1).mean(1)),
        speed_up_rollout=our_speed / their_speed if our_speed and their_speed else None,
        time_ratio=_time_ratio(ours, theirs) if "seconds" in shared else NO_TIMES,
        speed_up=their_seconds / our_seconds if our_seconds and their_seconds else None,
    )


def _time_ratio(ours: ArmOutcome, theirs: ArmOutcome) -> TimeRatio:
    our_curves, their_curves = ([(run.spent("seconds"), run.greedy) for run in one.runs] for one in (ours, theirs))
    return time_ratio(our_curves, their_curves)


def among_all(pairs: Sequence[Pair | NoPair]) -> tuple[Pair | NoPair, ...]:
    """The pairs with ``p_holm`` over all of them, on each axis apart: these are readings of one comparison."""
    whole = [pair for pair in pairs if isinstance(pair, Pair)]
    adjusted = {
        axis: iter(holm([pair.at_equal[axis].p for pair in whole if axis in pair.at_equal]))
        for axis in {axis for pair in whole for axis in pair.at_equal}
    }

    def among(pair: Pair) -> Pair:
        return replace(
            pair, at_equal={axis: replace(one, p_holm=next(adjusted[axis])) for axis, one in pair.at_equal.items()}
        )

    return tuple(among(pair) if isinstance(pair, Pair) else pair for pair in pairs)
