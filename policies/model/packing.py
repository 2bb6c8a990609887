"""Where each token of a micro-batch lies: no padding, and a prompt that completions share once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.native.packed import PackedLayout
from policies.pretrained.architecture import Architecture


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


class Layout:
    """``PackedLayout`` structs of one micro-batch, one for each window, and the memory that they point to.

    Args:
        packing: the micro-batch.
        architecture: of the model.
        rotary: cos and sin [positions, tables, D] of ``layers.rotary_table``.
    """

    def __init__(self, packing: Packing, architecture: Architecture, rotary: tuple[Tensor, Tensor]) -> None:
        self.architecture = architecture
        prompts, n = len(packing.prompt_size), packing.prompt_tokens
        sizes = packing.own_size
        starts = n + sizes.cumsum(0) - sizes
        order = packing.prompt_of.argsort(stable=True)
        members = torch.bincount(packing.prompt_of, minlength=prompts)
        self.memory = {
            "prompt_start": packing.prompt_size.cumsum(0) - packing.prompt_size,
            "prompt_size": packing.prompt_size,
            "first": torch.cat((torch.zeros(1, dtype=torch.int64), members.cumsum(0))),
            "start": starts[order],
            "size": sizes[order],
        }
        self.tables = [[part.float().contiguous() for part in table.unbind(1)] for table in rotary]

    def struct(self, window: int | None) -> PackedLayout:
        """What the kernels take, for attention to the ``window`` last tokens; valid as long as this object."""
        a = self.architecture
        table = 1 if a.ropes and window is not None else 0
        return PackedLayout(
            query_heads=a.query_heads,
            key_heads=a.key_heads,
            head_dim=a.head_dim,
            window=window or 0,
            prompts=len(self.memory["prompt_size"]),
            cos=self.tables[0][table].data_ptr(),
            sin=self.tables[1][table].data_ptr(),
            scale=a.scale,
            **{name: tensor.data_ptr() for name, tensor in self.memory.items()},
        )
