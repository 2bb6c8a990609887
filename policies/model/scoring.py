"""Log-probabilities of completions under the trainable weights: packed, prompts shared, the head on completions only.

Tokens of a micro-batch are laid out without padding, the distinct prompts first, then the completions; only attention
sees padded views. A prompt that several completions share (the same tensor object) is computed once, so a group of G
completions costs P + G C tokens instead of G (P + C).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policies.model.attention import CausalAttention, CompiledAttention, SharedPromptAttention
from policies.model.compute import attention_kernels
from policies.model.layers import Attend, LayerWeights, layer, rotated
from policies.model.nested_model import NestedModel
from policies.model.packing import Layout, Packing
from policies.model.unpadded import UnpaddedAttention, shared_spans
from policies.pretrained.architecture import Architecture


def first_stream(packing: Packing, model: NestedModel) -> tuple[Tensor, Callable[[Tensor, LayerWeights], Tensor]]:
    """The residual stream [N, width] float32 before the first layer, and the function that takes it through one."""
    attend = packed_attention(packing, model.architecture, model.rotary)

    def apply(x: Tensor, weights: LayerWeights) -> Tensor:
        return layer(x, weights, model.architecture, attend)

    return model.embed(packing.ids), apply


def packed_attention(packing: Packing, architecture: Architecture, rotary: tuple[Tensor, Tensor]) -> Attend:
    """Attention of a micro-batch's tokens, by the fastest kernel that there is for them."""
    kernels = attention_kernels(architecture, packing.ids.device)
    if kernels is not None:
        return CompiledAttention(kernels, Layout(packing, architecture, rotary))
    n = packing.prompt_tokens
    padded = SharedPromptAttention(
        CausalAttention(packing.sequence[:n], packing.position[:n], architecture.scale),
        packing.sequence[n:],
        packing.position[n:],
        packing.prompt_of,
        packing.prompt_size,
    )
    shared = UnpaddedAttention(
        padded, architecture.scale, lambda: shared_spans(packing.prompt_size, packing.prompt_of, packing.own_size)
    )
    positions = (rotary[0][packing.position], rotary[1][packing.position])

    def attend(heads: Tensor, window: int | None) -> Tensor:
        return shared(*rotated(heads, architecture, positions, window), window)

    return attend


def score_hidden(packing: Packing, model: NestedModel, gradient_checkpointing: bool = False) -> Tensor:
    """The residual stream [M, width] float32 (before the final norm) from which each scored token is predicted.

    With ``gradient_checkpointing`` only each layer's input is kept for the backward, which computes the layer again."""
    x, apply = first_stream(packing, model)
    for weights in model.layers:
        x = (
            checkpoint(apply, x, weights, use_reentrant=False)
            if gradient_checkpointing and torch.is_grad_enabled()
            else apply(x, weights)
        )
    return x.index_select(0, packing.before)
