"""KV slots: the keys and values of each slot's prefix, so that one more token costs one pass over one token.

Rows of the store are compact: slots in use hold rows 0 to n-1, so every product and the attention run on active rows
only. A slot that falls idle gives its row to the last one, which costs one copy at most once per slot at the end of a
rollout. Prompts are prefilled once and copied to the slots that start with them, while they are remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.architecture import Architecture
from policies.attention import CausalAttention
from policies.layers import layer
from policies.subset import LayerSubset
from policies.weights import PackedWeights

_PREFILL_TOKENS = 2048  # per pass: bounds the activations, and larger passes are no faster


class Slots:
    """Decoding state of one behaviour: layer subset, KV rows and the tokens they stand for.

    Args:
        weights: the policy's packed weights (shared, never copied).
        architecture: of the policy.
        layers: the subset that prefill and decode run through.
        slots: number of slots S.
        rotary: cos and sin tables [M, 1, D] of every position up to the longest prefix M.
    """

    def __init__(
        self,
        weights: PackedWeights,
        architecture: Architecture,
        layers: LayerSubset,
        slots: int,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        self.weights = weights
        self.architecture = architecture
        self.layers = [weights.layers[index] for index in layers]
        self.longest = len(rotary[0])
        self.rotary = (rotary[0].to(weights.dtype), rotary[1].to(weights.dtype))
        self.device = weights.embedding.device
        a = architecture
        # One [slot, position] store per layer, keys and values side by side: a step writes it with one kernel.
        self.store = [
            torch.zeros(slots * self.longest, a.kv_width, dtype=weights.dtype, device=self.device) for _ in self.layers
        ]
        self.held = np.full((slots, self.longest), -1, dtype=np.int64)  # by row: the tokens whose KV the row holds
        self.filled = np.zeros(slots, dtype=np.int64)  # by row: how many of them
        self.row_of = np.arange(slots)  # by slot
        self.slot_at = np.arange(slots)  # by row
        self.remembered: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def step(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """Final hidden states [n, width] float32 of the last tokens of the ``active`` slots ([n], increasing).

        Args:
            ids: [S, >= max length] int64, the prefixes.
            length: [S] int64.
            start: [S] bool, slots whose prefix is new.
        """
        self._compact(active)
        rows = self.row_of[active]
        before = length[active] - 1
        stale = start[active] | (self.filled[rows] != before)
        stale |= ((self.held[rows, : ids.shape[1]] != ids[active]) & (np.arange(ids.shape[1]) < before[:, None])).any(1)
        if stale.any():
            self._fill(ids[active[stale]], before[stale], rows[stale])
        token = ids[active, before]
        self.held[rows, before] = token
        self.filled[rows] = before + 1
        order = np.argsort(rows)
        hidden = self._decode(token[order], before[order])
        return hidden if np.array_equal(rows, np.arange(len(rows))) else hidden[torch.from_numpy(rows).to(self.device)]

    def _compact(self, active: np.ndarray) -> None:
        """Give the ``active`` slots the rows 0 to n-1."""
        outside = active[self.row_of[active] >= len(active)]
        if not len(outside):
            return
        wanted = np.zeros(len(self.row_of), dtype=bool)
        wanted[active] = True
        holes = [row for row in range(len(active)) if not wanted[self.slot_at[row]]]
        for slot, hole in zip(outside.tolist(), holes, strict=True):
            self._swap(int(self.row_of[slot]), hole)

    def _swap(self, source: int, target: int) -> None:
        """Move row ``source`` to ``target``; the (idle) slot there gets ``source``, its contents forgotten."""
        size = int(self.filled[source])
        for store in self.store:
            rows = store.view(-1, self.longest, store.shape[1])
            rows[target, :size] = rows[source, :size]
        self.held[target, :size] = self.held[source, :size]
        self.filled[target], self.filled[source] = size, 0
        mover, idle = self.slot_at[source], self.slot_at[target]
        self.slot_at[target], self.slot_at[source] = mover, idle
        self.row_of[mover], self.row_of[idle] = target, source

    def _fill(self, ids: np.ndarray, before: np.ndarray, rows: np.ndarray) -> None:
        """Bring the KV of prefixes ``ids[i, :before[i]]`` into ``rows``, computing each distinct prefix once."""
        keys = [prefix[:size].tobytes() for prefix, size in zip(ids, before, strict=True)]
        missing = OrderedDict((key, i) for i, key in enumerate(keys) if key and key not in self.remembered)
        for batch in _batches(list(missing.values()), before):
            prefixes = [torch.from_numpy(ids[i, : before[i]]) for i in batch]
            self.remembered.update(zip((keys[i] for i in batch), self._prefill(prefixes), strict=True))
        for key, row, prefix, size in zip(keys, rows, ids, before, strict=True):
            self.held[row, :size] = prefix[:size]
            for store, held in zip(self.store, self.remembered.get(key, ()), strict=False):
                store[row * self.longest : row * self.longest + size] = held
            if key:
                self.remembered.move_to_end(key)
        while len(self.remembered) > len(self.row_of):
            self.remembered.popitem(last=False)

    def _prefill(self, prefixes: Sequence[Tensor]) -> list[list[Tensor]]:
        """Per prefix, per layer: its KV [tokens, kv_width]."""
        a = self.architecture
        sizes = [len(prefix) for prefix in prefixes]
        positions = torch.cat([torch.arange(size) for size in sizes]).to(self.device)
        sequence = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(self.device)
        x = F.embedding(torch.cat(list(prefixes)).to(self.device), self.weights.embedding).float()
        rotary = (self.rotary[0][positions], self.rotary[1][positions])
        attention = CausalAttention(sequence, positions, a.scale)
        stored: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
            stored.append(torch.cat((key, value), dim=1).view(len(key), a.kv_width))
            return attention(query, key, value, window)

        for weights in self.layers:
            x = layer(x, weights, a, rotary, attend)
        return [list(parts) for parts in zip(*(kv.split(sizes) for kv in stored), strict=True)]

    def _decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """Final hidden states [n, width] of ``token`` [n] at ``position`` [n] in rows 0 to n-1."""
        a = self.architecture
        n, size = len(token), int(position.max()) + 1
        where = torch.from_numpy(position).to(self.device)
        x = F.embedding(torch.from_numpy(token).to(self.device), self.weights.embedding).float()
        rotary = (self.rotary[0][where], self.rotary[1][where])
        flat = where + torch.arange(n, device=self.device) * self.longest
        masks = {window: self._mask(where, size, window) for window in {w.window for w in self.layers}}
        stores = iter(self.store)

        def attend(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
            store = next(stores)
            store.index_copy_(0, flat, torch.cat((key, value), dim=1).view(n, a.kv_width))
            past = store.view(-1, self.longest, 2, a.key_heads, a.head_dim)[:n, :size]
            keys, values = past[:, :, 0].transpose(1, 2), past[:, :, 1].transpose(1, 2)
            grouped = query.view(n, a.key_heads, a.repeat, a.head_dim)
            mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=masks[window], scale=a.scale)
            return mixed.reshape(n, a.query_heads * a.head_dim)

        for weights in self.layers:
            x = layer(x, weights, a, rotary, attend)
        return F.rms_norm(x, (a.width,), self.weights.norm, a.eps)

    def _mask(self, where: Tensor, size: int, window: int | None) -> Tensor:
        key = torch.arange(size, device=self.device)
        seen = key <= where[:, None]
        if window is not None:
            seen &= key > where[:, None] - window
        mask = torch.zeros(seen.shape, dtype=self.weights.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        return mask[:, None, None]


def _batches(chosen: list[int], sizes: np.ndarray) -> list[list[int]]:
    """``chosen`` sorted by size and cut where a padded batch would pass the token limit."""
    batches: list[list[int]] = []
    for i in sorted(chosen, key=lambda i: int(sizes[i])):
        if not batches or (len(batches[-1]) + 1) * int(sizes[i]) > _PREFILL_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches
