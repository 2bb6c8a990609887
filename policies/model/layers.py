"""One decoder layer as a pure function of its input and its weights.

Weights are arguments, so the same code serves every layer, every subset, the weights of rollouts and the trainable
ones. The residual stream is float32 whatever the compute dtype of the matrix products: rollouts and updates then round
alike, and their log-probabilities agree more closely.

Shape letters: N tokens (of any sequences, packed without padding), Hq query heads, Hk key heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.model.compute import elementwise_kernels
from policies.nested import LayerSubset, kept_blocks
from policies.pretrained.architecture import Architecture

Linear = Callable[[Tensor], Tensor]
# (heads [N, Hq + 2 Hk, D]: queries, keys and values before rotation; window) -> [N, Hq * D]
Attend = Callable[[Tensor, "int | None"], Tensor]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        kernels = elementwise_kernels(x)
        if kernels is not None:
            out, inverse = kernels.norm(x, weight, eps, dtype)
        else:
            inverse = x.square().mean(-1).add_(eps).rsqrt_()
            out = (x * inverse[:, None]).mul_(weight).to(dtype)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        kernels = elementwise_kernels(x)
        if kernels is not None:
            return *kernels.norm_backward(grads[0].contiguous(), x, weight, inverse), None, None
        grad = grads[0].float()
        unit = x * inverse[:, None]
        slope = grad * weight
        grad_x = slope.sub_(unit * (slope * unit).mean(-1, keepdim=True)).mul_(inverse[:, None])
        return grad_x, grad.mul_(unit).sum(0), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The RMS norm [N, d] in ``dtype`` of the float32 ``x`` [N, d]; keeps ``x`` alone for the backward."""
    if x.device.type == "cuda":  # one kernel each way
        return F.rms_norm(x, (x.shape[-1],), weight, eps).to(dtype)
    return _RMSNorm.apply(x, weight, eps, dtype)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        kernels = elementwise_kernels(gate_up)
        if kernels is not None:
            return kernels.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        kernels = elementwise_kernels(gate_up)
        if kernels is not None:
            return (kernels.silu_mul_backward(gate_up, grads[0].contiguous()),)
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        slope = grads[0] * sigmoid
        return (torch.cat((slope * up * (1 + gate * (1 - sigmoid)), slope * gate), dim=-1),)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [N, I] of the contiguous ``gate_up`` [N, 2 I], which alone is kept for the backward."""
    return _SiluMul.apply(gate_up)


@dataclass
class LayerWeights:
    """What one layer computes with. ``qkv`` and ``gate_up`` are fused: their outputs are concatenated. Of a halved
    layer only ``attends`` (its attention) or ``transforms`` (its MLP) is true; the other half's weights lie idle. The
    two ``out`` norms are of what the halves add, where the architecture has them."""

    attention_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None
    dtype: torch.dtype
    attends: bool = True
    transforms: bool = True
    attention_out_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None


def kept_weights(weights: list[LayerWeights], layers: LayerSubset) -> list[LayerWeights]:
    """Of the ``weights`` of all layers, what a subset computes with; nothing is copied."""
    return [
        weights[index] if attends and transforms else replace(weights[index], attends=attends, transforms=transforms)
        for index, attends, transforms in kept_blocks(layers)
    ]


def _gelu_mul(gate_up: Tensor, approximate: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


# [N, 2 I] (gate, then up) -> [N, I]
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_mul,
    "gelu": partial(_gelu_mul, approximate="none"),
    "gelu_pytorch_tanh": partial(_gelu_mul, approximate="tanh"),
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x`` [N, H, D]; ``cos`` and ``sin`` are [N, 1, D], the first half of ``sin``
    negated (``rotary_table``)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotated(
    heads: Tensor, architecture: Architecture, rotary: tuple[Tensor, Tensor], window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [N, Hq, D] and keys [N, Hk, D], and values [N, Hk, D], of what an ``Attend`` takes; ``rotary`` is
    cos and sin of the N tokens' positions, [N, tables, D] each."""
    a = architecture
    turning, value = heads.split((a.query_heads + a.key_heads, a.key_heads), dim=1)
    cos, sin = rotary
    if a.ropes:
        table = slice(0, 1) if window is None else slice(1, 2)
        cos, sin = cos[:, table], sin[:, table]
    turned = rotate(turning, cos.to(heads.dtype), sin.to(heads.dtype))
    query, key = turned.split((a.query_heads, a.key_heads), dim=1)
    return query, key, value


