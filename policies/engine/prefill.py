"""Prompts computed at once, before their completions are decoded token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from policies.model.layers import layer, rotated
from policies.model.nested_model import NestedModel
from policies.model.packing import pack_prompts
from policies.model.scoring import packed_attention


class Prefill:
    """Keys and values of whole prompts through a nested model."""

    def __init__(self, model: NestedModel) -> None:
        self.model = model

    def __call__(self, prompts: Sequence[np.ndarray]) -> list[list[Tensor]]:
        """Per prompt ([tokens] int64), per attention kept: its KV [tokens, kv_width], keys before values."""
        model, a = self.model, self.model.architecture
        packing = pack_prompts([torch.from_numpy(prompt).to(model.device) for prompt in prompts])
        positions = (model.rotary[0][packing.position], model.rotary[1][packing.position])
        attention = packed_attention(packing, a, model.rotary)
        stored: list[Tensor] = []

        def attend(heads: Tensor, window: int | None) -> Tensor:
            _, key, value = rotated(heads, a, positions, window)
            stored.append(torch.cat((key, value), dim=1).view(len(key), a.kv_width))
            return attention(heads, window)

        x = model.embed(packing.ids)
        for weights in model.layers:
            x = layer(x, weights, a, attend)
        return [list(parts) for parts in zip(*(kv.split([len(p) for p in prompts]) for kv in stored), strict=True)]
