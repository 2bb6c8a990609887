"""Next tokens of the active slots: through KV slots, or (the fallback) by a fresh forward on every prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.engine.native_store import NativeStore
from policies.engine.prefill import Prefill
from policies.engine.sampling import SamplingSpec, draw
from policies.engine.slots import Fill, Slots
from policies.engine.torch_store import TorchStore
from policies.engine.whole_steps import FusedStore
from policies.model.weights import PackedLinear, PackedWeights
from policies.native import BLOCK, Kernels, kernels
from policies.nested import LayerSubset
from policies.pretrained.architecture import Architecture
from policies.pretrained.reference import reference_hidden


class CachedDecoder:
    """Functional layers over KV slots, with the compiled kernels where they can be had and cover the model."""

    def __init__(
        self,
        weights: PackedWeights,
        architecture: Architecture,
        layers: LayerSubset,
        slots: int,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        self.longest = len(rotary[0])
        self.weights = weights
        native = kernels() if fits_kernels(architecture, weights) else None
        store: NativeStore | TorchStore
        prefill: Fill = Prefill(weights, architecture, layers, rotary)
        if native is None:
            store = TorchStore(weights, architecture, layers, slots, rotary)
        elif fits_reach(native, architecture, weights):
            store = fused = FusedStore(native, weights, architecture, layers, slots, rotary)
            prefill = fused.prefill
        else:
            store = NativeStore(native, weights, architecture, layers, slots, rotary)
        self.slots = Slots(store, prefill, slots, self.longest)

    def hidden(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """[n, width] float32, the final hidden states at the last token of the ``active`` slots ([n], increasing)."""
        return self.slots.step(ids[:, : self.longest], length, start, active)

    def plan(self, active: np.ndarray, position: np.ndarray) -> None:
        """What ``follow`` will do: further steps of the ``active`` slots of the last ``hidden``, whose tokens stand at
        ``position`` [m, n]."""
        self._planned = self.slots.plan(active, position)

    def follow(self, step: int, token: Tensor) -> Tensor:
        """As ``hidden``, after a planned step with ``token`` [n], which stays on the device."""
        return self._planned(step, token)

    def hold(self, ids: np.ndarray, size: np.ndarray, active: np.ndarray) -> None:
        """As ``Slots.hold``: what the planned steps fed."""
        self.slots.hold(ids, size, active)

    def draw(self, hidden: Tensor, uniform: Tensor, sampling: SamplingSpec) -> tuple[Tensor, Tensor]:
        """Tokens [n] int64 and their log-probabilities [n] float32 from final hidden states."""
        s = sampling
        if self.weights.head.fused and s.top_p == 1.0 and s.top_k == 0:
            return self.weights.head.draw(hidden, uniform, s.temperature)
        return draw(self.weights.head.logits(hidden), uniform, s.temperature, s.top_p, s.top_k)

    @property
    def device(self) -> torch.device:
        """Where hidden states are."""
        return self.weights.embedding.device


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

    def draw(self, hidden: Tensor, uniform: Tensor, sampling: SamplingSpec) -> tuple[Tensor, Tensor]:
        """As ``CachedDecoder.draw``."""
        s = sampling
        return draw(self.model.lm_head(hidden).float(), uniform, s.temperature, s.top_p, s.top_k)


def fits_kernels(architecture: Architecture, weights: PackedWeights) -> bool:
    """Whether the compiled kernels cover this model: on a CPU, silu gates, heads of a multiple of 16 channels."""
    a = architecture
    return weights.embedding.device.type == "cpu" and a.gate == "silu" and not a.gemma and a.head_dim % BLOCK == 0


_MOST_BYTES = 2**24  # of all layers' matrices: half of the last-level cache of a small machine


def fits_reach(kernels: Kernels, architecture: Architecture, weights: PackedWeights) -> bool:
    """Whether a model that the kernels cover is small enough for whole steps, and its dtype multiplied here."""
    size = architecture.layers * architecture.layer_weights * weights.dtype.itemsize
    multiplies = weights.dtype == torch.float32 or kernels.fused_head
    plain = weights.linear is PackedLinear and weights.embedding.dtype == torch.float32
    return multiplies and plain and size <= _MOST_BYTES
