"""Patches: closed-form changes of the layers kept, so that a nested policy stays close to its target.

The residual stream of the full model and that of the nested one run side by side over the same tokens. After a half
layer that is kept and followed by skipped ones, the full stream has gone through the skipped ones too, and the
difference of the two is regressed, by ridge, on what the kept half's output map reads. The map takes the solution over:
same shape, same cost. ``absorb`` does this where something is skipped, ``heal`` for every map from there on, so that
later layers also make up for what is still missing, in the manner of layer-wise reconstruction after pruning
(OBC, arXiv 2208.11580; SparseGPT, arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.model.layers import LayerWeights
from policies.nested import Change, LayerSubset, PatchedSubset, halves
from policies.policy import Policy
from policies.skipping.divergence import Text, full_model, passes
from registry import UsageError, patches

_ROWS = 512  # of a gram computed at a time


class NormalEquations:
    """Least squares with an intercept from running sums: no features are stored.

    Args:
        features: numbers read per token.
        targets: numbers to explain per token.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        # the last feature is the constant one; of the symmetric gram only what is on and above the diagonal is right
        self.gram = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features + 1, targets, dtype=torch.float64, device=device)
        self.square = 0.0  # of the targets
        self.origin: Tensor | None = None  # float32 products about a point near the mean do not cancel

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Count N more tokens: ``features`` [N, features] of any float dtype, ``targets`` [N, targets] float32."""
        features = features.float()
        if self.origin is None:
            self.origin = features.mean(0)
        f = F.pad(features - self.origin, (0, 1), value=1.0)
        for start in range(0, f.shape[1], _ROWS):
            rows = slice(start, start + _ROWS)
            self.gram[rows, start:] += f[:, rows].T @ f[:, start:]
        self.cross += f.T @ targets
        self.square += float(targets.double().square().sum())

    def solve(self, ridge: float, before: Change | None = None) -> tuple[Change, float]:
        """The map and bias of least squared error plus ``ridge`` times the mean squared feature times the squared
        distance of the map from ``before`` (or 0), and the share of the targets' sum of squares that is left."""
        assert self.origin is not None
        count = self.gram[-1, -1]
        mean, target = self.gram[:-1, -1] / count, self.cross[-1] / count
        gram = self.gram[:-1, :-1].triu() + self.gram[:-1, :-1].triu(1).T - count * torch.outer(mean, mean)
        cross = self.cross[:-1] - count * torch.outer(mean, target)
        strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
        anchored = cross if before is None else cross + strength * before.weight.double().T
        damped = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.cholesky_solve(anchored, torch.linalg.cholesky(damped))
        left = self.square - float(count * target.square().sum())
        left += float((solution * (gram @ solution - 2 * cross)).sum())
        bias = target - (self.origin.double() + mean) @ solution
        change = Change(solution.T.float().contiguous(), bias.float())
        return change, left / self.square if self.square else 0.0


class _Streams:
    """A micro-batch's residual streams [N, width] float32: ``full`` of the full model, ``partial`` of the nested."""

    def __init__(
        self, weights: Sequence[LayerWeights], before: Tensor, apply: Callable[[Tensor, LayerWeights], Tensor]
    ) -> None:
        self.weights, self.full, self.apply = weights, before, apply
        self.partial = self.full
        self.read = self.full

    def advance(self, numbers: Iterable[int]) -> None:
        """The full stream through half layers."""
        for number in numbers:
            self.full = self.apply(self.full, _half(self.weights, number))

    def step(self, number: int) -> None:
        """The nested stream through a half layer as it is; ``read`` [N, in] is what its output map was given."""
        half = _half(self.weights, number)
        output = half.down if number % 2 else half.out

        def recording(x: Tensor) -> Tensor:
            self.read = x
            return output(x)

        recorded = replace(half, down=recording) if number % 2 else replace(half, out=recording)
        self.partial = self.apply(self.partial, recorded)

    def change(self, change: Change) -> None:
        """The nested stream as it is with ``change`` in the map just passed."""
        self.partial = self.partial + F.linear(self.read.float(), change.weight, change.bias)


