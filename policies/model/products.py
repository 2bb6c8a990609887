"""The differentiable pieces of a layer, with backwards of their own where torch's are slow or keep too much.

On a CPU matrix products go through oneDNN: torch sends float32 ones to MKL, which has been seen to run at half
oneDNN's speed on an AMD processor. Small float32 products and float32 gradients of weights go by the compiled tiles.
Norms and gates keep their inputs alone; the compiled kernels make each of them one pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.native import Kernels, kernels
from policies.native.packed import LANES

_SMALL = 2**17  # weights that stay in the second cache


def _compiled(x: Tensor) -> Kernels | None:
    return kernels() if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) else None


def packs(device: torch.device) -> bool:
    """Whether oneDNN's linear can be called directly on ``device``."""
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What operands of ``dtype`` are multiplied in on ``device``: float32 for the bfloat16 ones of a processor that has
    no such products (AVX2 alone). Rounded operands have the same products in both."""
    half = device.type == "cpu" and dtype == torch.bfloat16
    return torch.float32 if half and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for ``x`` [N, K] and ``weight`` [M, K] of one dtype; no gradient.

    oneDNN makes code anew for each N, and every micro-batch has another: for small weights that takes as long as the
    product."""
    if x.dtype == torch.float32 and weight.numel() <= _SMALL and len(weight) % LANES == 0:
        native = _compiled(x)
        if native is not None:
            return native.small_product(x.contiguous(), weight.t().contiguous())
    wide = product_dtype(x.device, x.dtype)
    if wide != x.dtype:
        return product(x.to(wide), weight.to(wide)).to(x.dtype)
    if packs(x.device):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def outer_product(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x [M, K] for ``grad`` [N, M] and ``x`` [N, K] of one dtype; no gradient."""
    wide = product_dtype(x.device, x.dtype)
    if wide != x.dtype:
        return outer_product(grad.to(wide), x.to(wide)).to(x.dtype)
    native = _compiled(x) if x.dtype == torch.float32 else None
    if native is not None and x.shape[1] % LANES == 0:
        return native.outer_product(grad.contiguous(), x.contiguous())
    if x.dtype == torch.float32 and packs(x.device):
        return product(grad.t(), x.t())
    return grad.t() @ x  # oneDNN reads transposed bfloat16 as it lies


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, biased: bool, *weights: Tensor) -> Tensor:
        biases = weights[len(weights) // 2 :] if biased else ()
        weights = weights[: len(weights) - len(biases)]
        ctx.save_for_backward(x, *weights)
        ctx.biased = biased
        y = product(x, _side_by_side(weights, x.dtype))
        return y.add_(torch.cat(biases)) if biased else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_x, _, *need = ctx.needs_input_grad
        sizes = [len(weight) for weight in weights]
        found: list[Tensor | None] = [product(grad, _side_by_side(weights, x.dtype).t()) if need_x else None, None]
        if any(need[: len(weights)]):
            parts = outer_product(grad, x).split(sizes)
            found += [part.to(w.dtype) for part, w in zip(parts, weights, strict=True)]
        else:
            found += [None] * len(weights)
        if ctx.biased:
            found += grad.sum(0, dtype=weights[0].dtype).split(sizes)
        return tuple(found)


def _side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(weights) == 1:
        return weights[0].to(dtype)
    fused = torch.empty(
        sum(len(weight) for weight in weights), weights[0].shape[1], dtype=dtype, device=weights[0].device
    )
    for part, weight in zip(fused.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return fused


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
    """[N, M] in the dtype of ``x`` [N, K]: x @ weight.T of each of the ``weights`` [M_i, K], next to each other, plus
    ``biases`` (one [M_i] for each, or none); their gradients are in their own dtype (float32)."""
    return _Linear.apply(x, bool(biases), *weights, *biases)


TOLERANCE = 1e-4  # relative to the largest: float32 sums are ten times nearer, a result in bfloat16 forty times farther


def operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [M, K] rounded to ``dtype``, as ``float_product`` takes it."""
    rounded = weight.detach().to(dtype)
    return rounded if fits(rounded) and trusted(rounded.device, dtype) else rounded.float()


def float_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32 [N, M] for ``x`` [N, K] in the dtype that the ``operand`` [M, K] was rounded to; no
    gradient."""
    return product(x.float(), weight) if weight.dtype == torch.float32 else half_product(x, weight)


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    """As ``float_product``, of operands in half precision; only on a GPU."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def fits(weight: Tensor) -> bool:
    """Whether ``half_product`` is made for such operands."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


@cache
def trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``half_product`` gives the float32 sums on ``device``; warns if it does not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 192, generator=generator).to(device, dtype) for size in (40, 304))
    expected = x.double() @ weight.double().T
    try:
        found = half_product(x, weight)
    except (RuntimeError, TypeError) as raised:
        reason = str(raised).strip().split("\n")[0]
    else:
        error = float((found.double() - expected).abs().max() / expected.abs().max())
        if found.dtype == torch.float32 and error <= TOLERANCE:
            return True
        reason = f"it is off by {error:.1e} of the largest number"
    warnings.warn(
        f"no products of {dtype} with float32 results here ({reason}): the head multiplies in float32, slower",
        stacklevel=2,
    )
    return False
