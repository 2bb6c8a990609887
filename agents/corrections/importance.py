"""Importance ratios pi / mu: whole, partial, truncated and tempered."""

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
    log_rho,
)
from agents.rollout import Rollout
from registry import UsageError, corrections


@corrections.register("none")
@dataclass(frozen=True)
class NoCorrection(Correction):
    """``W = 1``: the completions are treated as the target's own. On policy it is REINFORCE or RLOO (by the advantage);
    under a layer subset it follows the gradient of another objective.

    Use: as the control, and where D is below 0.3: there any correction works.
    """

    scope: ClassVar[str] = "token"
    is_identity: ClassVar[bool] = True
    corrects_mu: ClassVar[bool] = False
    operator: ClassVar[str] = "none"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(torch.zeros_like(logp, dtype=torch.float64), logp, rollout)


@corrections.register("token-is")
@dataclass(frozen=True)
class TokenIS(Correction):
    """``W_t = rho_t``: the ratio of each token by itself. Low variance; the prefix and the continuation stay mu's, so
    it is biased unless T = 1.

    It is also the mean over its coins of OBRS (Jackpot, arXiv 2602.06107), but for a factor: a token is kept with
    probability min(1, lam rho_t) and then weighs Z max(rho_t, 1 / lam), Z being the share that is kept.

    Use: as the plain baseline of the others; with several steps a rollout as ``token-is*ppo-clip``, which is ``base``.
    """

    scope: ClassVar[str] = "token"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(log_rho(logp, rollout), logp, rollout)


@corrections.register("prefix-is")
@dataclass(frozen=True)
class PrefixIS(Correction):
    """``W_t = w_{1:t}``: the ratio up to each token (per-decision importance sampling, Precup et al. 2000). Corrects
    the state distribution and the action; the value of the continuation stays mu's.

    Use: in the lab, to see what correcting the prefixes alone gives; in training ``minpro`` has less variance.
    """

    scope: ClassVar[str] = "sequence"
    geometry: ClassVar[str] = "prefix"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(log_rho(logp, rollout).cumsum(1), logp, rollout)


@corrections.register("minpro")
@dataclass(frozen=True)
class MinPRO(Correction):
    """``W_t = rho_t * min_{s<t} rho_s``: of the ratio up to each token, the smallest factor stands for the prefix, so
    that a doubtful prefix counts less without a product that grows with t (arXiv 2601.22718).

    Our reading of what is public: the ratio of the token by itself, no clip, and 1 for the empty prefix.

    Use: in place of ``prefix-is`` at D of 1 and more, where the product of ratios has too much variance.
    """

    scope: ClassVar[str] = "sequence"
    geometry: ClassVar[str] = "prefix"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_rho(logp, rollout)
        before = log_ratio.cummin(1).values[:, :-1]
        return exp(log_ratio + torch.nn.functional.pad(before, (1, 0)), logp, rollout)


@corrections.register("suffix-is")
@dataclass(frozen=True)
class SuffixIS(Correction):
    """``W_t = w_{t:T}``: the ratio from each token on. Corrects the action and its continuation; the distribution of
    the prefixes stays mu's.

    Use: in the lab, to see what correcting the continuation alone gives; in training ``retrace-product`` has less
    variance.
    """

    scope: ClassVar[str] = "sequence"
    geometry: ClassVar[str] = "suffix"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(log_rho(logp, rollout).flip(1).cumsum(1).flip(1), logp, rollout)


@corrections.register("sequence-is")
@dataclass(frozen=True)
class SequenceIS(Correction):
    """``W = w_{1:T}`` on every token: exactly unbiased, with a variance of about exp(2D), D = T * KL.

    Use: as the unbiased reference, at D below 0.3. At D = 2 it keeps .03 of the on-policy ascent in the lab.
    """

    scope: ClassVar[str] = "sequence"
    unbiased: ClassVar[bool] = True

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(at_level(log_rho(logp, rollout), "sequence"), logp, rollout)


@corrections.register("truncated-is")
@dataclass(frozen=True)
class TruncatedIS(Correction):
    """``W = min(w, cap)``, w the ratio of the token or of the sequence: truncated importance sampling (Ionides 2008;
    for the mismatch of sampler and trainer, Yao et al. 2025, "TIS"). Loses the mass of the tail; second moment <=
    cap^2.

    Use: as the first choice for nested rollouts and for those on bytes: bounded, by token, without a condition on
    groups.
    """

    level: str = "token"
    cap: float = 2.0

    operator: ClassVar[str] = "truncate"

    def __post_init__(self) -> None:
        check_level(self)
        check_positive(self, "cap")

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.level

    @property
    def on_policy(self) -> float:  # type: ignore[override]
        return min(1.0, self.cap)

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(at_level(log_rho(logp, rollout), self.level).clamp(max=math.log(self.cap)), logp, rollout)


@corrections.register("tempered")
@dataclass(frozen=True)
class Tempered(Correction):
    """``W = w ** beta``: between no correction (0) and the full ratio (1), by token or by sequence (flattened
    importance weights, Shimodaira 2000).

    Use: at D from 0.3 to 2, where the whole ratio has too much variance and the token's too much bias.
    """

    beta: float = 0.5
    level: str = "sequence"

    operator: ClassVar[str] = "temper"

    def __post_init__(self) -> None:
        check_level(self)
        if not 0 <= self.beta <= 1:
            raise UsageError(f"Tempered.beta={self.beta!r} must lie in [0, 1]")

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.level

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.level == "sequence" and self.beta == 1

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(self.beta * at_level(log_rho(logp, rollout), self.level), logp, rollout)


@corrections.register("vespo")
@dataclass(frozen=True)
class VESPO(Correction):
    """``W = w^k exp(lam (1 - w))``, w = w_{1:T}, k and lam by the sign of A: a soft gate on the sequence's ratio, 1 at
    w = 1 and 0 at both ends (arXiv 2602.10693; constants and token-mean as in TRL). W is largest at w = k / lam: below
    1 for successes, above 1 for failures.

    Use: to compare with TRL's loss of that name. In the lab ``truncated-is`` keeps more of the ascent.
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0

    scope: ClassVar[str] = "sequence"
    operator: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        check_positive(self, "k_pos", "lam_pos", "k_neg", "lam_neg")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_w = at_level(log_rho(logp, rollout), "sequence").clamp(max=MAX_LOG_WEIGHT)
        failed = advantage[:, None] < 0
        k = torch.where(failed, self.k_neg, self.k_pos)
        lam = torch.where(failed, self.lam_neg, self.lam_pos)
        return exp(k * log_w - lam * torch.expm1(log_w), logp, rollout)


@corrections.register("topr")
@dataclass(frozen=True)
class TOPR(Correction):
    """``W = 1`` where A > 0, ``min(1, w_{1:T})`` where A < 0: successes as in supervised training, failures only as far
    as the target would still write them (arXiv 2503.14286, eq. 8).

    Use: off-policy with few successes, none of which it weighs down.
    """

    scope: ClassVar[str] = "sequence"
    operator: ClassVar[str] = "truncate"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_w = at_level(log_rho(logp, rollout), "sequence").clamp(max=0.0)
        return exp(torch.where(advantage[:, None] < 0, log_w, 0.0), logp, rollout)
