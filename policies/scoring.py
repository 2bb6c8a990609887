"""Log-probabilities of completions under the trainable weights: packed, prompts shared, the head on completions only.

Tokens of a micro-batch are laid out without padding, the distinct prompts first, then the completions; only attention
sees padded views. A prompt that several completions share (the same tensor object) is computed once, so a group of G
completions costs P + G C tokens instead of G (P + C).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policies.architecture import Architecture
from policies.attention import CausalAttention, CompiledAttention, SharedPromptAttention
from policies.layers import Attend, LayerWeights, embed, layer, rotated
from policies.native import kernels
from policies.native.packed import LANES, Layout
from policies.varlen import UnpaddedAttention, shared_spans


@dataclass(frozen=True)
class Packing:
    """Where each token of a micro-batch lies. P prompts, B completions, N packed tokens (prompt tokens first).

    Attributes:
        ids: [N] int64, tokens in the packed order.
        position: [N] int64, places within prompt + completion.
        sequence: [N] int64, number of the prompt (for prompt tokens) or of the completion.
        prompt_tokens: how many of the N are prompt tokens.
        prompt_of: [B] int64, each completion's prompt.
        prompt_size: [P] int64.
        before: [M] int64, the packed token after which each scored token comes.
    """

    ids: Tensor
    position: Tensor
    sequence: Tensor
    prompt_tokens: int
    prompt_of: Tensor
    prompt_size: Tensor
    before: Tensor

    @property
    def own_size(self) -> Tensor:
        """[B] int64, packed tokens of each completion."""
        return torch.bincount(self.sequence[self.prompt_tokens :], minlength=len(self.prompt_of))


def pack(prompts: Sequence[Tensor], tokens: Tensor, mask: Tensor) -> Packing:
    """The layout of B completions ``tokens`` [B, T], scored where ``mask`` [B, T]."""
    number: dict[int, int] = {}
    distinct = [number.setdefault(id(prompt), len(number)) for prompt in prompts]
    unique: list[Tensor] = [prompts[distinct.index(n)] for n in range(len(number))]
    device = tokens.device
    prompt_size = torch.tensor([len(prompt) for prompt in unique], device=device)
    prompt_of = torch.tensor(distinct, device=device)
    prompt_tokens = int(prompt_size.sum())

    steps = torch.arange(tokens.shape[1], device=device)
    length = (mask * (steps + 1)).amax(1)
    inputs = steps < length[:, None] - 1  # the last scored token is never an input
    row, column = inputs.nonzero(as_tuple=True)
    prompt_row = torch.repeat_interleave(torch.arange(len(unique), device=device), prompt_size)
    prompt_start = prompt_size.cumsum(0) - prompt_size
    prompt_position = torch.arange(prompt_tokens, device=device) - prompt_start[prompt_row]

    scored_row, scored_column = mask.nonzero(as_tuple=True)
    counts = inputs.sum(1)
    start = prompt_tokens + counts.cumsum(0) - counts
    last_of_prompt = (prompt_start + prompt_size - 1)[prompt_of]
    before = torch.where(scored_column == 0, last_of_prompt[scored_row], start[scored_row] + scored_column - 1)
    return Packing(
        ids=torch.cat([*(prompt.to(device) for prompt in unique), tokens[inputs]]),
        position=torch.cat((prompt_position, prompt_size[prompt_of][row] + column)),
        sequence=torch.cat((prompt_row, row)),
        prompt_tokens=prompt_tokens,
        prompt_of=prompt_of,
        prompt_size=prompt_size,
        before=before,
    )


def pack_prompts(prompts: Sequence[Tensor]) -> Packing:
    """The layout of ``prompts`` ([tokens] int64 each) that no completion follows."""
    nothing = torch.zeros(len(prompts), 1, dtype=torch.int64, device=prompts[0].device)
    return pack(prompts, nothing, nothing.bool())


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
    recompute: bool,
) -> Tensor:
    """The residual stream [M, width] float32 (before the final norm) from which each scored token is predicted.

    With ``recompute`` only each layer's input is kept for the backward, which computes the layer again."""
    x, apply = first_stream(packing, architecture, embedding, rotary)
    for weights in layers:
        x = (
            checkpoint(apply, x, weights, use_reentrant=False)
            if recompute and torch.is_grad_enabled()
            else apply(x, weights)
        )
    return x.index_select(0, packing.before)


def micro_batches(prompts: Sequence[Tensor], mask: Tensor, token_limit: int) -> list[list[int]]:
    """Sequence indices in batches of at most ``token_limit`` tokens (prompts counted once; at least one sequence each).

    Sorted by length so that the padded views of attention waste little, but completions of one prompt stay together."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    length = (mask * steps).amax(1).tolist() if mask.shape[1] else [0] * len(mask)
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(id(prompt), []).append(i)
    batches: list[list[int]] = []
    room = 0
    for members in sorted(groups.values(), key=lambda g: len(prompts[g[0]]) + max(length[i] for i in g)):
        prompt_size = len(prompts[members[0]])
        first = True
        for i in sorted(members, key=lambda i: length[i]):
            cost = length[i] + (prompt_size if first else 0)
            if not batches or cost > room:
                batches.append([])
                room, cost = token_limit, length[i] + prompt_size
            batches[-1].append(i)
            room, first = room - cost, False
    return batches
