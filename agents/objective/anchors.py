"""Anchors: what keeps the target pi near a reference policy, in the loss or in the reward.

With x = log pi(y_t) - log ref(y_t) of a sampled token, the estimators of KL(pi || ref) are (Schulman,
"Approximating KL divergence", 2020)

    k1 = x            k2 = x^2 / 2            k3 = e^-x - 1 + x

What they pull with depends on where they stand, tokens being pi's own:

    in the loss     k1: nothing, E[grad log pi] = 0 (refused);   k2: grad KL(pi || ref);   k3: grad KL(ref || pi)
    in the reward   k1: grad KL(pi || ref) of whole completions; k2, k3: not the gradient of what they estimate, since
                    the part that goes through the estimator itself is left out

``corrected`` multiplies a loss's estimate by the ratio of pi to what wrote the token, and takes the gradient of the
product: of k1 and of k3 that is grad KL(pi || ref) whoever wrote, token by token (DeepSeek-V3.2, arXiv 2512.02556,
sec. 3.1; TRL's ``use_bias_correction_kl``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from agents.batches.weight_copy import WeightCopy
from agents.corrections.correction import MAX_LOG_WEIGHT, sampled_logp
from agents.rollout import Rollout
from policies import Policy
from registry import UsageError, anchors

ESTIMATORS = ("k1", "k2", "k3")
PLACES = ("loss", "reward")


class Anchor(Protocol):
    """A registered anchor.

    Attributes:
        place: ``loss`` or ``reward``.
    """

    place: str

    def renews(self, iteration: int) -> tuple[str, ...]:
        """Of each reference that it needs, whether the target of the beginning of ``iteration`` (from 0) takes its
        place: ``now``, before this iteration's completions are measured, ``later``, after that, or ``""`` for neither.
        All are the target of the start at first."""
        ...

    def reference(self, scored: Sequence[Tensor], iteration: int) -> Tensor:
        """[B, T] log ref from log-probabilities [B, T] under each reference: of several, a convex combination is that
        of their divergences, for k1 and k2."""
        ...

    def penalty(self, logp: Tensor, rollout: Rollout) -> Tensor:
        """[B, T] what every token adds to the loss, or takes from the reward."""
        ...

    def slope(self, logp: Tensor, rollout: Rollout) -> Tensor:
        """[B, T] the derivative of a token's part of the loss by its log pi."""
        ...


@anchors.register("none")
@dataclass(frozen=True)
class NoAnchor:
    """Nothing holds the target."""

    place: ClassVar[str] = "loss"

    def renews(self, iteration: int) -> tuple[str, ...]:
        return ()

    def reference(self, scored: Sequence[Tensor], iteration: int) -> Tensor:
        raise NotImplementedError

    def penalty(self, logp: Tensor, rollout: Rollout) -> Tensor:
        return torch.zeros_like(logp)

    slope = penalty


@anchors.register("kl")
@dataclass(frozen=True)
class KL:
    """``beta`` times an estimate of KL(pi || ref) per token; by default GRPO's penalty (arXiv 2402.03300, eq. 3 and 4).

    Attributes:
        beta: its weight; 0.04 in GRPO.
        estimator: ``k1``, ``k2`` or ``k3``.
        place: ``loss``, or ``reward``: there the sum over a completion is taken from its reward before advantages.
        every: iterations after which the reference becomes the target; 0 keeps the start.
        corrected: in the loss, multiply by pi / mu of the token, mu being what wrote it.
    """

    beta: float = 0.04
    estimator: str = "k3"
    place: str = "loss"
    every: int = 0
    corrected: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise UsageError(f"anchor kl: estimator={self.estimator!r} is none of {', '.join(ESTIMATORS)}")
        if self.place not in PLACES:
            raise UsageError(f"anchor kl: place={self.place!r} is none of {', '.join(PLACES)}")
        if not self.beta > 0 or self.every < 0:
            raise UsageError(
                f"anchor kl: beta={self.beta} must be above 0 (anchor=none is without), every={self.every} at least 0"
            )
        if self.place == "reward" and self.corrected:
            raise UsageError("anchor kl: corrected=True is of place=loss; what corrects a reward is the correction")
        if self.place == "loss" and self.estimator == "k1" and not self.corrected:
            raise UsageError(
                "anchor kl: the gradient of k1 in the loss is 0 in expectation: take estimator=k2 or k3, "
                "corrected=true, or place=reward"
            )

    def renews(self, iteration: int) -> tuple[str, ...]:
        return ("now" if self.every and iteration and iteration % self.every == 0 else "",)

    def reference(self, scored: Sequence[Tensor], iteration: int) -> Tensor:
        return scored[0]

    def penalty(self, logp: Tensor, rollout: Rollout) -> Tensor:
        return self.beta * self._estimate(log_ratio(logp, rollout)) * self._weight(logp, rollout)

    def slope(self, logp: Tensor, rollout: Rollout) -> Tensor:
        x = log_ratio(logp, rollout)
        slope = {"k1": torch.ones_like(x), "k2": x, "k3": 1 - _exp(-x)}[self.estimator]
        if self.corrected:
            slope = slope + self._estimate(x)
        return self.beta * slope * self._weight(logp, rollout)

    def _estimate(self, x: Tensor) -> Tensor:
        return {"k1": x, "k2": x.square() / 2, "k3": _exp(-x) - 1 + x}[self.estimator]

    def _weight(self, logp: Tensor, rollout: Rollout) -> Tensor | float:
        return _exp(logp.double() - sampled_logp(rollout).double()) if self.corrected else 1.0


