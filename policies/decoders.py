"""Next-token logits of the active slots: through KV slots, or (the fallback) by a fresh forward on every prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.architecture import Architecture
from policies.reference import reference_hidden
from policies.slots import Slots
from policies.subset import LayerSubset
from policies.weights import PackedWeights


class CachedDecoder:
    """Functional layers over KV slots."""

    def __init__(
        self,
        weights: PackedWeights,
        architecture: Architecture,
        layers: LayerSubset,
        slots: int,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        self.longest = len(rotary[0])
        self.head = weights.head
        self.slots = Slots(weights, architecture, layers, slots, rotary)

    def hidden(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """[n, width] float32, the final hidden states at the last token of the ``active`` slots ([n], increasing)."""
        return self.slots.step(ids[:, : self.longest], length, start, active).float()

    def logits(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """[n, V] float32 for the ``active`` slots."""
        return self.head(self.hidden(ids, length, start, active)).float()


class UncachedDecoder:
    """transformers' own layers, run on the whole prefix each time."""

    def __init__(self, model: Any, architecture: Architecture, layers: LayerSubset, longest: int) -> None:
        self.model = model
        self.windows = architecture.windows
        self.layers = layers
        self.longest = longest

    def hidden(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """As ``CachedDecoder.hidden``; ``start`` does not matter here."""
        size = length[active]
        device = self.model.lm_head.weight.device
        prefix = torch.from_numpy(ids[active, : size.max()]).to(device)
        hidden = reference_hidden(self.model, prefix, self.layers, self.windows)
        return hidden[torch.arange(len(size), device=device), torch.from_numpy(size - 1).to(device)].float()

    def logits(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """As ``CachedDecoder.logits``."""
        return self.model.lm_head(self.hidden(ids, length, start, active)).float()
