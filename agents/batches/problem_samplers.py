"""Which problems the next batch holds: an axis of its own, apart from which layers write the completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from registry import UsageError, problem_samplers


class ProblemSampler(Protocol):
    """``size`` is None for an unlimited source. ``observe`` hears each problem's success rate under the rollout."""

    def sample(self, count: int, size: int | None, rng: np.random.Generator) -> NDArray[np.int64]: ...

    def observe(self, problems: Sequence[int], success: NDArray[np.float64], group_size: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@problem_samplers.register("uniform")
@dataclass(frozen=True)
class UniformProblems:
    """Every problem with the same chance, none twice in a batch while the source is large enough."""

    def sample(self, count: int, size: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
        """[count] problem indices."""
        if size is None:
            return rng.integers(2**31, size=count)
        return rng.choice(size, size=count, replace=count > size)

    def observe(self, problems: Sequence[int], success: NDArray[np.float64], group_size: int) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


@problem_samplers.register("curriculum")
@dataclass(frozen=True)
class Curriculum:
    """An adaptive curriculum: problems whose success rate is likely near ``target``, so that few advantages are zero.

    Each problem of a pool has a Beta posterior of its success rate, discounted towards the prior as the model moves;
    a batch is Thompson-sampled: draw a rate for every problem and take the nearest to ``target``. After Qu et al.,
    "Can Prompt Difficulty be Online Predicted for Accelerating RL Finetuning of Reasoning Models?" (MoPPS,
    arXiv 2507.04632).

    Attributes:
        target: the wanted success rate; one half has the largest reward variance.
        discount: what a posterior's evidence keeps after each observation of the batch it is in, in (0, 1].
        pool: how many problems of an unlimited source are candidates (indices 0..pool-1); of a finite one all are.
        explore: share of the batch drawn uniformly.
    """

    target: float = 0.5
    discount: float = 0.9
    pool: int = 4096
    explore: float = 0.1
    _evidence: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and 0 < self.discount <= 1 and 0 <= self.explore <= 1 and self.pool > 0):
            raise UsageError(
                f"curriculum: target={self.target} must be in (0, 1), discount={self.discount} in (0, 1], "
                f"explore={self.explore} in [0, 1] and pool={self.pool} positive"
            )

    def sample(self, count: int, size: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
        """[count] problem indices."""
        pool = self.pool if size is None else size
        alpha, beta = np.ones(pool), np.ones(pool)
        for problem, (right, wrong) in self._evidence.items():
            if problem < pool:  # what was learned with a larger one stays
                alpha[problem] += right
                beta[problem] += wrong
        distance = np.abs(rng.beta(alpha, beta) - self.target)
        order = np.argsort(distance, kind="stable")
        chosen = order[np.arange(count) % pool]
        uniform = rng.random(count) < self.explore
        chosen[uniform] = rng.integers(pool, size=int(uniform.sum()))
        return chosen.astype(np.int64)

    def observe(self, problems: Sequence[int], success: NDArray[np.float64], group_size: int) -> None:
        """Discount what was known of these problems and add the batch's right and wrong completions."""
        for problem, rate in zip(problems, success, strict=True):
            right, wrong = self._evidence.get(int(problem), [0.0, 0.0])
            self._evidence[int(problem)] = [
                self.discount * right + group_size * float(rate),
                self.discount * wrong + group_size * (1.0 - float(rate)),
            ]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able posteriors: problem -> [right, wrong] evidence."""
        return {str(problem): list(evidence) for problem, evidence in self._evidence.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._evidence.clear()
        self._evidence.update({int(problem): list(evidence) for problem, evidence in state.items()})
