"""KV slots: the keys and values of each slot's prefix, so that one more token costs one pass over one token.

The store is compact: slots in use hold rows 0 to n-1, so every product and the attention run on active rows only. A
slot that falls idle gives its row to the last one, which costs one copy at most once per slot at the end of a rollout.
Prompts are prefilled once and shared by the slots that start with them, while they are remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from policies.engine.graphs import upload

_PREFILL_TOKENS = 2048  # per pass: bounds the activations, and larger passes are no faster
Fill = Callable[[list[np.ndarray]], list[Any]]  # prompts -> what ``Store.remember`` takes


class Store(Protocol):
    """Where keys and values lie, and how one token is decoded over them. Rows are numbered 0 to S-1."""

    device: torch.device

    def remember(self, kv: Any) -> Any:
        """A prompt as ``Prefill`` gives it, or the store's own prefill, in the store's own form."""
        ...

    def begin(self, row: int, prompt: Any, size: int) -> None:
        """Row ``row`` now holds the ``size`` tokens of a remembered prompt (None where ``size`` is 0)."""
        ...

    def move(self, source: int, target: int, size: int) -> None:
        """Copy the first ``size`` tokens of row ``source`` over row ``target``."""
        ...

    def decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """Final hidden states [n, width] float32 of ``token`` [n] at ``position`` [n] in rows 0 to n-1, whose keys and
        values are stored on the way."""
        ...

    def extend(self, row: np.ndarray, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``decode``, of several tokens of some rows: ``token`` [N] at ``position`` [N] of ``row`` [N]. The tokens
        of a row are neighbours and in order, and each sees those before it."""
        ...

    def products(self, rows: int) -> None:
        """The matrix products of a step of ``rows`` rows and nothing else, for whoever wants to know their time."""
        ...

    def plan(self, position: np.ndarray) -> Callable[[int, Tensor], Tensor]:
        """``decode`` of steps whose positions [m, n] are known beforehand, as a function of a step's number and its
        tokens [n], which stay on the device."""
        ...


