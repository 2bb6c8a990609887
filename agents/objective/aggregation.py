"""Aggregations: the coefficient of every token in the loss of a minibatch.

    coef = aggregation(mask)                       # mask of the WHOLE minibatch
    loss = -(coef * weight * advantage[:, None] * logp).sum()

Since the coefficients already hold the minibatch's normaliser, the sums over micro-batches add up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from registry import UsageError, aggregations


@aggregations.register("token-mean")
@dataclass(frozen=True)
class TokenMean:
    """Every token of the minibatch counts alike: ``1 / tokens`` (DAPO, arXiv 2503.14476, eq. 8)."""

    def __call__(self, mask: Tensor) -> Tensor:
        """[B, T] float32 of mask [B, T]."""
        return mask.float() / mask.sum().clamp(min=1)


@aggregations.register("sequence-mean")
@dataclass(frozen=True)
class SequenceMean:
    """Every completion counts alike, and its tokens share its part: ``1 / (B * length)`` (GRPO, arXiv 2402.03300,
    eq. 3)."""

    def __call__(self, mask: Tensor) -> Tensor:
        """[B, T] float32 of mask [B, T]."""
        return mask.float() / (mask.sum(1, keepdim=True).clamp(min=1) * max(len(mask), 1))


@aggregations.register("constant")
@dataclass(frozen=True)
class Constant:
    """A sum with a constant divisor: ``1 / (B * max_tokens)``, the only one that leaves the policy gradient's direction
    untouched when lengths differ. With 1 (the default) it is the policy gradient itself, whose norm grows with the
    length: ``max_grad_norm`` then clips every step, so that each batch's own norm divides its gradient. Dr. GRPO (arXiv
    2503.20783) sets the token budget."""

    max_tokens: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"Constant.max_tokens={self.max_tokens!r} must be at least 1")

    def __call__(self, mask: Tensor) -> Tensor:
        """[B, T] float32 of mask [B, T]."""
        return mask.float() / (max(len(mask), 1) * self.max_tokens)
