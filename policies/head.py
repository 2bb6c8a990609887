"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits.

Full logits of 8k tokens and a vocabulary of 152k take 5 GB in float32, and as much again for their gradient. Here a few
rows at a time are projected and reduced, forward and backward, so memory does not grow with tokens times vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_LOGITS = 2**24  # numbers held at once: 64 MB in float32


class _ChunkedLogp(torch.autograd.Function):
    """Forward keeps the rows' logsumexp; backward projects again and uses d logp = onehot - softmax."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor, temperature: float, dtype: torch.dtype
    ) -> Tensor:
        compute = weight.to(dtype)
        logp = hidden.new_empty(len(hidden), dtype=torch.float32)
        normaliser = torch.empty_like(logp)
        for rows in _chunks(hidden, weight):
            logits = F.linear(hidden[rows].to(dtype), compute).float().div_(temperature)
            normaliser[rows] = logits.logsumexp(-1)
            logp[rows] = logits.gather(1, token[rows, None])[:, 0] - normaliser[rows]
        ctx.save_for_backward(hidden, weight, token, normaliser)
        ctx.temperature, ctx.dtype = temperature, dtype
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token, normaliser = ctx.saved_tensors
        compute = weight.to(ctx.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        for rows in _chunks(hidden, weight):
            x = hidden[rows].to(ctx.dtype)
            scale = grads[0][rows, None] / ctx.temperature
            slope = F.linear(x, compute).float().div_(ctx.temperature)
            slope.sub_(normaliser[rows, None]).exp_().mul_(-scale)
            slope.scatter_add_(1, token[rows, None], scale)
            slope = slope.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (slope @ compute).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += slope.t() @ x
        return grad_hidden, grad_weight, None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    step = max(1, _CHUNK_LOGITS // len(weight))
    return [slice(start, start + step) for start in range(0, len(hidden), step)]


def chunked_logp(hidden: Tensor, weight: Tensor, token: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[token], with its own backward.

    Args:
        hidden: [N, width].
        weight: [V, width], the head's.
        token: [N] int64.
        temperature: positive.
        dtype: of the matrix products; everything else is float32.

    Returns:
        [N] float32.
    """
    return _ChunkedLogp.apply(hidden, weight, token, temperature, dtype)
