"""Trust regions and the losses they come from, as weights: with r = pi / pi_old (mu enters where a docstring says so).

Each equals the gradient of the published loss; the aggregation that the publication uses is named beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.corrections.correction import (
    Correction,
    check_positive,
    exp,
    log_r,
    mean_over_tokens,
)
from agents.rollout import Rollout
from registry import UsageError, corrections

TINY = 1e-8  # beside a probability of 0, as in verl


class TrustRegion(Correction):
    """Holds the ratio pi / pi_old itself."""

    scope: ClassVar[str] = "token"
    needs_old_logp: ClassVar[bool] = True
    trust_region: ClassVar[bool] = True


@corrections.register("practical")
@corrections.register("ppo-clip")
@dataclass(frozen=True)
class PPOClip(TrustRegion):
    """``W = r``, and 0 where PPO's clip is active: A > 0 and r > 1 + eps_high, or A < 0 and r < 1 - eps_low.

    With ``dual_clip`` c, W is 0 also where A < 0 and r > c: there PPO's loss has no bound (dual-clip PPO, arXiv
    1912.09729, eq. 5, c = 3; the gradient of TRL's two-sided clip, its ``delta``). Off by default.

    PPO (arXiv 1707.06347, eq. 7), GRPO (2402.03300, sequence-mean), Dr. GRPO (2503.20783, constant), DAPO (2503.14476,
    eps_high 0.28, token-mean). Registered as ``practical`` too: our reading of Nested-ReFT's variant of that name,
    which treats the nested policy's completions as the old target's.

    Use: with several steps a rollout. In the first step r is 1, and it is ``none``.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None

    operator: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_clip(self, self.eps_low, self.eps_high)
        if self.dual_clip is not None and not self.dual_clip > 1 + self.eps_high:
            raise UsageError(
                f"PPOClip: dual_clip={self.dual_clip!r} must be above 1 + eps_high={1 + self.eps_high}, such as 3"
            )

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_r(logp, rollout)
        kept = ~is_clipped(log_ratio, advantage, math.log1p(self.eps_high), log1m(self.eps_low))
        if self.dual_clip is not None:
            kept &= (advantage[:, None] >= 0) | (log_ratio <= math.log(self.dual_clip))
        return torch.where(kept, exp(log_ratio, logp, rollout), 0.0)


@corrections.register("gspo")
@dataclass(frozen=True)
class GSPO(TrustRegion):
    """``W = s`` where not clipped, s = exp(mean_t log r_t): PPO's clip by sequence (arXiv 2507.18071, eq. 5-7;
    sequence-mean).

    Use: with several steps a rollout and ``aggregation=sequence-mean``, where ratios of single tokens are noise.
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    scope: ClassVar[str] = "sequence"
    operator: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_clip(self, self.eps_low, self.eps_high)

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_s = mean_over_tokens(log_r(logp, rollout), rollout.mask)
        kept = ~is_clipped(log_s, advantage, math.log1p(self.eps_high), log1m(self.eps_low))
        return torch.where(kept, exp(log_s, logp, rollout), 0.0)


@corrections.register("luspo")
@dataclass(frozen=True)
class LUSPO(GSPO):
    """``W = T s`` where not clipped, T the completion's length: GSPO's weight times what its mean over tokens divides
    by, so that tokens of long completions count as much (arXiv 2602.05261, bounds of sec. 5.1; sequence-mean).

    Use: as ``gspo``, where long completions should count by their tokens.
    """

    eps_low: float = 2e-3
    eps_high: float = 2.5e-3

    on_policy: ClassVar[None] = None

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return super().__call__(logp, rollout, advantage) * rollout.mask.sum(1, keepdim=True)


@corrections.register("gmpo")
@dataclass(frozen=True)
class GMPO(TrustRegion):
    """``W = exp(mean_t log clip(r_t))``, the geometric mean of the sequence's clipped ratios, on tokens that are not
    clipped. The clip is one-sided by the sign of A and symmetric in log r (arXiv 2507.20673, eq. 4; sequence-mean).

    Use: as ``ppo-clip``, where ratios of single tokens are extreme.
    """

    log_clip: float = 0.4

    scope: ClassVar[str] = "sequence"
    operator: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_positive(self, "log_clip")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_r(logp, rollout)
        clipped = is_clipped(log_ratio, advantage, self.log_clip, -self.log_clip)
        bounded = torch.where(clipped, log_ratio.clamp(-self.log_clip, self.log_clip), log_ratio)
        return torch.where(clipped, 0.0, exp(mean_over_tokens(bounded, rollout.mask), logp, rollout))


@corrections.register("cispo")
@dataclass(frozen=True)
class CISPO(TrustRegion):
    """``W = r`` clamped to [1 - eps_low, 1 + eps_high]: no token loses its gradient (MiniMax-M1, arXiv 2506.13585, eq.
    4; token-mean). No lower bound by default, as there; the cap of 5 is ScaleRL's (arXiv 2510.13786).

    Use: with several steps a rollout, where the tokens that PPO's clip silences should go on learning.
    """

    eps_low: float = 1.0
    eps_high: float = 4.0

    operator: ClassVar[str] = "truncate"

    def __post_init__(self) -> None:
        check_clip(self, self.eps_low, self.eps_high)

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        bounded = log_r(logp, rollout).clamp(log1m(self.eps_low), math.log1p(self.eps_high))
        return exp(bounded, logp, rollout)


@corrections.register("sapo")
@dataclass(frozen=True)
class SAPO(TrustRegion):
    """``W = 4 g (1 - g) r``, g = sigmoid(tau (r - 1)), tau by the sign of A: a soft gate instead of a clip
    (arXiv 2511.20347; sequence-mean).

    Use: as ``ppo-clip``, where a hard clip silences many tokens.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    operator: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        check_positive(self, "tau_pos", "tau_neg")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_r(logp, rollout)
        tau = torch.where(advantage > 0, self.tau_pos, self.tau_neg).double()[:, None]
        x = tau * (log_ratio.clamp(max=80.0).exp() - 1)
        log_gate = torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)
        return exp(math.log(4.0) + log_gate + log_ratio, logp, rollout)


