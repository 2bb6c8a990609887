"""Masks: what the target would hardly have written is dropped, by token or with its whole completion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.corrections.correction import (
    Correction,
    at_level,
    check_level,
    check_positive,
    exp,
    log_rho,
    mean_over_tokens,
)
from agents.rollout import Rollout
from registry import UsageError, corrections


@corrections.register("masked-is")
@dataclass(frozen=True)
class MaskedIS(Correction):
    """``W = w`` if low <= w <= high, else 0: masked importance sampling (on tokens with these bounds, IcePop of
    Ring-1T, arXiv 2510.18855).

    Use: where tokens of large ratio are errors of the sampler, such as those of rollouts on bytes.
    """

    level: str = "token"
    low: float = 0.5
    high: float = 5.0

    operator: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        check_level(self)
        _check_band(self, self.low, self.high)

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.level

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_w = at_level(log_rho(logp, rollout), self.level)
        return torch.where(_inside(log_w, self.low, self.high), exp(log_w, logp, rollout), 0.0)


@corrections.register("geometric-mask")
@dataclass(frozen=True)
class GeometricMask(Correction):
    """``W = 1`` if the geometric mean of the sequence's ratios lies in [low, high], else 0: drops whole completions
    that the target would not have written. It filters and does not correct.

    Use: beside a correction of mu, against completions of a broken nested policy: ``geometric-mask*truncated-is``.
    """

    low: float = 0.5
    high: float = 2.0

    scope: ClassVar[str] = "sequence"
    corrects_mu: ClassVar[bool] = False
    operator: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        _check_band(self, self.low, self.high)

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        mean = mean_over_tokens(log_rho(logp, rollout), rollout.mask)
        kept = _inside(mean, self.low, self.high)
        return torch.where(kept, exp(torch.zeros_like(mean), logp, rollout), 0.0)


@corrections.register("opsm")
@dataclass(frozen=True)
class OffPolicySequenceMask(Correction):
    """``W = 1`` if A >= 0 or mean_t log(mu / pi) <= delta, else 0: drops failures that the target would hardly write
    now (off-policy sequence masking of DeepSeek-V3.2, arXiv 2512.02556).

    It filters, and a trust region beside it, ``opsm*ppo-clip``, makes the published loss. The mean is over what the
    update moved too, so a product evaluates it at pi. The default delta, in nats a token, is ours.

    Use: with stale or replayed batches and several steps a rollout, as ``opsm*ppo-clip``.
    """

    delta: float = 0.1

    scope: ClassVar[str] = "sequence"
    corrects_mu: ClassVar[bool] = False
    at_pi: ClassVar[bool] = True
    operator: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        check_positive(self, "delta")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        drift = -mean_over_tokens(log_rho(logp, rollout), rollout.mask)
        kept = (advantage[:, None] >= 0) | (drift <= self.delta)
        return torch.where(kept, exp(torch.zeros_like(drift), logp, rollout), 0.0)


@corrections.register("trm")
@dataclass(frozen=True)
class TrustRegionMask(Correction):
    """``W = 1`` if |log rho_t| <= delta for every token, else 0: drops a completion for its worst token (trust region
    masking, arXiv 2512.23075). Its bound on the surrogate's error is by the largest divergence of a token, which no
    token's weight can hold.

    The paper's rule has the KL of whole distributions; |log rho| is its estimate of the largest from the tokens that
    were sampled. The default delta, in nats, is ours; the longer the completions, the more of them have such a token.

    Use: with short completions, as ``trm*ppo-clip``.
    """

    delta: float = 1.0

    scope: ClassVar[str] = "sequence"
    corrects_mu: ClassVar[bool] = False
    operator: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        check_positive(self, "delta")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_rho(logp, rollout)
        left = (log_ratio.abs() > self.delta).any(1, keepdim=True)
        return torch.where(left, 0.0, exp(torch.zeros_like(log_ratio), logp, rollout))


@corrections.register("first-tokens")
@dataclass(frozen=True)
class FirstTokens(Correction):
    """``W = 1`` on a completion's first ``tokens`` tokens, else 0: what UPFT learns from unlabelled completions (arXiv
    2503.02875), which agree in their beginnings whether right or wrong.

    Use: beside ``advantage=unlabelled``, as the agent ``upft`` has it.

    Attributes:
        tokens: k, 8 to 32 in the paper.
        whole: the completions of every so many-th problem of a batch are learnt whole, the paper's share of full traces
            (our reading of it); 0 for none.
    """

    tokens: int = 8
    whole: int = 0

    scope: ClassVar[str] = "sequence"
    on_policy: ClassVar[None] = None
    corrects_mu: ClassVar[bool] = False
    operator: ClassVar[str] = "none"
    geometry: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.whole < 0:
            raise UsageError(f"FirstTokens: tokens={self.tokens!r} must be at least 1, whole={self.whole!r} at least 0")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        kept = (torch.arange(logp.shape[1], device=logp.device) < self.tokens).expand(logp.shape)
        if self.whole:
            kept = kept | (rollout.group % self.whole == 0)[:, None]
        return torch.where(kept, exp(torch.zeros_like(logp, dtype=torch.float64), logp, rollout), 0.0)


def _check_band(owner: Correction, low: float, high: float) -> None:
    if not 0 <= low <= 1 <= high:
        raise UsageError(f"{type(owner).__name__}: low={low!r} and high={high!r} must satisfy 0 <= low <= 1 <= high")


def _inside(log_w: Tensor, low: float, high: float) -> Tensor:
    return (log_w >= (math.log(low) if low > 0 else -math.inf)) & (log_w <= math.log(high))
