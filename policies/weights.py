"""Where a layer's weights come from: packed for rollouts, or the trainable parameters themselves for updates.

Packed weights are one shadow of the whole policy, shared by all its behaviours: fused (QKV, gate and up), in the
compute dtype, and on a CPU in oneDNN's blocked layout. ``PackedWeights.refresh`` rewrites them after an optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.architecture import Architecture
from policies.layers import LayerWeights, Linear

_ROWS_HINT = 128  # oneDNN picks a blocked layout for about this many rows; other numbers work with it, too


def packs(device: torch.device) -> bool:
    """Whether oneDNN's packed linear can be used on ``device``."""
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class PackedLinear:
    """The inference form of one linear map, or of several with the same input, their outputs concatenated.

    Calling it maps [N, in] of any float dtype to [N, out] in the compute dtype.
    """

    def __init__(self, modules: list[nn.Linear], dtype: torch.dtype) -> None:
        self.modules = modules
        self.dtype = dtype
        self.bias: Tensor | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the modules' present weights."""
        fused = torch.cat([module.weight.detach() for module in self.modules]).to(self.dtype)
        self.packed = packs(fused.device)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(fused, _ROWS_HINT) if self.packed else fused
        if any(module.bias is not None for module in self.modules):
            parts = [_bias(module) for module in self.modules]
            self.bias = torch.cat(parts).to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _bias(module: nn.Linear) -> Tensor:
    if module.bias is None:
        return module.weight.new_zeros(module.out_features)
    return module.bias.detach()


def _trainable(modules: list[nn.Linear], dtype: torch.dtype) -> Linear:
    def apply(x: Tensor) -> Tensor:
        x = x.to(dtype)
        parts = [F.linear(x, m.weight.to(dtype), None if m.bias is None else m.bias.to(dtype)) for m in modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    return apply


def _layer_weights(block: Any, window: int | None, linear: Any) -> LayerWeights:
    attention, mlp = block.self_attn, block.mlp
    return LayerWeights(
        attention_norm=block.input_layernorm.weight,
        qkv=linear([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        out=linear([attention.o_proj]),
        mlp_norm=block.post_attention_layernorm.weight,
        gate_up=linear([mlp.gate_proj, mlp.up_proj]),
        down=linear([mlp.down_proj]),
        window=window,
    )


def trainable_layers(model: Any, architecture: Architecture, dtype: torch.dtype) -> list[LayerWeights]:
    """All layers of a transformers CausalLM, computing with its own parameters in ``dtype``."""
    return [
        _layer_weights(block, window, lambda modules: _trainable(modules, dtype))
        for block, window in zip(model.model.layers, architecture.windows, strict=True)
    ]


class PackedWeights:
    """The inference shadow of a whole transformers CausalLM."""

    def __init__(self, model: Any, architecture: Architecture, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._linears: list[PackedLinear] = []
        self.embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight
        self.layers = [
            _layer_weights(block, window, self._pack)
            for block, window in zip(model.model.layers, architecture.windows, strict=True)
        ]
        self.head = self._pack([model.lm_head])

    def _pack(self, modules: list[nn.Linear]) -> PackedLinear:
        linear = PackedLinear(modules, self.dtype)
        self._linears.append(linear)
        return linear

    def refresh(self) -> None:
        """Copy the model's present weights, in place: whoever holds these weights sees the new ones."""
        for linear in self._linears:
            linear.refresh()