@anchors.register("kl-convex")
@dataclass(frozen=True)
class KLConvex(KL):
    """``beta (lam KL(pi || base) + (1 - lam) KL(pi || previous))``: near the start and the target before the last
    update (KL-Convex of ReMix, arXiv 2507.06892).

    lam is 1 for ``hold`` iterations, then falls by ``fall`` each ``step`` iterations down to ``least``.

    Of k1 and k2 the slope of the sum is that for one reference, lam log base + (1 - lam) log previous, so that k3 is
    refused. The estimator, beta, and that lam goes on falling after a reincarnation, are our readings.

    Attributes:
        estimator: ``k2``, or ``k1`` where that has a gradient.
        every: as of ``kl``, of the base.
        restart: iterations after which the base becomes the target, once: the paper's reincarnation, at which it also
            stops to replay (``batch.until``); 0 for never.
    """

    estimator: str = "k2"
    hold: int = 50
    step: int = 10
    fall: float = 0.1
    least: float = 0.5
    restart: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator == "k3":
            raise UsageError("anchor kl-convex: k3 of two references is no k3 of their mean: take estimator=k2")
        if min(self.hold, self.restart) < 0 or self.step < 1:
            raise UsageError(
                f"anchor kl-convex: hold={self.hold} and restart={self.restart} must be at least 0 iterations, and "
                f"step={self.step} at least 1"
            )
        if not (0 <= self.least <= 1 and 0 <= self.fall <= 1):
            raise UsageError(f"anchor kl-convex: least={self.least} and fall={self.fall} must be in [0, 1]")

    def renews(self, iteration: int) -> tuple[str, ...]:
        (base,) = super().renews(iteration)
        return ("now" if self.restart and iteration == self.restart else base, "later")

    def share(self, iteration: int) -> float:
        """lam of an iteration, counted from 0."""
        falls = max(0, iteration - self.hold) // self.step
        return max(self.least, 1 - self.fall * falls)

    def reference(self, scored: Sequence[Tensor], iteration: int) -> Tensor:
        base, previous = scored
        lam = self.share(iteration)
        return lam * base + (1 - lam) * previous


def log_ratio(logp: Tensor, rollout: Rollout) -> Tensor:
    """[B, T] float64: log pi - log ref, 0 on padding."""
    assert rollout.reference_logp is not None
    return torch.where(rollout.mask, logp.double() - rollout.reference_logp.double(), 0.0)


def _exp(x: Tensor) -> Tensor:
    return x.clamp(max=MAX_LOG_WEIGHT).exp()


class Anchoring:
    """An anchor and the references that it needs.

    Args:
        anchor: a component of ``registry.anchors``.
        policy: the target, whose present weights are the start.
    """

    def __init__(self, anchor: Anchor, policy: Policy) -> None:
        self.anchor = anchor
        self.copies = [WeightCopy(policy) for _ in anchor.renews(0)]

    @property
    def in_loss(self) -> bool:
        """Whether every token has a part in the loss."""
        return bool(self.copies) and self.anchor.place == "loss"

    @property
    def in_reward(self) -> bool:
        """Whether completions lose reward."""
        return bool(self.copies) and self.anchor.place == "reward"

    def measure(self, rollout: Rollout, score: Callable[[Rollout], Tensor], iteration: int) -> Rollout:
        """The rollout with log ref of every token, and for a penalty in the reward log pi_old; ``score`` gives a
        rollout's log-probabilities [B, T] under the policy's weights of that moment. Ask once an iteration: references
        whose time is up become the target."""
        if not self.copies:
            return rollout
        scored = []
        for copy, renewal in zip(self.copies, self.anchor.renews(iteration), strict=True):
            if renewal == "now":
                copy.take()
            with copy.in_place():
                scored.append(score(rollout))
            if renewal == "later":
                copy.take()
        rollout = replace(rollout, reference_logp=self.anchor.reference(scored, iteration))
        return replace(rollout, old_logp=score(rollout)) if self.in_reward else rollout

    def reward(self, rollout: Rollout) -> Tensor:
        """[B] rewards, less the penalty of a measured rollout where it stands there."""
        if not self.in_reward:
            return rollout.reward
        assert rollout.old_logp is not None
        taken = torch.where(rollout.mask, self.anchor.penalty(rollout.old_logp, rollout), 0.0)
        return (rollout.reward.double() - taken.sum(1)).float()

    def metrics(self, logp: Tensor, rollout: Rollout) -> dict[str, float]:
        """``kl_reference``: the mean of k3 over the tokens of a measured rollout, in nats; log pi is [B, T]."""
        if not self.copies:
            return {}
        x = log_ratio(logp, rollout)[rollout.mask]
        return {"kl_reference": float((_exp(-x) - 1 + x).mean()) if len(x) else 0.0}

    def state_dict(self) -> dict[str, Tensor]:
        """The references' weights."""
        return {f"{n}.{name}": value for n, copy in enumerate(self.copies) for name, value in copy.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """What ``state_dict`` gave."""
        for n, copy in enumerate(self.copies):
            prefix = f"{n}."
            copy.load_state_dict({name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)})
