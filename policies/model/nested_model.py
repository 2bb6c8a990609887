"""The model as one nested policy computes it: one value for prefill, decode, updates and divergences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policies.model.layers import LayerWeights, embed, gain
from policies.pretrained.architecture import Architecture
from policies.sharding import trainable


@dataclass(frozen=True)
class NestedModel:
    """The blocks that a nested policy keeps, and what stands before and after them. V entries, L layers.

    Attributes:
        architecture: of the full model.
        layers: weights of the blocks kept, in order; in their rollout form, or the trainable ones for updates.
        embedding: [V, width].
        norm: [width], the weights of the norm before the head.
        head: a ``RolloutHead`` in rollouts, a ``TrainableHead`` in updates.
        rotary: cos and sin [positions, tables, D] of ``layers.rotary_table``, at least those of the longest prefix.
        dtype: of the matrix products.
        int8: whether they are on bytes (``int8``); such a model has no gradient.
    """

    architecture: Architecture
    layers: Sequence[LayerWeights]
    embedding: Tensor
    norm: Tensor
    head: Any
    rotary: tuple[Tensor, Tensor]
    dtype: torch.dtype
    int8: bool = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def longest(self) -> int:
        """The longest prefix in tokens that there are positions for."""
        return len(self.rotary[0])

    @property
    def attentions(self) -> int:
        """How many of the blocks kept have their attention: those that store keys and values."""
        return sum(weights.attends for weights in self.layers)

    @property
    def final_gain(self) -> Tensor:
        """[width], the factors of the norm before the head."""
        return gain(self.norm, self.architecture)

    def multiply(self, rows: int) -> None:
        """The layers' matrix products on ``rows`` rows of zeros, and nothing else: for whoever wants to know their
        time."""
        a = self.architecture
        sizes = (a.width, a.query_heads * a.head_dim, a.inner)
        residual, mixed, inner = (torch.zeros(rows, size, dtype=self.dtype, device=self.device) for size in sizes)
        for weights in self.layers:
            if weights.attends:
                weights.qkv(residual)
                weights.out(mixed)
            if weights.transforms:
                weights.gate_up(residual)
                weights.down(inner)

    def embed(self, ids: Tensor) -> Tensor:
        """The residual stream [N, width] float32 of ``ids`` [N] before the first block."""
        return embed(ids, trainable(self.embedding), self.architecture)
