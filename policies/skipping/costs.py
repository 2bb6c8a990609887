"""What skipping each layer costs, learned from what sets of layers cost: a belief that is updated after every batch.

The KL per token of skipping a set S of n layers is modelled as

    KL(S) = n ** gamma * sum of c_l over S,        c_l > 0

gamma = 0 is additivity, which holds within a few percent on a pretrained 30-layer model; where sets cost more than
their sum, gamma is above 0. The belief over (log c_1 .. log c_L, gamma) is Gaussian; an observed log KL updates it by
one step of an extended Kalman filter, and between batches it widens, since the target moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNKNOWN_COST, UNKNOWN_SPREAD = 0.1, 1.5  # nats per token, and log sd: of a layer that nothing is known of
MEASURED_SPREAD = 0.3  # log sd of a cost that was measured on other texts
GAMMA, GAMMA_SPREAD = 0.3, 0.3
FLOOR = 1e-6  # nats per token; below this a measured divergence is rounding


class LayerCosts:
    """The belief over L layers' costs and gamma.

    Args:
        mean: [L + 1] of log c_l, and of gamma (the last).
        covariance: [L + 1, L + 1].
    """

    def __init__(self, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> None:
        self.mean = mean
        self.covariance = covariance

    @classmethod
    def unknown(cls, num_layers: int) -> LayerCosts:
        """Before anything is known."""
        mean = np.append(np.full(num_layers, np.log(UNKNOWN_COST)), GAMMA)
        return cls(mean, np.diag(np.append(np.full(num_layers, UNKNOWN_SPREAD), GAMMA_SPREAD) ** 2))

    @classmethod
    def measured(cls, kl: Sequence[float]) -> LayerCosts:
        """After the KL per token of every layer alone was measured."""
        mean = np.append(np.log(np.maximum(kl, FLOOR)), GAMMA)
        return cls(mean, np.diag(np.append(np.full(len(kl), MEASURED_SPREAD), GAMMA_SPREAD) ** 2))

    def _linear(self, skipped: Sequence[int]) -> tuple[float, NDArray[np.float64]]:
        """log KL of a set at the mean, and its gradient [L + 1]."""
        chosen = list(skipped)
        costs = np.exp(self.mean[chosen])
        slope = np.zeros(len(self.mean))
        slope[chosen] = costs / costs.sum()
        slope[-1] = np.log(len(chosen))
        return float(np.log(costs.sum()) + self.mean[-1] * slope[-1]), slope

    def predict(self, skipped: Sequence[int]) -> tuple[float, float]:
        """log KL per token of skipping a non-empty set: expected, and the standard deviation of that belief."""
        expected, slope = self._linear(skipped)
        return expected, float(np.sqrt(slope @ self.covariance @ slope))

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """[L] log costs drawn from the belief."""
        return rng.multivariate_normal(self.mean, self.covariance, method="eigh")[:-1]

    def update(self, skipped: Sequence[int], kl: float, noise: float) -> None:
        """Learn that a non-empty set cost ``kl`` nats per token, known to within a factor of about 1 + ``noise``."""
        expected, slope = self._linear(skipped)
        spread = self.covariance @ slope
        gain = spread / (slope @ spread + noise**2)
        self.mean = self.mean + gain * (np.log(max(kl, FLOOR)) - expected)
        self.covariance = self.covariance - np.outer(gain, spread)
        self.covariance = (self.covariance + self.covariance.T) / 2

    def widen(self, drift: float) -> None:
        """One batch has passed: every log cost may have moved by ``drift``, half of the variance in common with all
        the others, so that layers left in follow those skipped; and no less is known than at first."""
        variance = np.diagonal(self.covariance)[:-1]
        step = np.clip(UNKNOWN_SPREAD**2 - variance, 0.0, drift**2)
        self.covariance = self.covariance.copy()
        self.covariance[:-1, :-1] += np.diag(step / 2) + step.min() / 2

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"mean": self.mean.tolist(), "covariance": self.covariance.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LayerCosts:
        """Of ``state_dict``."""
        return cls(np.array(state["mean"]), np.array(state["covariance"]))
