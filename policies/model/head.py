"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits.

Full logits of 8k tokens and a vocabulary of 152k take 5 GB in float32, and as much again for their gradient. Here some
rows at a time are projected and reduced, and in the backward some columns, so memory does not grow with tokens times
vocabulary. Logits are float32 whatever the compute dtype, as in rollouts: bfloat16 ones are 0.125 apart at 16 to 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policies.model.compute import scoring_head_kernels
from policies.model.entropy import chunked_entropy
from policies.model.products import float_product, operand, outer_product, product
from policies.native import PANEL, Kernels
from policies.sharding import trainable
from registry.memory import return_freed

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**25}  # numbers of a chunk: 64 MB in float32, where twice as many are no faster
KEPT = 2**27  # most exponentials kept for the backward of one micro-batch: 256 MB


class _ChunkedLogp(torch.autograd.Function):
    """Forward keeps the rows' logsumexp and, where compiled, a bounded number of exponentials; backward projects again
    for the others and uses d logp = onehot - softmax."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor, projection: _Projection, keep: bool) -> Tensor:
        if keep:
            _clear(hidden, weight)
        logp, normaliser = projection.logp(hidden, token, keep)
        ctx.save_for_backward(hidden, weight, token, normaliser)
        ctx.projection = projection
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token, normaliser = ctx.saved_tensors
        projection: _Projection = ctx.projection
        _clear(hidden, weight)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        scale = (grads[0] / projection.temperature).contiguous()
        rounded = hidden.to(projection.dtype)
        for begin, end in _columns(hidden, len(weight)):
            slope = projection.slope(rounded, token, normaliser, scale, begin, end)
            if grad_hidden is not None:
                grad_hidden += product(slope, weight[begin:end].to(projection.dtype).t())
            if grad_weight is not None:
                grad_weight[begin:end] = outer_product(slope, rounded)
        return grad_hidden, grad_weight, None, None, None


class _TorchProjection:
    """Logits in float32 from operands rounded to the compute dtype."""

    def __init__(self, weight: Tensor, temperature: float, dtype: torch.dtype) -> None:
        self.weight = operand(weight, dtype)
        self.temperature = temperature
        self.dtype = dtype

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return float_product(hidden.to(self.dtype), weight).div_(self.temperature)

    def logp(self, hidden: Tensor, token: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        scores = torch.empty(2, len(hidden), device=hidden.device)
        step = max(1, chunk_logits(hidden.device) // len(self.weight))
        for begin in range(0, len(hidden), step):
            rows = slice(begin, begin + step)
            logits = self._logits(hidden[rows], self.weight)
            scores[1, rows] = logits.logsumexp(-1)
            scores[0, rows] = logits.gather(1, token[rows, None])[:, 0] - scores[1, rows]
        return scores[0], scores[1]

    def slope(self, hidden: Tensor, token: Tensor, normaliser: Tensor, scale: Tensor, begin: int, end: int) -> Tensor:
        softmax = self._logits(hidden, self.weight[begin:end]).sub_(normaliser[:, None]).exp_()
        slope = softmax.mul_(-scale[:, None])
        every = torch.arange(len(hidden), device=hidden.device)
        here = torch.where((token >= begin) & (token < end), scale, 0)
        slope[every, (token - begin).clamp(0, end - begin - 1)] += here
        return slope.to(self.dtype)  # rounded last: 1 - p of a sure token is less than a step of bfloat16 at p


class _CompiledProjection:
    """The same for bfloat16 on a CPU, float32 accumulators reduced in registers."""

    dtype = torch.bfloat16

    def __init__(self, kernels: Kernels, weight: Tensor, temperature: float) -> None:
        self.kernels = kernels
        self.vocabulary = len(weight)
        self.panels = kernels.pack_head(weight.detach().bfloat16().contiguous())
        self.temperature = temperature

    def logp(self, hidden: Tensor, token: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        rows = hidden.bfloat16().contiguous()
        panels = min(len(self.panels), KEPT // (len(rows) * PANEL)) if keep else 0
        self.kept = rows.new_empty(panels, len(rows), PANEL)
        logp, normaliser, self.peak = self.kernels.head_logp(
            rows, self.panels, self.vocabulary, self.temperature, token.contiguous(), self.kept
        )
        self.rest = -torch.expm1(logp)  # 1 - p of each row's own token; from the kernel's rounded p it would be noise
        return logp, normaliser

    def slope(self, hidden: Tensor, token: Tensor, normaliser: Tensor, scale: Tensor, begin: int, end: int) -> Tensor:
        rows, factors = hidden.bfloat16().contiguous(), (normaliser.contiguous(), scale.contiguous())
        panels = slice(begin // PANEL, -(-end // PANEL))
        kept = self.kept[panels], self.peak[:, panels]
        slope = self.kernels.head_slope(rows, self.panels[panels], end - begin, self.temperature, factors, kept)
        own = ((token >= begin) & (token < end)).nonzero()[:, 0]
        slope[own, token[own] - begin] = (scale * self.rest)[own].to(slope.dtype)
        return slope


_Projection = _TorchProjection | _CompiledProjection


def _projection(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> _Projection:
    kernels = scoring_head_kernels(hidden.device, dtype, hidden.shape[1])
    if kernels is not None:
        return _CompiledProjection(kernels, weight, temperature)
    return _TorchProjection(weight, temperature, dtype)


def chunk_logits(device: torch.device) -> int:
    """How many logits there are at a time on ``device``."""
    return CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cpu"])


def _clear(hidden: Tensor, weight: Tensor) -> None:
    """On a CPU and before several chunks: give back what is free. Chunks are taken from the heap, those of one
    micro-batch do not quite fit where those of the last one were, and each time more of it would lie between them."""
    if hidden.device.type == "cpu" and len(hidden) * len(weight) > chunk_logits(hidden.device):
        return_freed()


def _columns(hidden: Tensor, vocabulary: int) -> list[tuple[int, int]]:
    """Parts of the vocabulary for the backward: a part's weights then have their whole gradient at once."""
    step = max(1, chunk_logits(hidden.device) // len(hidden) // PANEL) * PANEL
    return [(begin, min(begin + step, vocabulary)) for begin in range(0, vocabulary, step)]


def chunked_logp(hidden: Tensor, weight: Tensor, token: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[token], with its own backward.

    Args:
        hidden: [N, width].
        weight: [V, width], the head's.
        token: [N] int64, in [0, V).
        temperature: positive.
        dtype: that the operands of the matrix products are rounded to; everything else is float32.

    Returns:
        [N] float32.
    """
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedLogp.apply(hidden, weight, token, _projection(hidden, weight, temperature, dtype), keep)


class TrainableHead:
    """The output projection of updates: log-probabilities with gradients to its ``weight`` [V, width]."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def logp(self, hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
        """[N] float32, see ``chunked_logp``."""
        return chunked_logp(hidden, trainable(self.weight), token, temperature, self.dtype)

    def logp_and_entropy(self, hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
        """[N, 2] float32, see ``entropy.chunked_entropy``."""
        return torch.stack(chunked_entropy(hidden, trainable(self.weight), token, temperature, self.dtype), 1)


def logp_of(project: Callable[[Tensor], Tensor], hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
    """As ``chunked_logp``, of any head without a gradient: ``project`` maps [n, width] to logits [n, V] float32."""
    rows = 2**10
    parts = [
        project(part).div_(temperature).log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        for part, chosen in zip(hidden.split(rows), token.split(rows), strict=True)
    ]
    return torch.cat(parts)
