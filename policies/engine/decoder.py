"""Next tokens of the active slots: through KV slots, or (the fallback) by a fresh forward on every prefix."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.engine.kv_cache import Fill, KVCache
from policies.engine.native_store import NativeStore
from policies.engine.prefill import Prefill
from policies.engine.sampling import draw
from policies.engine.torch_store import TorchStore
from policies.engine.whole_steps import WholeStepStore
from policies.model.compute import decode_kernels, takes_whole_steps
from policies.model.head import logp_of
from policies.model.nested_model import NestedModel
from policies.nested import LayerSubset
from policies.pretrained.architecture import Architecture
from policies.pretrained.reference import reference_hidden
from registry import UsageError

Clock = Callable[[str], AbstractContextManager[Any]]  # "layers" or "head" -> what measures the time spent inside


def _no_clock(part: str) -> AbstractContextManager[None]:
    return nullcontext()


class CachedDecoder:
    """Functional layers over KV slots, with the compiled kernels where they can be had and cover the model.

    Args:
        model: what is decoded with.
        slots: S.
        clock: measures layers and head apart, for whoever wants to know.
    """

    def __init__(self, model: NestedModel, slots: int, clock: Clock | None = None) -> None:
        self.model = model
        self.longest = model.longest
        self.clock = clock or _no_clock
        kernels = decode_kernels(model.architecture, model.device)
        store: NativeStore | TorchStore
        prefill: Fill = Prefill(model)
        if kernels is None:
            store = TorchStore(model, slots)
        elif not model.int8 and takes_whole_steps(kernels, model.architecture, model.dtype):
            store = whole = WholeStepStore(kernels, model, slots)
            prefill = whole.prefill
        else:
            store = NativeStore(kernels, model, slots)
        self.cache = KVCache(store, prefill, slots, self.longest)

    @property
    def device(self) -> torch.device:
        """Where hidden states are."""
        return self.model.device

    def hidden(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """[n, width] float32, the final hidden states at the last token of the ``active`` slots ([n], increasing)."""
        with self.clock("layers"):
            return self.cache.step(ids[:, : self.longest], length, start, active)

    def extend(
        self, ids: np.ndarray, first: np.ndarray, last: np.ndarray, start: np.ndarray, slots: np.ndarray
    ) -> Tensor:
        """As ``kv_cache.KVCache.extend``."""
        with self.clock("layers"):
            return self.cache.extend(ids[:, : self.longest], first, last, start, slots)

    def plan(self, active: np.ndarray, position: np.ndarray) -> None:
        """What ``follow`` will do: further steps of the ``active`` slots of the last ``hidden``, whose tokens stand at
        ``position`` [m, n]."""
        self._planned = self.cache.plan(active, position)

    def follow(self, step: int, token: Tensor) -> Tensor:
        """As ``hidden``, after a planned step with ``token`` [n], which stays on the device."""
        with self.clock("layers"):
            return self._planned(step, token)

    def hold(self, ids: np.ndarray, size: np.ndarray, active: np.ndarray) -> None:
        """As ``KVCache.hold``: what the planned steps fed."""
        self.cache.hold(ids, size, active)

    def draw(self, hidden: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Tokens [n] int64 and their log-probabilities [n] float32 from final hidden states."""
        with self.clock("head"):
            head = self.model.head
            if head.draws:
                return head.draw(hidden, uniform, temperature)
            return draw(head.logits(hidden), uniform, temperature)

    def logp(self, hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
        """[n] float32 log-probabilities of ``token`` [n] after final hidden states."""
        with self.clock("head"):
            return self.model.head.logp(hidden, token, temperature)

    def products(self, rows: int) -> None:
        """The layers' matrix products of a step of ``rows`` rows and nothing else: what a step takes at the least."""
        self.cache.store.products(rows)


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

    def extend(
        self, ids: np.ndarray, first: np.ndarray, last: np.ndarray, start: np.ndarray, slots: np.ndarray
    ) -> Tensor:
        """As ``CachedDecoder.extend``."""
        device = self.model.lm_head.weight.device
        prefix = torch.from_numpy(ids[slots, : last.max()]).to(device)
        hidden = reference_hidden(self.model, prefix, self.layers, self.windows)
        count = last - first + 1
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first - 1, count)
        row = np.repeat(np.arange(len(slots)), count)
        return hidden[torch.from_numpy(row).to(device), torch.from_numpy(place).to(device)].float()

    def products(self, rows: int) -> None:
        """Not apart from the rest."""
        raise UsageError("this checkpoint runs on transformers' own layers, whose products are not measured apart")

    def draw(self, hidden: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """As ``CachedDecoder.draw``."""
        return draw(self.model.lm_head(hidden).float(), uniform, temperature)

    def logp(self, hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
        """As ``CachedDecoder.logp``."""
        return logp_of(lambda rows: self.model.lm_head(rows).float(), hidden, token, temperature)
