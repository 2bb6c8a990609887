"""Skip samplers: which layers a rollout's behaviour policy leaves out.

``sample(num_layers, rng)`` is called once per rollout (the paper redraws per batch) and returns the layers *kept*. A
sampler that learns may also have ``observe(layers, diagnostics)``; those here are memoryless.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.subset import LayerSubset, without
from registry import UsageError, skip_samplers


def skip_count(ratio: float, num_layers: int, candidates: int) -> int:
    """How many layers a ratio skips: ``round(ratio * num_layers)``, halves to even as Python rounds; the ratio is of
    *all* layers, protected ones included. Raises ``UsageError`` if fewer than that many may be skipped."""
    if not 0.0 <= ratio < 1.0:
        raise UsageError(f"skip ratio {ratio} is outside [0, 1): a ratio of 1 leaves no layer")
    count = round(ratio * num_layers)
    largest = min(candidates, num_layers - 1)
    if count > largest:
        raise UsageError(
            f"skip ratio {ratio} of {num_layers} layers skips {count}, but at most {largest} may be skipped: "
            f"the largest possible ratio is {largest / num_layers:.3f}; lower ratio or border"
        )
    return count


@skip_samplers.register("full")
@dataclass(frozen=True)
class FullDepth:
    """Keeps every layer: on-policy rollouts."""

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """All of ``num_layers``; draws nothing from ``rng``."""
        return tuple(range(num_layers))


@skip_samplers.register("uniform")
@dataclass(frozen=True)
class UniformSkip:
    """Skips ``round(ratio * num_layers)`` layers, uniformly without replacement, never the borders (arXiv 2508.10123).

    Attributes:
        ratio: share of all layers that is skipped, in [0, 1).
        border: number of first and of last layers that are never skipped.
    """

    ratio: float = 0.15
    border: int = 1

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """A fresh subset of ``num_layers`` layers."""
        if self.border < 0:
            raise UsageError(f"border={self.border} is negative: give the number of protected layers at each end")
        candidates = np.arange(self.border, num_layers - self.border)
        count = skip_count(self.ratio, num_layers, len(candidates))
        if count == 0:
            return tuple(range(num_layers))
        return without(rng.choice(candidates, size=count, replace=False), num_layers)


@skip_samplers.register("fixed")
@dataclass(frozen=True)
class FixedSkip:
    """Skips the same layers in every rollout.

    Attributes:
        layers: the layers to skip; empty means a set drawn once from ``seed`` as ``uniform`` would.
        ratio, border: as in ``uniform``; used only where ``layers`` is empty.
        seed: of the drawn set, independent of the run's seed.
    """

    layers: tuple[int, ...] = ()
    ratio: float = 0.15
    border: int = 1
    seed: int = 0

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The same subset at every call; draws nothing from ``rng``."""
        if not self.layers:
            return UniformSkip(self.ratio, self.border).sample(num_layers, np.random.default_rng(self.seed))
        outside = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if outside:
            raise UsageError(f"layers={self.layers} skips {outside}, outside the model's layers 0 to {num_layers - 1}")
        if len(set(self.layers)) == num_layers:
            raise UsageError(f"layers={self.layers} skips all {num_layers} layers: keep at least one")
        return without(self.layers, num_layers)
