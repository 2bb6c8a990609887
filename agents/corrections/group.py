"""Corrections whose weight depends on the other completions: of the group, or of the whole minibatch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.corrections.correction import (
    SCOPES,
    Correction,
    at_level,
    check_level,
    check_positive,
    exp,
    log_rho,
)
from agents.rollout import Rollout
from registry import UsageError, corrections

REFINEMENTS = 10  # of a bracket, by 8 each: beta to 1e-9


@corrections.register("self-normalised")
@dataclass(frozen=True)
class SelfNormalised(Correction):
    """``W_i = w_i / mean_j w_j``, w = w_{1:T}, j over the group or the minibatch: self-normalised importance sampling
    (Owen, Monte Carlo theory, methods and examples, ch. 9.2). Bias O(1/n), W <= n.

    Use: at D from 0.3 to 2 with large groups, where the target writes none of them: next to ``defensive`` in the lab.
    """

    over: str = "group"

    operator: ClassVar[str] = "normalise"

    def __post_init__(self) -> None:
        if self.over not in SCOPES[2:]:
            raise UsageError(f"SelfNormalised.over={self.over!r} is not 'group' or 'batch'")

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.over

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_w = at_level(log_rho(logp, rollout), "sequence").squeeze(1)
        member, size = _groups(rollout.group if self.over == "group" else torch.zeros_like(rollout.group))
        highest = torch.full_like(size, -math.inf).scatter_reduce(0, member, log_w, "amax")
        total = torch.zeros_like(size).scatter_add(0, member, (log_w - highest[member]).exp())
        log_mean = highest + total.log() - size.log()
        return exp((log_w - log_mean[member])[:, None], logp, rollout)


@corrections.register("ess-adaptive")
@dataclass(frozen=True)
class ESSAdaptive(Correction):
    """``W = w ** beta`` with the largest beta in [0, 1] whose effective sample size over the minibatch is at least
    ``ess`` (a fraction): as much correction as the divergence at hand allows. The rule by which annealed and sequential
    Monte Carlo choose their temperatures (Del Moral, Doucet and Jasra 2012).

    AIS (arXiv 2605.13907) adapts to each batch as well, by a mean of 1 and w whose share is of three diagnostics.

    Use: where D changes during a run, since no setting depends on it.
    """

    ess: float = 0.5
    level: str = "sequence"

    scope: ClassVar[str] = "batch"
    operator: ClassVar[str] = "temper"

    def __post_init__(self) -> None:
        check_level(self)
        if not 0 < self.ess <= 1:
            raise UsageError(f"ESSAdaptive.ess={self.ess!r} must lie in (0, 1]")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_w = at_level(log_rho(logp, rollout), self.level)
        return exp(self.beta(log_w[rollout.mask] if self.level == "token" else log_w[:, 0]) * log_w, logp, rollout)

    def beta(self, log_w: Tensor) -> float:
        """The largest power of the [N] weights that keeps the effective sample size; ESS falls with the power."""
        low, high = 0.0, 1.0
        for _ in range(REFINEMENTS):
            betas = torch.linspace(low, high, 9, dtype=torch.float64, device=log_w.device)
            enough = int((_ess(betas[:, None] * log_w) >= self.ess).sum()) if len(log_w) else len(betas)
            if enough == len(betas):
                return high
            low, high = float(betas[max(enough - 1, 0)]), float(betas[max(enough, 1)])
        return low


@corrections.register("m2po")
@dataclass(frozen=True)
class M2PO(Correction):
    """``W = rho``, and 0 on the tokens of largest (log rho)^2 until its mean over the others is at most ``moment``: few
    tokens are lost for it (arXiv 2510.01161, eq. 5 and algorithm 1; token-mean).

    As with PPO's clip, only tokens that A pushes away from rho = 1 are counted and dropped: those with A >
    0 and rho > 1, or A < 0 and rho < 1. Tokens as far as the last one dropped go with it.

    Use: under stale weights (``batch=stale``), for which it was made. Ratios of skipped layers are wide from the start,
    so that many tokens are lost there.
    """

    moment: float = 0.04

    scope: ClassVar[str] = "batch"
    operator: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        check_positive(self, "moment")

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        log_ratio = log_rho(logp, rollout)
        outward = rollout.mask & (log_ratio * advantage[:, None] > 0)
        square = log_ratio.square()
        ordered = square[outward].sort().values
        means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
        kept = int((means <= self.moment).sum())  # the means rise with what they are of
        dropped = outward & (square >= ordered[kept]) if kept < len(ordered) else torch.zeros_like(outward)
        return torch.where(dropped, 0.0, exp(log_ratio, logp, rollout))


@corrections.register("defensive")
@dataclass(frozen=True)
class Defensive(Correction):
    """``W = pi / ((n_0/n) pi_old + (n_1/n) mu)`` of the sequence, where the target wrote n_0 of a group's n completions
    and the nested policy n_1: the balance heuristic. It is of Veach and Guibas 1995, for defensive mixtures (Hesterberg
    1995); ``rollout.by_target`` says who wrote what. Exactly unbiased, and W <= n / n_0 while pi = pi_old.

    Needs both densities of *every* completion: ``rollout.behavior_logp`` = log mu of the nested policy, scored on the
    target-written ones, and ``rollout.full_logp`` = log pi_old. With n_0 = 0 it is ``sequence-is``. Stored completions
    that joined a group were written in the same shares, and do not count in them. A leave-one-out baseline (``rloo``)
    leaves out one completion of its own kind, and so adds a bias O(1/n).

    Use: at D above 0.3, or where the gradient must be unbiased: first in the lab at every D. It costs full-model
    completions and a scoring pass.
    """

    scope: ClassVar[str] = "group"
    unbiased: ClassVar[bool] = True
    needs_old_logp: ClassVar[bool] = True
    mixed: ClassVar[bool] = True
    operator: ClassVar[str] = "mix"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        full_logp = rollout.full_logp
        if full_logp is None:
            raise UsageError("defensive needs rollout.old_logp, the target's log-probabilities at rollout time")
        own = torch.ones_like(rollout.mask[:, 0]) if rollout.borrowed is None else ~rollout.borrowed
        by_target = torch.zeros_like(own) if rollout.by_target is None else rollout.by_target & own
        member, size = _groups(rollout.group)
        whole = torch.zeros_like(size).scatter_add(0, member, own.double())
        written = torch.zeros_like(size).scatter_add(0, member, by_target.double())
        share = (written / whole)[member]

        def total(values: Tensor) -> Tensor:
            return torch.where(rollout.mask, values.double(), 0.0).sum(1)

        mixture = torch.logaddexp(share.log() + total(full_logp), (-share).log1p() + total(rollout.behavior_logp))
        return exp((total(logp) - mixture)[:, None], logp, rollout)


def _groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B] group numbers: each sequence's group as 0, 1, ... ([B]) and the groups' sizes ([groups], float64)."""
    _, member, size = torch.unique(group, return_inverse=True, return_counts=True)
    return member, size.double()


def _ess(log_w: Tensor) -> Tensor:
    """Effective sample size of [..., N] log weights as a fraction of N."""
    return (2 * torch.logsumexp(log_w, -1) - torch.logsumexp(2 * log_w, -1)).exp() / log_w.shape[-1]