def _half(weights: Sequence[LayerWeights], number: int) -> LayerWeights:
    return replace(weights[number // 2], attends=number % 2 == 0, transforms=number % 2 == 1)


@dataclass(frozen=True)
class Fit:
    """A fitted subset, and ``residual``: the share of what the skipped layers add that stays unexplained, on the tokens
    fitted to, as a mean over the runs of skipped layers (0 where nothing is skipped)."""

    subset: PatchedSubset
    residual: float


class Patch(Protocol):
    """How a subset is patched, a component of ``registry.patches``.

    Attributes:
        tokens: most tokens, prompts included, to fit to at a time; 0 for what fits nothing.
        every: iterations of training after which a subset in use is fitted again.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def every(self) -> int: ...

    def check(self, policy: Policy) -> None:
        """Raise ``UsageError`` for a policy whose layers cannot be patched."""
        ...

    def fit(self, policy: Policy, text: Text, layers: LayerSubset, before: PatchedSubset | None = None) -> Fit:
        """Patch ``layers`` on ``text``, anchored at ``before``, the patches so far of the same layers."""
        ...


@patches.register("none")
@dataclass(frozen=True)
class NoPatch:
    """Skipped layers are skipped, and that is all."""

    tokens = 0
    every = 0

    def check(self, policy: Policy) -> None:
        """All policies will do."""

    def fit(self, policy: Policy, text: Text, layers: LayerSubset, before: PatchedSubset | None = None) -> Fit:
        """No changes."""
        return Fit(PatchedSubset(layers, {}), 1.0)


@patches.register("absorb")
@dataclass(frozen=True)
class Absorb:
    """The output map before each run of skipped (half) layers also adds what the run would have added, as far as that
    is linear in what the map reads. Costs nothing in rollouts.

    Attributes:
        ridge: pull of the maps to their state before the fit, in units of the mean squared feature.
        tokens, every: as in ``Patch``.
    """

    ridge: float = 0.1
    tokens: int = 8192
    every: int = 10
    everything = False

    def __post_init__(self) -> None:
        if self.ridge <= 0 or self.tokens < 1 or self.every < 1:
            raise UsageError(
                f"ridge={self.ridge} must be positive, tokens={self.tokens} and every={self.every} at least 1"
            )

    def check(self, policy: Policy) -> None:
        """As ``Patch.check``: neither Gemma nor a policy on transformers' own layers takes patches."""
        if policy.architecture.gemma:
            raise UsageError("Gemma norms what its layers add, so no linear patch makes up for them: use patch='none'")
        policy.check_functional("patches")

    @torch.no_grad()
    def fit(self, policy: Policy, text: Text, layers: LayerSubset, before: PatchedSubset | None = None) -> Fit:
        """As ``Patch.fit``. Raises ``UsageError`` where ``check`` does."""
        self.check(policy)
        numbers = halves(layers)
        last = 2 * policy.num_layers
        following = [*numbers[1:], last]
        gaps = [after > number + 1 for number, after in zip(numbers, following, strict=True)]
        streams = [_Streams(full_model(policy, text).layers, *passed) for passed in passes(policy, text)]
        for one in streams:
            one.advance(range(numbers[0]))
        parted = numbers[0] > 0
        changes: dict[int, Change] = {}
        left: list[float] = []
        for place, (number, after) in enumerate(zip(numbers, following, strict=True)):
            if not self.everything and not any(gaps[place:]):
                break
            parted = parted or gaps[place]
            for one in streams:
                one.advance(range(number, after))
                if parted:
                    one.step(number)
                else:
                    one.partial = one.full
            if gaps[place] or (parted and self.everything):
                change, residual = self._solve(streams, before.changes.get(number) if before else None)
                changes[number] = change
                left += [residual] if gaps[place] else []
        return Fit(PatchedSubset(layers, changes), sum(left) / max(len(left), 1))

    def _solve(self, streams: list[_Streams], before: Change | None) -> tuple[Change, float]:
        """The change of the map that all streams have just passed, put into them."""
        equations = NormalEquations(streams[0].read.shape[1], streams[0].full.shape[1], streams[0].full.device)
        for one in streams:
            equations.add(one.read, one.full - one.partial)
        change, residual = equations.solve(self.ridge, before)
        for one in streams:
            one.change(change)
        return change, residual


@patches.register("heal")
@dataclass(frozen=True)
class Heal(Absorb):
    """As ``absorb``, and every output map after the first skipped one is refitted to what the full stream has and the
    nested one lacks there. Costs nothing in rollouts, and more to fit: every map kept has its own equations.

    Attributes:
        ridge, tokens, every: as in ``absorb``.
    """

    ridge: float = 0.3
    everything = True
