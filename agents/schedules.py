"""Schedules of the learning rate: a warm-up, then a decay, as a factor of ``learning_rate``.

A schedule goes by the share of the run that is spent. Who trains knows that share: ``learn`` by tokens, a run of
``benchmarks.run`` by whichever of its budgets is nearest to its end. ``iterate()`` in a loop of one's own has no end,
so there a schedule that needs one has it as ``iterations``. Nothing is carried from iteration to iteration: a run that
resumes has the rates that it would have had, and so has ``learn`` of a loaded agent with the tokens that are left and
``reset_num_timesteps=False``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from registry import UsageError, schedules

Spent = Callable[[int, int], float]  # (iterations, tokens) -> the share of the run that they are, in [0, 1]


class Schedule(Protocol):
    """``iterations`` is the run's length where the schedule says it, ``needs_end`` whether it has to know one."""

    iterations: int | None

    @property
    def needs_end(self) -> bool: ...

    def __call__(self, iteration: int, begun: float, ended: float) -> float: ...


@dataclass(frozen=True)
class WarmUp:
    """A factor that rises linearly to 1 and then is ``decay``.

    Attributes:
        warmup: length of the rise: iterations from 1 on, below 1 a share of the run. The first iteration already
            learns, at 1 / warmup of the rate.
        iterations: the run's length, for a loop of one's own around ``iterate()``; else whoever trains knows it.
    """

    warmup: float = 0.0
    iterations: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < math.inf:
            raise UsageError(f"schedule: warmup={self.warmup} must be at least 0: iterations, or below 1 a share")
        if self.iterations is not None and self.iterations < 1:
            raise UsageError(f"schedule: iterations={self.iterations} must be at least 1")

    @property
    def needs_end(self) -> bool:
        """Whether the factor depends on where the run ends."""
        return 0 < self.warmup < 1

    def __call__(self, iteration: int, begun: float, ended: float) -> float:
        """The factor of an iteration (counted from 0) before which the share ``begun`` of the run was spent, and after
        which ``ended`` will be."""
        if self.warmup >= 1:
            if iteration < self.warmup:
                return min(1.0, (iteration + 1) / self.warmup)
            share = self.warmup * begun / iteration  # of iterations as long as those so far
        else:
            if begun < self.warmup:
                return min(1.0, ended / self.warmup)
            share = self.warmup
        return self.decay(min(1.0, (begun - share) / (1 - share)) if share < 1 else 1.0)

    def decay(self, spent: float) -> float:
        """The factor after the warm-up, of whose time the share ``spent`` is over."""
        raise NotImplementedError


@schedules.register("constant")
@dataclass(frozen=True)
class Constant(WarmUp):
    """The learning rate as it is, after a warm-up if there is one."""

    def decay(self, spent: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Decay(WarmUp):
    """A factor that falls from 1 to ``floor``, which it would reach one iteration after the last.

    Attributes:
        floor: what is left of the rate at the run's end, a share.
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise UsageError(f"schedule: floor={self.floor} must be in [0, 1], a share of the learning rate")

    @property
    def needs_end(self) -> bool:
        return True


@schedules.register("linear")
@dataclass(frozen=True)
class Linear(Decay):
    """Falls from the learning rate to ``floor`` of it in a straight line."""

    def decay(self, spent: float) -> float:
        return self.floor + (1 - self.floor) * (1 - spent)


@schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(Decay):
    """Falls from the learning rate to ``floor`` of it along half a cosine (SGDR, arXiv 1608.03983, eq. 5)."""

    def decay(self, spent: float) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * spent)) / 2


def run_length(schedule: Schedule, learning_rate: Any, spent: Spent | None) -> Spent | None:
    """How to tell the share of the run that is spent: by the schedule's own ``iterations``, else ``spent``.

    Raises:
        UsageError: neither says it, and the rate depends on it.
    """
    if schedule.iterations is not None:
        whole = schedule.iterations
        return lambda iterations, tokens: min(1.0, iterations / whole)
    if spent is None and (schedule.needs_end or callable(learning_rate)):
        what = "learning_rate is a function of the progress" if callable(learning_rate) else f"schedule={schedule!r}"
        raise UsageError(
            f"{what}, and iterate() alone does not know where the run ends: take learn(total_timesteps), or say it "
            "with schedule={'id': 'constant', 'iterations': N} (or 'linear', 'cosine')"
        )
    return spent
