"""Log-probabilities and entropies of next-token distributions, both with gradients, without ever holding all logits.

As ``policies.model.head``, of which it is the slower sister: with p = softmax(logits) and H = -sum p log p,
d log p_y / d logits = onehot - p and d H / d logits = -p (log p + H). Nothing of it is compiled: it is asked for only
where an entropy is part of a loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policies.model.products import float_product, operand, outer_product, product
from policies.native import PANEL

_CHUNK_LOGITS = 2**24  # of one chunk in float32: 64 MB, and a few temporaries of that size


class _ChunkedEntropy(torch.autograd.Function):
    """Forward keeps logsumexp and entropy of the rows; backward projects again, some columns at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor, temperature: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        head = operand(weight, dtype)
        normaliser, entropy, logp = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        step = max(1, _CHUNK_LOGITS // len(weight))
        for begin in range(0, len(hidden), step):
            rows = slice(begin, begin + step)
            logits = float_product(hidden[rows].to(dtype), head).div_(temperature)
            normaliser[rows] = logits.logsumexp(-1)
            logits -= normaliser[rows, None]
            logp[rows] = logits.gather(1, token[rows, None])[:, 0]
            entropy[rows] = -(logits.exp() * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, token, normaliser, entropy)
        ctx.temperature, ctx.dtype = temperature, dtype
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token, normaliser, entropy = ctx.saved_tensors
        head = operand(weight, ctx.dtype)
        rounded = hidden.to(ctx.dtype)
        by_logp, by_entropy = (grad[:, None] / ctx.temperature for grad in grads)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        every = torch.arange(len(hidden), device=hidden.device)
        step = max(1, _CHUNK_LOGITS // (max(len(hidden), 1) * PANEL)) * PANEL
        for begin in range(0, len(weight), step):
            end = min(begin + step, len(weight))
            log_p = float_product(rounded, head[begin:end]).div_(ctx.temperature).sub_(normaliser[:, None])
            slope = -log_p.exp() * (by_logp + by_entropy * (log_p + entropy[:, None]))
            here = torch.where((token >= begin) & (token < end), by_logp[:, 0], 0.0)
            slope[every, (token - begin).clamp(0, end - begin - 1)] += here
            slope = slope.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden += product(slope, weight[begin:end].to(ctx.dtype).t())
            if grad_weight is not None:
                grad_weight[begin:end] = outer_product(slope, rounded)
        return grad_hidden, grad_weight, None, None, None


def chunked_entropy(
    hidden: Tensor, weight: Tensor, token: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[token] and that distribution's entropy, in nats.

    Args:
        hidden: [N, width].
        weight: [V, width], the head's.
        token: [N] int64, in [0, V).
        temperature: positive.
        dtype: that the operands of the matrix products are rounded to; everything else is float32.

    Returns:
        [N] and [N] float32.
    """
    logp, entropy = _ChunkedEntropy.apply(hidden, weight, token, temperature, dtype)
    return logp, entropy
