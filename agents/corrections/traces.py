"""Traces: how much of a terminal reward's credit reaches a token, through what was sampled after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.corrections.correction import Correction, check_positive, exp, log_rho
from agents.rollout import Rollout
from registry import UsageError, corrections


@corrections.register("retrace")
@dataclass(frozen=True)
class Retrace(Correction):
    """``W_t = lam * min(1, rho_t)``: the trace coefficient of Retrace(lam) on the token alone, without the product.

    This is our reading of Nested-ReFT's *retrace* variant, whose text is not public. The operator of Munos et al.
    with its product of traces is ``retrace-product``.

    Use: for the paper's variant. With lam = 1 it is ``truncated-is`` with a cap of 1.
    """

    lam: float = 1.0

    scope: ClassVar[str] = "token"
    operator: ClassVar[str] = "truncate"

    def __post_init__(self) -> None:
        _check_lam(self, self.lam)

    @property
    def on_policy(self) -> float:  # type: ignore[override]
        return self.lam

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        return exp(math.log(self.lam) + log_rho(logp, rollout).clamp(max=0.0), logp, rollout)


@corrections.register("retrace-product")
@dataclass(frozen=True)
class RetraceProduct(Correction):
    """``W_t = rho_t * prod_{s>t} lam * min(1, rho_s)``: Retrace(lam) of Munos et al. 2016 (arXiv 1606.02647, eq. 3)
    with a terminal reward. E_mu[min(1, rho)] = 1 - TV, so 1 % of TV per token leaves 5 % of the credit after 300
    tokens: lam = 1 by default.

    Use: at D near 1, in place of ``suffix-is``: traces that are cut have less variance.
    """

    lam: float = 1.0

    scope: ClassVar[str] = "sequence"
    operator: ClassVar[str] = "truncate"
    geometry: ClassVar[str] = "suffix"

    def __post_init__(self) -> None:
        _check_lam(self, self.lam)

    @property
    def on_policy(self) -> float | None:  # type: ignore[override]
        return 1.0 if self.lam == 1 else None

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_rho(logp, rollout)
        traces = torch.where(rollout.mask, math.log(self.lam) + log_ratio.clamp(max=0.0), 0.0)
        return exp(log_ratio + _sum_after(traces), logp, rollout)


@corrections.register("v-trace")
@dataclass(frozen=True)
class VTrace(Correction):
    """``W_t = min(rho_bar, rho_t) * prod_{t<s<T} min(c_bar, rho_s) * min(rho_bar, rho_T)``: V-trace of IMPALA (Espeholt
    et al. 2018, arXiv 1802.01561, eq. 1) with a terminal reward. For t = T the last factor counts once.

    Use: where variance is what hurts, at D from 0.3 on: it has the least of all in the lab.
    """

    rho_bar: float = 1.0
    c_bar: float = 1.0

    scope: ClassVar[str] = "sequence"
    operator: ClassVar[str] = "truncate"
    geometry: ClassVar[str] = "suffix"

    def __post_init__(self) -> None:
        check_positive(self, "rho_bar", "c_bar")

    @property
    def on_policy(self) -> float | None:  # type: ignore[override]
        return 1.0 if min(self.rho_bar, self.c_bar) >= 1 else None

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_rho(logp, rollout)
        at_rho_bar = log_ratio.clamp(max=math.log(self.rho_bar))
        after = _sum_after(rollout.mask.long())
        traces = torch.where(after == 0, at_rho_bar, log_ratio.clamp(max=math.log(self.c_bar)))
        return exp(at_rho_bar + _sum_after(torch.where(rollout.mask, traces, 0.0)), logp, rollout)


def _check_lam(owner: Correction, lam: float) -> None:
    if not 0 < lam <= 1:
        raise UsageError(f"{type(owner).__name__}.lam={lam!r} must lie in (0, 1]")


def _sum_after(values: Tensor) -> Tensor:
    """[B, T]: at each t the sum over s > t."""
    return values.flip(1).cumsum(1).flip(1) - values
