"""Skip samplers that choose by scores measured on the target once, before the first rollout.

``prepare(probe)`` measures; its cost is part of the first iteration and is reported as ``time/prepare``. The scores are
saved with the run, and not refreshed as the target moves: ``budget`` is the sampler that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from policies.nested import LayerSubset, without
from policies.skipping.probe import Probe
from policies.skipping.samplers import SkipSampler, inner_layers, skip_count
from registry import UsageError, skip_samplers


def score_of(probe: Probe, name: str) -> list[float]:
    """[L] a layer's ``kl`` or block ``influence``, lower is cheaper to skip."""
    if name not in ("kl", "influence"):
        raise UsageError(f"score={name!r} is unknown: use 'kl' or 'influence'")
    return probe.kl() if name == "kl" else probe.influence


def cheapest(scores: Sequence[float], candidates: np.ndarray, count: int) -> list[int]:
    """The ``count`` candidates with the lowest scores, the first of equal ones."""
    return sorted(candidates.tolist(), key=lambda n: (scores[n], n))[:count]


@dataclass(frozen=True)
class ScoredSkip(SkipSampler):
    """What samplers with measured scores share; ``ratio`` and ``border`` as in ``uniform``."""

    ratio: float = 0.15
    border: int = 1
    _scores: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def ready(self) -> bool:
        """Whether ``sample`` has the scores that it needs."""
        return bool(self._scores)

    def check(self, num_layers: int) -> None:
        """Raise ``UsageError`` for a ratio that a model of ``num_layers`` layers cannot skip; measures nothing."""
        skip_count(self.ratio, num_layers, len(inner_layers(self.border, num_layers)))

    def scores(self, name: str, num_layers: int) -> list[float]:
        """[L] the scores measured under ``name``."""
        scores = self._scores.get(name)
        if scores is None or len(scores) != num_layers:
            raise UsageError(
                f"{type(self).__name__} has no scores of this model of {num_layers} layers: call prepare(probe) before "
                "the first sample (ReFT does)"
            )
        return scores

    def state_dict(self) -> dict[str, Any]:
        """The scores, JSON-able."""
        return {name: list(scores) for name, scores in self._scores.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._scores.clear()
        self._scores.update({name: list(scores) for name, scores in state.items()})


@skip_samplers.register("block-influence")
@dataclass(frozen=True)
class BlockInfluence(ScoredSkip):
    """Skips the ``round(ratio * L)`` inner layers whose output is nearest to their input: ShortGPT's block influence,
    1 - cos (arXiv 2403.03853, eq. 1). The same layers at every call. Needs ``prepare``: one forward of a few texts.

    Use: on a pretrained model: it chooses about as well as ``lowest-kl`` and costs one forward.
    """

    def prepare(self, probe: Probe) -> None:
        """Measure the influence."""
        self._scores["influence"] = probe.influence

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The subset without the least influential layers; draws nothing from ``rng``."""
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        return without(cheapest(self.scores("influence", num_layers), candidates, count), num_layers)


@skip_samplers.register("lowest-kl")
@dataclass(frozen=True)
class LowestKL(ScoredSkip):
    """Skips the ``round(ratio * L)`` inner layers that cost least divergence. The same layers at every call. Needs
    ``prepare``: a forward per layer, or with ``joint`` several per skipped layer.

    Use: where layers are to be chosen by what leaving them out does to the distribution.

    Attributes:
        joint: choose one layer after the other, each the cheapest *given those already skipped*, among the 2 count + 2
            that are cheapest alone; else the cheapest alone. Sets of neighbours can cost far more than their sum.
    """

    joint: bool = False

    def prepare(self, probe: Probe) -> None:
        """Measure every layer alone, and then the sets on the way to the joint choice."""
        alone = probe.kl()
        if self.joint:
            candidates = inner_layers(self.border, probe.num_layers)
            count = skip_count(self.ratio, probe.num_layers, len(candidates))
            pool, chosen = cheapest(alone, candidates, 2 * count + 2), list[int]()
            while len(chosen) < count:
                costs = {n: probe.set_kl([*chosen, n]) if chosen else alone[n] for n in pool if n not in chosen}
                chosen.append(min(costs, key=lambda n: (costs[n], n)))
            self._scores["joint"] = [float(n not in chosen) for n in range(probe.num_layers)]
        self._scores["kl"] = alone

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The subset without the cheapest layers; draws nothing from ``rng``."""
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        return without(
            cheapest(self.scores("joint" if self.joint else "kl", num_layers), candidates, count), num_layers
        )


@skip_samplers.register("softmax")
@dataclass(frozen=True)
class SoftmaxSkip(ScoredSkip):
    """Skips ``round(ratio * L)`` inner layers drawn without replacement with probabilities proportional to
    score ** (-1 / temperature), by Gumbel top-k (arXiv 1903.06059): cheap layers often, every layer sometimes.
    Needs ``prepare``.

    Use: where every layer should be left out at times, and dear ones rarely.

    Attributes:
        score: ``kl`` (a forward per layer) or ``influence`` (one forward).
        temperature: to 0 it is the cheapest layers alone, to infinity ``uniform``.
    """

    score: str = "kl"
    temperature: float = 0.5

    def check(self, num_layers: int) -> None:
        """As ``ScoredSkip.check``, and the temperature."""
        super().check(num_layers)
        if self.temperature <= 0 or self.score not in ("kl", "influence"):
            raise UsageError(
                f"softmax: temperature={self.temperature} must be positive and score={self.score!r} 'kl' or 'influence'"
            )

    def prepare(self, probe: Probe) -> None:
        """Measure the score."""
        self._scores[self.score] = score_of(probe, self.score)

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """A fresh subset."""
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        log_score = np.log(np.maximum(self.scores(self.score, num_layers), 1e-12))
        noisy = rng.gumbel(size=num_layers) - log_score / self.temperature
        return without(cheapest((-noisy).tolist(), candidates, count), num_layers)


@dataclass(frozen=True)
class HalfSkip(ScoredSkip):
    """What the samplers of half layers share: ``round(ratio * L)`` halves of one kind are skipped, which is less than
    ``ratio`` of the weights; the share that is reported counts them by weight.

    Attributes:
        by: ``uniform`` draws the layers afresh, as ``uniform`` does; ``kl`` takes those whose half measured cheapest.
    """

    by: str = "uniform"
    half: ClassVar[str]

    @property
    def ready(self) -> bool:
        """Whether ``sample`` has what it needs: always where nothing is measured."""
        return self.by == "uniform" or bool(self._scores)

    def check(self, num_layers: int) -> None:
        """As ``ScoredSkip.check``, and ``by``."""
        super().check(num_layers)
        if self.by not in ("uniform", "kl"):
            raise UsageError(f"by={self.by!r} is unknown: use 'uniform' or 'kl'")

    def prepare(self, probe: Probe) -> None:
        """Measure every layer's half alone, where ``by`` asks for it."""
        if self.by == "kl":
            self._scores["kl"] = probe.kl(self.half)

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The subset without the chosen halves."""
        self.check(num_layers)
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        if self.by == "kl":
            chosen = cheapest(self.scores("kl", num_layers), candidates, count)
        else:
            chosen = rng.choice(candidates, size=count, replace=False).tolist()
        return without([f"{n}.{self.half}" for n in chosen], num_layers)


@skip_samplers.register("attention-only")
@dataclass(frozen=True)
class AttentionOnly(HalfSkip):
    """Skips attention alone, in ``round(ratio * L)`` inner layers, whose keys and values are not stored either.
    Attention is the more redundant half in large models (arXiv 2406.15786). See ``HalfSkip``.

    Use: with long prefixes and many slots, where attention and its cache cost most.
    """

    half = "attention"


@skip_samplers.register("mlp-only")
@dataclass(frozen=True)
class MLPOnly(HalfSkip):
    """Skips the MLP alone, in ``round(ratio * L)`` inner layers. See ``HalfSkip``.

    Use: to compare with ``attention-only``: a layer's MLP is the larger part of its weights.
    """

    half = "mlp"
