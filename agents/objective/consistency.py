"""Keeps nested policies near their target: an auxiliary loss on the rollout's own tokens, off by default.

The gradient of KL(pi || mu) per token, the target pi held fixed, is -E_mu[(rho - 1) grad log mu] with rho = pi / mu:
the expectation of rho grad log mu is taken on the tokens that mu wrote, and since E_mu[grad log mu] = 0 the 1 only
takes variance away. So the tokens of the rollout serve as they are, the target's log-probabilities are those that the
policy gradient needs anyway, and the cost is a forward and a backward of the nested layers. It acts like stochastic
depth (Huang et al., arXiv 1603.09382) aimed at the target instead of at the data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.rollout import Rollout
from policies import Nested, Policy

CAP = 10.0  # of rho: one token in a thousand would otherwise be most of the gradient; above it the pull is too weak


@dataclass
class Consistency:
    """Of one update: ``coefficient`` times the KL, added to the loss; the aggregation's mean over the tokens that take
    part, however many completions of the minibatch have no advantage and are not scored.

    Attributes:
        coefficient: weight beside the policy loss; 0 switches it off.
        seconds: what it has cost so far.
    """

    coefficient: float = 0.0
    seconds: float = 0.0

    def coefficients(self, batch: Rollout, scored: Tensor, aggregation: Any) -> Tensor:
        """[B, T] of a whole minibatch, by ``aggregation`` over the completions at ``scored`` that mu wrote itself; 0
        elsewhere.

        Completions that the target wrote (defensive groups) and stored ones are left out: the tokens have to be mu's
        own. In later minibatches of a rollout, and where older weights write, they are those of a mu some steps old."""
        own = torch.zeros(len(batch), dtype=torch.bool)
        own[scored] = True
        if batch.by_target is not None:
            own &= ~batch.by_target
        if batch.age is not None:
            own &= batch.age == 0
        coef = torch.zeros_like(batch.behavior_logp)
        if self.coefficient and own.any():
            coef[own] = aggregation(batch.mask[own]).to(coef)
        return coef

    def backward(self, policy: Policy, nested: Nested | None, batch: Rollout, logp: Tensor, coef: Tensor) -> None:
        """Add the gradient on ``batch``, which ``nested`` wrote (None: the full model, and there is no gradient); its
        tokens have log pi ``logp`` [B, T] and coefficients ``coef`` [B, T]."""
        if not self.coefficient or nested is None:
            return
        began = time.perf_counter()
        own = policy.logprobs(batch.prompts, batch.tokens, batch.mask, layers=nested)
        own = own.to(logp.device)
        rho = (logp - own.detach()).exp().clamp(max=CAP)
        (-(self.coefficient * coef * (rho - 1)).detach() * own).sum().backward()
        self.seconds += time.perf_counter() - began

    def spent(self) -> dict[str, float]:
        """``time/consistency``, seconds that are also part of the update's; empty where it is off."""
        return {"time/consistency": self.seconds} if self.coefficient else {}