class KVCache:
    """Which slot holds which prefix, and what has to be computed for the next token.

    Args:
        store: of at least ``slots`` rows.
        prefill: computes the KV of prompts, in a form that the store remembers.
        slots: number of slots S.
        longest: the longest prefix in tokens.
    """

    def __init__(self, store: Store, prefill: Fill, slots: int, longest: int) -> None:
        self.store = store
        self.prefill = prefill
        self.longest = longest
        self.held = np.full((slots, longest), -1, dtype=np.int64)  # by row: the tokens whose KV the row holds
        self.filled = np.zeros(slots, dtype=np.int64)  # by row: how many of them
        self.begun = np.zeros(slots, dtype=np.int64)  # by row: with how many it began; a store may not cut these
        self.row_of = np.arange(slots)  # by slot
        self.slot_at = np.arange(slots)  # by row
        self.remembered: OrderedDict[bytes, Any] = OrderedDict()

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
        stale = self._differs(ids, before, start, active) | (self.filled[rows] < before)
        if stale.any():
            self._fill(ids[active[stale]], before[stale], rows[stale])
        token = ids[active, before]
        self.held[rows, before] = token
        self.filled[rows] = before + 1
        order = np.argsort(rows)
        hidden = self.store.decode(token[order], before[order])
        if np.array_equal(rows, np.arange(len(rows))):
            return hidden
        return hidden[upload(rows, self.store.device)]

    def extend(
        self, ids: np.ndarray, first: np.ndarray, last: np.ndarray, start: np.ndarray, slots: np.ndarray
    ) -> Tensor:
        """Final hidden states [N, width] at the end of the prefixes of ``first`` [n] to ``last`` [n] tokens of some
        ``slots`` [n], slot by slot, in one pass over the tokens that their rows lack.

        Args:
            ids: [S, >= max last] int64, the prefixes.
            first: at least 1.
            last: at least ``first``.
            start: [S] bool, slots whose prefix is new.
            slots: [n], any of them, each once. Other slots keep what they hold.
        """
        rows, before = self.row_of[slots], first - 1
        stale = self._differs(ids, before, start, slots) | (self.filled[rows] == 0)
        if stale.any():
            self._fill(ids[slots[stale]], before[stale], rows[stale])
            self.filled[rows[stale]] = before[stale]
        begin = np.minimum(self.filled[rows], before)
        count = last - begin
        row, end = np.repeat(rows, count), np.cumsum(count)
        position = np.arange(len(row)) - np.repeat(end - count, count) + np.repeat(begin, count)
        token = ids[np.repeat(slots, count), position]
        self.held[row, position] = token
        self.filled[rows] = last
        hidden = self.store.extend(row, token, position)
        wanted = position >= np.repeat(before, count)
        return hidden if wanted.all() else hidden[upload(np.flatnonzero(wanted), self.store.device)]

    def _differs(self, ids: np.ndarray, before: np.ndarray, start: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """[n] bool, the slots whose rows hold other tokens than the first ``before`` [n] of ``ids``."""
        # The observation, not the memo, is the truth: a row whose tokens differ from it is filled anew; what
        # it holds beyond the observation is overwritten in time.
        rows = self.row_of[slots]
        width = min(ids.shape[1], int(before.max()))
        held = np.arange(width) < np.minimum(before, self.filled[rows])[:, None]
        differs = (self.held[rows, :width] != ids[slots, :width]) & held
        return start[slots] | (self.begun[rows] > before) | differs.any(1)

    def plan(self, active: np.ndarray, position: np.ndarray) -> Callable[[int, Tensor], Tensor]:
        """Further steps of the slots of the last ``step``, which feed tokens at ``position`` [m, n]: a function of a
        step's number and its tokens [n] to hidden states as in ``step``. ``hold`` says afterwards which they were."""
        rows = self.row_of[active]
        order = np.argsort(rows)
        run = self.store.plan(position[:, order])
        if np.array_equal(rows, np.arange(len(rows))):
            return run
        device = self.store.device
        to, back = upload(order, device), upload(rows, device)
        return lambda step, token: run(step, token[to])[back]

    def hold(self, ids: np.ndarray, size: np.ndarray, active: np.ndarray) -> None:
        """The ``active`` slots hold the KV of the first ``size`` [n] tokens of ``ids`` [S, >= max size]."""
        rows, width = self.row_of[active], int(size.max())
        self.held[rows, :width] = ids[active, :width]
        self.filled[rows] = size

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
        self.store.move(source, target, size)
        self.held[target, :size] = self.held[source, :size]
        self.filled[target], self.filled[source] = size, 0
        self.begun[target] = self.begun[source]
        mover, idle = self.slot_at[source], self.slot_at[target]
        self.slot_at[target], self.slot_at[source] = mover, idle
        self.row_of[mover], self.row_of[idle] = target, source

    def _fill(self, ids: np.ndarray, before: np.ndarray, rows: np.ndarray) -> None:
        """Bring the KV of prefixes ``ids[i, :before[i]]`` into ``rows``, computing each distinct prefix once."""
        keys = [prefix[:size].tobytes() for prefix, size in zip(ids, before, strict=True)]
        missing = OrderedDict((key, i) for i, key in enumerate(keys) if key and key not in self.remembered)
        for batch in _batches(list(missing.values()), before):
            for i, kv in zip(batch, self.prefill([ids[i, : before[i]] for i in batch]), strict=True):
                self.remembered[keys[i]] = self.store.remember(kv)
        for key, row, prefix, size in zip(keys, rows.tolist(), ids, before.tolist(), strict=True):
            self.held[row, :size] = prefix[:size]
            self.begun[row] = size
            self.store.begin(row, self.remembered.get(key), size)
            if key:
                self.remembered.move_to_end(key)
        while len(self.remembered) > len(self.row_of):
            self.remembered.popitem(last=False)


def _batches(chosen: list[int], sizes: np.ndarray) -> list[list[int]]:
    """``chosen`` sorted by size and cut where a padded batch would pass the token limit."""
    batches: list[list[int]] = []
    for i in sorted(chosen, key=lambda i: int(sizes[i])):
        if not batches or (len(batches[-1]) + 1) * int(sizes[i]) > _PREFILL_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches
