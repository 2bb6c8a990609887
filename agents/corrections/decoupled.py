"""PPO's clip beside a correction of mu: both ratios, pi / pi_old and pi_old / mu, in one weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.corrections.correction import (
    MAX_LOG_WEIGHT,
    Correction,
    at_level,
    check_level,
    check_positive,
    exp,
    log_r,
    log_rho,
)
from agents.corrections.trust_regions import TrustRegion, check_clip, is_clipped, log1m
from agents.rollout import Rollout
from registry import UsageError, corrections


@corrections.register("base")
@corrections.register("decoupled-ppo")
@dataclass(frozen=True)
class DecoupledPPO(TrustRegion):
    """``W = w * r`` where not clipped, w = pi_old / mu: PPO's clip about pi_old while w corrects mu (Hilton et al.,
    arXiv 2110.00641, eq. 4). The ratio w is of the token or of the sequence, and capped if ``cap`` is set; by token
    without a cap this is ``token-is*ppo-clip``.

    Registered as ``base`` too: our reading of Nested-ReFT's variant of that name, pi / mu under the clip.

    Use: for nested rollouts with several steps each: the clip is about the policy before them, whatever mu is.
    """

    level: str = "token"
    cap: float | None = None
    eps_low: float = 0.2
    eps_high: float = 0.2

    corrects_mu: ClassVar[bool] = True
    operator: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_level(self)
        check_clip(self, self.eps_low, self.eps_high)
        if self.cap is not None:
            check_positive(self, "cap")

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.level

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.level == "sequence" and self.cap is None

    @property
    def on_policy(self) -> float:  # type: ignore[override]
        return 1.0 if self.cap is None else min(1.0, self.cap)

    def _log_high(self, lost: Tensor) -> float | Tensor:
        """log of the upper clip, where the cap takes ``lost`` off log w."""
        return math.log1p(self.eps_high)

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_r(logp, rollout)
        log_w = at_level(log_rho(logp, rollout) - log_ratio, self.level)
        capped = log_w if self.cap is None else log_w.clamp(max=math.log(self.cap))
        kept = ~is_clipped(log_ratio, advantage, self._log_high(log_w - capped), log1m(self.eps_low))
        return torch.where(kept, exp(capped + log_ratio, logp, rollout), 0.0)


@corrections.register("acr")
@dataclass(frozen=True)
class ACR(DecoupledPPO):
    """``W = min(w, cap) r`` where not clipped, w = pi_old / mu, the upper clip at (1 + eps_high) w / min(w, cap): what
    the cap takes from a success, the clip leaves it as room (adaptive clipping range of QuRL, arXiv 2602.13953).

    The formula is from a public note on the paper. With one step a rollout it is ``truncated-is`` of the same cap; the
    default cap is ours.

    Use: for rollouts on bytes (``rollout_dtype=int8``) with several steps each, for which it was made.
    """

    cap: float | None = 2.0

    def _log_high(self, lost: Tensor) -> Tensor:
        return math.log1p(self.eps_high) + lost


@corrections.register("mix-ppo")
@dataclass(frozen=True)
class MixPPO(TrustRegion):
    """``W = rho``, and 0 where A > 0 and rho > s + eps_high, or A < 0 and rho < s - eps_low, s = pi_old / mu: PPO's
    clip about a stored token's ratio of when the update began (mix-policy PPO of ReMix, arXiv 2507.06892).

    ``base`` has s (1 +- eps) for it. Where pi_old wrote, both are PPO's clip.

    Use: with ``batch=replay`` and several steps a rollout.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2

    corrects_mu: ClassVar[bool] = True
    operator: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_clip(self, self.eps_low, self.eps_high)

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_rho(logp, rollout)
        rho, s = (x.clamp(max=MAX_LOG_WEIGHT).exp() for x in (log_ratio, log_ratio - log_r(logp, rollout)))
        kept = ~is_clipped(rho - s, advantage, self.eps_high, -self.eps_low)
        return torch.where(kept, exp(log_ratio, logp, rollout), 0.0)


@corrections.register("a-3po")
@dataclass(frozen=True)
class A3PO(Correction):
    """``W = rho`` where not clipped, the clip on rho ** alpha: decoupled PPO about a policy between mu and pi (arXiv
    2512.06547; token-mean).

    That policy, log q = alpha log mu + (1 - alpha) log pi, stands for pi_old without its forward; alpha is 1 / d at a
    lag of d updates in the paper. mu lags by layers here, not by updates, so that alpha is a setting: our reading. At 1
    it is PPO's clip about mu, and the nearer to 0, the wider the clip.

    Use: in place of ``base`` where the forward of pi_old is too dear.
    """

    alpha: float = 0.5
    eps_low: float = 0.2
    eps_high: float = 0.2

    scope: ClassVar[str] = "token"
    operator: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_clip(self, self.eps_low, self.eps_high)
        if not 0 < self.alpha <= 1:
            raise UsageError(f"A3PO.alpha={self.alpha!r} must lie in (0, 1]")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_rho(logp, rollout)
        kept = ~is_clipped(self.alpha * log_ratio, advantage, math.log1p(self.eps_high), log1m(self.eps_low))
        return torch.where(kept, exp(log_ratio, logp, rollout), 0.0)
