"""Skip samplers: which layers a rollout's behaviour policy leaves out. Those here need only the number of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from policies.engine.drafts import Drafter
from policies.nested import LayerSubset, without
from registry import UsageError, skip_samplers

if TYPE_CHECKING:
    from policies.skipping.probe import Probe


class SkipSampler:
    """What every skip sampler is: ``sample`` is its own, and the rest does nothing until it is overridden.

    >>> skip_samplers.make("even", ratio=0.25).sample(12, np.random.default_rng(0))
    (0, 1, 3, 4, 5, 7, 8, 10, 11)
    """

    @property
    def ready(self) -> bool:
        """Whether ``sample`` has all that it needs; if not, ``prepare`` is called before the first rollout."""
        return True

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The layers *kept* of ``num_layers``, increasing: drawn once per rollout (the paper redraws per batch)."""
        raise NotImplementedError

    def drafter(self, num_layers: int) -> Drafter | None:
        """What drafts tokens for the layers kept; by default nothing."""
        return None

    def check(self, num_layers: int) -> None:
        """Raise ``UsageError`` for settings that cannot work with ``num_layers``, before anything is measured."""
        self.sample(num_layers, np.random.default_rng(0))
        self.drafter(num_layers)

    def prepare(self, probe: Probe) -> None:
        """Measure scores of the layers on the target."""

    def observe(self, layers: LayerSubset, diagnostics: Mapping[str, float]) -> None:
        """Learn what ``layers`` cost from the ``diagnostics`` of the update after their rollout."""

    def metrics(self) -> dict[str, float]:
        """What the run writes beside its own metrics, about the last sample."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, so that a run resumes to the same sets."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``."""


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


def inner_layers(border: int, num_layers: int) -> np.ndarray:
    """The layers that may be skipped: all but the first and the last ``border``."""
    if border < 0:
        raise UsageError(f"border={border} is negative: give the number of protected layers at each end")
    return np.arange(border, num_layers - border)


@skip_samplers.register("full")
@dataclass(frozen=True)
class FullDepth(SkipSampler):
    """Keeps every layer: on-policy rollouts.

    Use: for on-policy rollouts, which ``reft`` has.
    """

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """All of ``num_layers``; draws nothing from ``rng``."""
        return tuple(range(num_layers))


@skip_samplers.register("uniform")
@dataclass(frozen=True)
class UniformSkip(SkipSampler):
    """Skips ``round(ratio * num_layers)`` layers, uniformly without replacement, never the borders (arXiv 2508.10123).

    Use: for the paper's setting, and as the baseline of the others.

    Attributes:
        ratio: share of all layers that is skipped, in [0, 1).
        border: number of first and of last layers that are never skipped.
    """

    ratio: float = 0.15
    border: int = 1

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """A fresh subset of ``num_layers`` layers."""
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        return without(rng.choice(candidates, size=count, replace=False).tolist(), num_layers)


@skip_samplers.register("fixed")
@dataclass(frozen=True)
class FixedSkip(SkipSampler):
    """Skips the same layers in every rollout.

    Use: to repeat a set that ``benchmarks.divergence`` found.

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


@skip_samplers.register("even")
@dataclass(frozen=True)
class EvenSkip(SkipSampler):
    """Skips ``round(ratio * num_layers)`` layers spread evenly over the inner ones, so that no two neighbours go before
    they must. The same layers at every call. ``ratio`` and ``border`` as in ``uniform``.

    Use: as a first choice that needs no measurement: of whole layers it costs least on the built-in model.
    """

    ratio: float = 0.15
    border: int = 1

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The same subset at every call; draws nothing from ``rng``."""
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        places = (2 * np.arange(count) + 1) * len(candidates) // max(1, 2 * count)  # middles of equal parts
        return without(candidates[places].tolist(), num_layers)


@skip_samplers.register("middle")
@dataclass(frozen=True)
class MiddleSkip(SkipSampler):
    """Skips a run of ``round(ratio * num_layers)`` neighbours, as depth pruning does (arXiv 2403.17887).

    Use: on pretrained models without a measurement: of whole layers it costs least on SmolLM2-135M, four skipped.

    Attributes:
        ratio, border: as in ``uniform``.
        center: where among the inner layers the run lies, from 0 (their start) to 1 (their end).
    """

    ratio: float = 0.15
    border: int = 1
    center: float = 0.5

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The same subset at every call; draws nothing from ``rng``."""
        if not 0 <= self.center <= 1:
            raise UsageError(f"center={self.center} is outside [0, 1]")
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        first = round(self.center * (len(candidates) - count))
        return without(candidates[first : first + count].tolist(), num_layers)


@skip_samplers.register("early-exit")
@dataclass(frozen=True)
class EarlyExit(SkipSampler):
    """Skips the ``round(ratio * num_layers)`` last inner layers (LayerSkip, arXiv 2404.16710, drafts so).

    Use: with models trained for it; others lose most by it.

    Attributes:
        ratio: as in ``uniform``.
        border: as in ``uniform``: so many last layers are kept all the same, since they write for the head; 0 is the
            exit proper.
    """

    ratio: float = 0.15
    border: int = 1

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The same subset at every call; draws nothing from ``rng``."""
        candidates = inner_layers(self.border, num_layers)
        count = skip_count(self.ratio, num_layers, len(candidates))
        return without(candidates[len(candidates) - count :].tolist(), num_layers)


@skip_samplers.register("nested-draft")
@dataclass(frozen=True)
class NestedDraft(FullDepth):
    """Keeps every layer; where few completions are live, a subset of the layers drafts for all of them
    (self-speculative decoding, arXiv 2309.08168), switched by the number of rows as in EfficientRollout, arXiv
    2606.18967.

    The subset, ``even`` of ``draft_ratio``, writes ``tokens`` tokens, all layers judge them in one forward, and each
    draws its own token at every place, by the same uniform number: drafts are kept up to the first that differs, which
    is replaced. So the completions are those of ``full``, token by token and with its log mu, whatever the slots, the
    processes and the drafts (``policies.engine.drafts``). EfficientRollout drafts by a quantised copy. Ours is how
    drafts are judged: the papers' rule, accept with min(1, pi / mu) and draw from the residual, has the same law and
    keeps as many drafts or more, but which tokens come then depends on how many rows are live. The drafter has KV
    slots of its own.

    Use: with models whose step of few rows takes as long as one of many (weights read from memory), and completions of
    which a few are much longer than the rest. On the built-in model it is a loss (``benchmarks/results/drafts``).

    Attributes:
        draft_ratio: share of all layers that the drafter skips, in [0, 1); ``border`` as in ``uniform``.
        tokens: of a draft.
        rows: the most live completions at which it drafts.
    """

    draft_ratio: float = 0.334
    border: int = 1
    tokens: int = 4
    rows: int = 8

    def drafter(self, num_layers: int) -> Drafter:
        """As ``SkipSampler.drafter``."""
        layers = EvenSkip(self.draft_ratio, self.border).sample(num_layers, np.random.default_rng(0))
        return Drafter(layers, self.tokens, self.rows)
