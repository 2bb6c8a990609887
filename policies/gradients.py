"""The differentiable pieces of a layer, with backwards of their own where torch's are slow or keep too much.

On a CPU every matrix product goes through oneDNN: torch sends float32 products to MKL, which has been seen to run at
half oneDNN's speed on an AMD processor. Norms and gates keep their inputs alone; the compiled kernels make each of them
one pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.native import Kernels, kernels


def _compiled(x: Tensor) -> Kernels | None:
    return kernels() if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) else None


def packs(device: torch.device) -> bool:
    """Whether oneDNN's linear can be called directly on ``device``."""
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for ``x`` [N, K] and ``weight`` [M, K] of one dtype; no gradient."""
    if packs(x.device):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = product(x, weight.to(x.dtype))
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(grad, weight.to(x.dtype).t()) if need_x else None,
            product(grad.t(), x.t()).to(weight.dtype) if need_weight else None,
            grad.sum(0, dtype=weight.dtype) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in the dtype of ``x`` [N, K], with gradients in that of ``weight`` [M, K] (float32)."""
    return _Linear.apply(x, weight, bias)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        native = _compiled(x)
        if native is not None:
            out, inverse = native.norm(x, weight, eps, dtype)
        else:
            inverse = x.square().mean(-1).add_(eps).rsqrt_()
            out = (x * inverse[:, None]).mul_(weight).to(dtype)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        native = _compiled(x)
        if native is not None:
            return *native.norm_backward(grads[0].contiguous(), x, weight, inverse), None, None
        grad = grads[0].float()
        unit = x * inverse[:, None]
        slope = grad * weight
        grad_x = slope.sub_(unit * (slope * unit).mean(-1, keepdim=True)).mul_(inverse[:, None])
        return grad_x, grad.mul_(unit).sum(0), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The RMS norm [N, d] in ``dtype`` of the float32 ``x`` [N, d]; keeps ``x`` alone for the backward."""
    return _RMSNorm.apply(x, weight, eps, dtype)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        native = _compiled(gate_up)
        if native is not None:
            return native.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        native = _compiled(gate_up)
        if native is not None:
            return (native.silu_mul_backward(gate_up, grads[0].contiguous()),)
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        slope = grads[0] * sigmoid
        return (torch.cat((slope * up * (1 + gate * (1 - sigmoid)), slope * gate), dim=-1),)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [N, I] of the contiguous ``gate_up`` [N, 2 I], which alone is kept for the backward."""
    return _SiluMul.apply(gate_up)