@dataclass(frozen=True)
class DPPO(TrustRegion):
    """``W = min(r, cap)``, and 0 where A pushes a token's probability further than ``delta`` from what it was: a region
    by a divergence of (pi, 1 - pi) from (pi_old, 1 - pi_old), with the sign of pi - pi_old (arXiv 2602.04879; the cap
    is of its sec. 5.4, bounds and cap are verl's).

    The paper advises the rollout policy for pi_old (sec. 5.2). Here pi_old is the target's, as for every trust region,
    and a product such as ``token-is*dppo-tv`` corrects mu.
    """

    delta_low: float
    delta_high: float
    cap: float = 20.0

    operator: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        check_positive(self, "delta_low", "delta_high", "cap")

    @property
    def on_policy(self) -> float:  # type: ignore[override]
        return min(1.0, self.cap)

    def divergence(self, logp: Tensor, old_logp: Tensor) -> Tensor:
        """[B, T] float64, with the sign of pi - pi_old."""
        raise NotImplementedError

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_r(logp, rollout)
        now = torch.where(rollout.mask, logp.double(), 0.0)
        moved = self.divergence(now.clamp(max=0.0), (now - log_ratio).clamp(max=0.0))  # rounding may lift one above 0
        kept = ~is_clipped(moved, advantage, self.delta_high, -self.delta_low)
        return torch.where(kept, exp(log_ratio.clamp(max=math.log(self.cap)), logp, rollout), 0.0)


@corrections.register("dppo-tv")
@dataclass(frozen=True)
class DPPOTV(DPPO):
    """``W = min(r, 20)``, and 0 where A > 0 and pi - pi_old > delta_high, or A < 0 and pi - pi_old < -delta_low: a
    region by total variation, which rare tokens seldom leave (arXiv 2602.04879, Binary-TV; constant or token-mean).

    Use: as ``ppo-clip``, where that clips rare tokens too soon and likely ones too late.
    """

    delta_low: float = 0.15
    delta_high: float = 0.15

    def divergence(self, logp: Tensor, old_logp: Tensor) -> Tensor:
        return logp.exp() - old_logp.exp()


@corrections.register("dppo-kl")
@dataclass(frozen=True)
class DPPOKL(DPPO):
    """``W = min(r, 20)``, and 0 where the KL of (pi, 1 - pi) from (pi_old, 1 - pi_old) is above delta and pi has moved
    the way that A pushes it (arXiv 2602.04879, Binary-KL; constant or token-mean).

    Use: as ``dppo-tv``, with a bound in nats.
    """

    delta_low: float = 0.05
    delta_high: float = 0.05

    def divergence(self, logp: Tensor, old_logp: Tensor) -> Tensor:
        p, q = logp.exp(), old_logp.exp()
        others = torch.log((1 - q + TINY) / (1 - p + TINY))
        return torch.sign(p - q) * (q * (old_logp - logp) + (1 - q) * others)


def check_clip(owner: Correction, eps_low: float, eps_high: float) -> None:
    if not (0 <= eps_low <= 1 and eps_high >= 0):
        raise UsageError(
            f"{type(owner).__name__}: eps_low={eps_low!r} must lie in [0, 1] and eps_high={eps_high!r} be at least 0"
        )


def log1m(eps: float) -> float:
    return math.log1p(-eps) if eps < 1 else -math.inf


def is_clipped(log_ratio: Tensor, advantage: Tensor, high: float | Tensor, low: float) -> Tensor:
    """Where the clipped branch is the smaller one, so that it has no gradient: [B, T] or [B, 1]."""
    a = advantage[:, None]
    return ((a > 0) & (log_ratio > high)) | ((a < 0) & (log_ratio < low))
