"""Log-probabilities of completions under the trainable weights: packed, prompts shared, the head on completions only.

Tokens of a micro-batch are laid out without padding, the distinct prompts first, then the completions; only attention
sees padded views. A prompt that several completions share (the same tensor object) is computed once, so a group of G
completions costs P + G C tokens instead of G (P + C).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policies.model.attention import CausalAttention, CompiledAttention, SharedPromptAttention
from policies.model.layers import Attend, LayerWeights, embed, layer, rotated
from policies.model.packing import Layout, Packing
from policies.model.unpadded import UnpaddedAttention, shared_spans
from policies.native import kernels
from policies.native.packed import LANES
from policies.pretrained.architecture import Architecture


def first_stream(
    packing: Packing, architecture: Architecture, embedding: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Callable[[Tensor, LayerWeights], Tensor]]:
    """The residual stream [N, width] float32 before the first layer, and the function that takes it through one.

    ``rotary`` is the table of at least all positions."""
    attend = packed_attention(packing, architecture, rotary)

    def apply(x: Tensor, weights: LayerWeights) -> Tensor:
        return layer(x, weights, architecture, attend)

    return embed(packing.ids, embedding, architecture), apply


def packed_attention(packing: Packing, architecture: Architecture, rotary: tuple[Tensor, Tensor]) -> Attend:
    """Attention of a micro-batch's tokens, by the fastest kernel that there is for them."""
    native = kernels() if packing.ids.device.type == "cpu" and architecture.head_dim % LANES == 0 else None
    if native is not None:
        return CompiledAttention(native, Layout(packing, architecture, rotary))
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


def score_hidden(
    packing: Packing,
    layers: Sequence[LayerWeights],
    architecture: Architecture,
    embedding: Tensor,
    rotary: tuple[Tensor, Tensor],
    gradient_checkpointing: bool,
) -> Tensor:
    """The residual stream [M, width] float32 (before the final norm) from which each scored token is predicted.

    With ``gradient_checkpointing`` only each layer's input is kept for the backward, which computes the layer again."""
    x, apply = first_stream(packing, architecture, embedding, rotary)
    for weights in layers:
        x = (
            checkpoint(apply, x, weights, use_reentrant=False)
            if gradient_checkpointing and torch.is_grad_enabled()
            else apply(x, weights)
        )
    return x.index_select(0, packing.before)
