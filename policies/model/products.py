"""Matrix products: with backwards of their own where torch's are slow, and with float32 results of half operands.

On a CPU matrix products go through oneDNN: torch sends float32 ones to MKL, which has been seen to run at half
oneDNN's speed on an AMD processor. Small float32 products and float32 gradients of weights go by the compiled tiles.

Logits rounded to bfloat16 are 0.125 apart at 16, too coarse for ratios of probabilities. A GPU multiplies operands of
half precision many times as fast as float32 ones and sums in float32 anyway; torch's ``mm`` hands that out. Elsewhere
the rounded operands are multiplied in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.model.compute import calls_onednn, elementwise_kernels, product_dtype
from policies.native.sizes import LANES
from policies.sharding import gather, sum_parts, whole_shape

_SMALL = 2**17  # weights that stay in the second cache


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for ``x`` [N, K] and ``weight`` [M, K] of one dtype; no gradient.

    oneDNN makes code anew for each N, and every micro-batch has another: for small weights that takes as long as the
    product."""
    if x.dtype == torch.float32 and weight.numel() <= _SMALL and len(weight) % LANES == 0:
        kernels = elementwise_kernels(x)
        if kernels is not None:
            return kernels.small_product(x.contiguous(), weight.t().contiguous())
    wide = product_dtype(x.device, x.dtype)
    if wide != x.dtype:
        return product(x.to(wide), weight.to(wide)).to(x.dtype)
    if calls_onednn(x.device):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def outer_product(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x [M, K] for ``grad`` [N, M] and ``x`` [N, K] of one dtype; no gradient."""
    wide = product_dtype(x.device, x.dtype)
    if wide != x.dtype:
        return outer_product(grad.to(wide), x.to(wide)).to(x.dtype)
    kernels = elementwise_kernels(x) if x.dtype == torch.float32 else None
    if kernels is not None and x.shape[1] % LANES == 0:
        return kernels.outer_product(grad.contiguous(), x.contiguous())
    if x.dtype == torch.float32 and calls_onednn(x.device):
        return product(grad.t(), x.t())
    return grad.t() @ x  # oneDNN reads transposed bfloat16 as it lies


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, biased: bool, *weights: Tensor) -> Tensor:
        biases = weights[len(weights) // 2 :] if biased else ()
        weights = weights[: len(weights) - len(biases)]
        ctx.save_for_backward(x, *weights)
        ctx.biased, ctx.shapes = biased, [whole_shape(weight) for weight in weights]
        y = product(x, _side_by_side(weights, ctx.shapes, x.dtype))
        return y.add_(torch.cat(biases).to(y.dtype)) if biased else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_x, _, *need = ctx.needs_input_grad
        sizes = [_rows(weight, shape) for weight, shape in zip(weights, ctx.shapes, strict=True)]
        slopes: list[Tensor | None] = [
            product(grad, _side_by_side(weights, ctx.shapes, x.dtype).t()) if need_x else None,
            None,
        ]
        if any(need[: len(weights)]):
            for part, w, shape in zip(outer_product(grad, x).split(sizes), weights, ctx.shapes, strict=True):
                slopes.append(part.to(w.dtype) if shape is None else sum_parts(part.to(w.dtype), shape))
        else:
            slopes += [None] * len(weights)
        if ctx.biased:
            slopes += grad.sum(0, dtype=weights[0].dtype).split(sizes)
        return tuple(slopes)


def _rows(weight: Tensor, shape: torch.Size | None) -> int:
    return len(weight) if shape is None else shape[0]


def _side_by_side(weights: Sequence[Tensor], shapes: Sequence[torch.Size | None], dtype: torch.dtype) -> Tensor:
    if len(weights) == 1:
        return weights[0].to(dtype) if shapes[0] is None else gather(weights[0], shapes[0], dtype)
    sizes = [_rows(weight, shape) for weight, shape in zip(weights, shapes, strict=True)]
    width = (shapes[0] or weights[0].shape)[1]
    fused = torch.empty(sum(sizes), width, dtype=dtype, device=weights[0].device)
    for part, weight, shape in zip(fused.split(sizes), weights, shapes, strict=True):
        part.copy_(weight if shape is None else gather(weight, shape, dtype))
    return fused


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
    """[N, M] in the dtype of ``x`` [N, K]: x @ weight.T of each of the ``weights`` [M_i, K], next to each other, plus
    ``biases`` (one [M_i] for each, or none); their gradients are in their own dtype (float32). Split weights
    (``policies.sharding``) are whole during a product."""
    return _Linear.apply(x, bool(biases), *weights, *biases)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, merged: Callable[[], Tensor], scales: tuple[float, ...], *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.merged, ctx.scales = merged, scales
        return product(x, merged())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grad, dtype = grads[0].contiguous(), x.dtype
        slopes: list[Tensor | None] = [product(grad, ctx.merged().t()) if ctx.needs_input_grad[0] else None, None, None]
        downs, ups = factors[::2], factors[1::2]
        parts = grad.split([len(up) for up in ups], dim=1)
        for part, down, up, scale in zip(parts, downs, ups, ctx.scales, strict=True):
            into = outer_product(product(part.contiguous(), up.to(dtype).t()), x)
            out_of = outer_product(part.contiguous(), product(x, down.to(dtype)))
            slopes += [scale * into.to(down.dtype), scale * out_of.to(up.dtype)]
        return tuple(slopes)


def adapted_linear(x: Tensor, merged: Callable[[], Tensor], adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """[N, M] in the dtype of ``x`` [N, K]: x @ merged().T, with gradients to low-rank factors.

    A sum of two rounded products would differ from rollouts, which multiply by the rounded sum W + scale * B A: in
    bfloat16 by as much as a step of a small learning rate changes.

    Args:
        x: inputs.
        merged: gives [M, K] in the dtype of ``x``, the sums of some maps with the same input, next to each other; asked
            again in the backward, so that it need not be kept.
        adapters: by map its factors A [rank, K] and B [M_i, rank], and the scale.
    """
    factors = [factor for down, up, _ in adapters for factor in (down, up)]
    return _AdaptedLinear.apply(x, merged, tuple(scale for _, _, scale in adapters), *factors)


TOLERANCE = 1e-4  # relative to the largest: float32 sums are ten times nearer, a result in bfloat16 forty times farther


def operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [M, K] rounded to ``dtype``, as ``float_product`` takes it."""
    rounded = weight.detach().to(dtype)
    return rounded if is_half_operand(rounded) and can_multiply_halves(rounded.device, dtype) else rounded.float()


def float_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32 [N, M] for ``x`` [N, K] in the dtype that the ``operand`` [M, K] was rounded to; no
    gradient."""
    return product(x.float(), weight) if weight.dtype == torch.float32 else half_product(x, weight)


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    """As ``float_product``, of operands in half precision; only on a GPU."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def is_half_operand(weight: Tensor) -> bool:
    """Whether ``half_product`` is made for such operands."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


@cache
def can_multiply_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``half_product`` gives the float32 sums on ``device``: tried once, with a warning if it does not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 192, generator=generator).to(device, dtype) for size in (40, 304))
    expected = x.double() @ weight.double().T
    try:
        sums = half_product(x, weight)
    except (RuntimeError, TypeError) as raised:
        reason = str(raised).strip().split("\n")[0]
    else:
        error = float((sums.double() - expected).abs().max() / expected.abs().max())
        if sums.dtype == torch.float32 and error <= TOLERANCE:
            return True
        reason = f"it is off by {error:.1e} of the largest number"
    warnings.warn(
        f"no products of {dtype} with float32 results here ({reason}): the head multiplies in float32, slower",
        stacklevel=2,
    )
    return False