def gain(norm: Tensor, architecture: Architecture) -> Tensor:
    """The factors [width] of an RMS norm: 1 plus its weights for Gemma, the weights themselves for all others."""
    return norm + 1 if architecture.gemma else norm


def embed(ids: Tensor, embedding: Tensor, architecture: Architecture) -> Tensor:
    """The residual stream [N, width] float32 of ``ids`` [N] before the first layer."""
    x = F.embedding(ids, embedding).float()
    return x * architecture.width**0.5 if architecture.gemma else x


def layer(x: Tensor, weights: LayerWeights, architecture: Architecture, attend: Attend) -> Tensor:
    """The residual stream [N, width] float32 after one layer, or after the half of it that is kept."""
    if weights.attends:
        x = x + attention_half(x, weights, architecture, attend)
    if weights.transforms:
        x = x + mlp_half(x, weights, architecture)
    return x


def attention_half(x: Tensor, weights: LayerWeights, architecture: Architecture, attend: Attend) -> Tensor:
    """What a layer's attention adds to the residual stream, [N, width] in the compute dtype (float32 after a norm)."""
    a = architecture
    qkv = weights.qkv(rms_norm(x, gain(weights.attention_norm, a), a.eps, weights.dtype))
    heads = qkv.view(len(x), a.query_heads + 2 * a.key_heads, a.head_dim)
    if weights.query_norm is not None and weights.key_norm is not None:
        query, key, value = heads.split((a.query_heads, a.key_heads, a.key_heads), dim=1)
        query = F.rms_norm(query, (a.head_dim,), gain(weights.query_norm, a).to(query.dtype), a.eps)
        key = F.rms_norm(key, (a.head_dim,), gain(weights.key_norm, a).to(key.dtype), a.eps)
        heads = torch.cat((query, key, value), dim=1)
    return _out(weights.out(attend(heads, weights.window)), weights.attention_out_norm, a)


def mlp_half(x: Tensor, weights: LayerWeights, architecture: Architecture) -> Tensor:
    """What a layer's MLP adds to the residual stream, as ``attention_half``."""
    a = architecture
    gate_up = weights.gate_up(rms_norm(x, gain(weights.mlp_norm, a), a.eps, weights.dtype))
    return _out(weights.down(GATES[a.gate](gate_up)), weights.mlp_out_norm, a)


def _out(x: Tensor, norm: Tensor | None, architecture: Architecture) -> Tensor:
    a = architecture
    return x if norm is None else rms_norm(x.float(), gain(norm, a), a.eps, torch.float32)


def rotary_table(
    rotary_embedding: Callable[..., Any], length: int, device: torch.device, ropes: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, tables, D] float32 of positions 0..length-1 from the model's own rotary module, the sign of
    the half rotation folded into sin; ``ropes`` names its tables if it has several."""
    if ropes:
        tables = (rotary_table(partial(rotary_embedding, layer_type=name), length, device) for name in ropes)
        cos, sin = zip(*tables, strict=True)
        return torch.cat(cos, dim=1), torch.cat(sin, dim=1)
    positions = torch.arange(length, device=device)[None]
    cos, sin = rotary_embedding(torch.zeros(1, dtype=torch.float32, device=device), position_ids=positions)
    half = sin.shape[-1] // 2
    sign = torch.cat((-torch.ones(half, device=device), torch.ones(half, device=device)))
    return cos[0, :, None], (sin[0] * sign)[:, None]
