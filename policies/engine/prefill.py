"""Prompts computed at once, before their completions are decoded token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from policies.model.layers import embed, kept_weights, layer, rotated
from policies.model.packing import pack_prompts
from policies.model.scoring import packed_attention
from policies.model.weights import PackedWeights
from policies.nested import LayerSubset
from policies.pretrained.architecture import Architecture


class Prefill:
    """Keys and values of whole prompts through a layer subset."""

    def __init__(
        self, weights: PackedWeights, architecture: Architecture, layers: LayerSubset, rotary: tuple[Tensor, Tensor]
    ) -> None:
        self.weights = weights
        self.layers = kept_weights(weights.layers, layers)
        self.architecture = architecture
        self.rotary = rotary

    def __call__(self, prompts: Sequence[np.ndarray]) -> list[list[Tensor]]:
        """Per prompt ([tokens] int64), per attention kept: its KV [tokens, kv_width], keys before values."""
        a, device = self.architecture, self.weights.embedding.device
        packing = pack_prompts([torch.from_numpy(prompt).to(device) for prompt in prompts])
        positions = (self.rotary[0][packing.position], self.rotary[1][packing.position])
        attention = packed_attention(packing, a, self.rotary)
        stored: list[Tensor] = []

        def attend(heads: Tensor, window: int | None) -> Tensor:
            _, key, value = rotated(heads, a, positions, window)
            stored.append(torch.cat((key, value), dim=1).view(len(key), a.kv_width))
            return attention(heads, window)

        x = embed(packing.ids, self.weights.embedding, a)
        for weights in self.layers:
            x = layer(x, weights, a, attend)
        return [list(parts) for parts in zip(*(kv.split([len(p) for p in prompts]) for kv in stored), strict=True)]
