"""Whole decode steps in one native call, for models whose weights stay in a core's reach.

Each thread takes its rows through all layers, so weights are read once a thread and activations never leave the core. A
large model's weights would come from memory once a thread instead of once: it goes layer by layer (``NativeStore``)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.engine.native_store import NativeStore, SharedPrompt
from policies.model.layers import LayerWeights
from policies.native import BLOCK
from policies.native.step import DecodeStep, Panels

_MOST_KEPT = 2**28  # bytes of a store that are kept for the next one
_kept: list[Tensor] = []  # uint8


def _keep(room: Tensor) -> None:
    _kept.append(room)
    del _kept[:-2]  # defensive groups have two stores at a time


class WholeStepStore(NativeStore):
    """The layout of ``NativeStore``, decoded and prefilled by whole steps."""

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of an earlier store, if there is some: touching new memory costs more than a rollout's attention."""
        size = math.prod(shape) * self.model.dtype.itemsize
        place = next((n for n, kept in enumerate(_kept) if len(kept) >= size), None)
        room = self.kernels.own_store((size,), torch.uint8) if place is None else _kept.pop(place)
        if len(room) <= _MOST_KEPT:
            weakref.finalize(self, _keep, room).atexit = False
        return room[:size].view(self.model.dtype).view(shape)

    def _table(self, stores: list[Tensor]) -> Any:
        table = super()._table(stores)
        self.panels: list[Panels] = []  # kept alive: the table has their addresses
        for entry, w in zip(table, self.model.layers, strict=True):
            self._add(entry, w)
        return table

    def _add(self, entry: Any, w: LayerWeights) -> None:
        kept: list[tuple[str, Any, bool]] = []
        if w.attends:
            entry.attention_norm = w.attention_norm.data_ptr()
            kept += [("qkv", w.qkv, False), ("out", w.out, False)]
        if w.transforms:
            entry.mlp_norm = w.mlp_norm.data_ptr()
            kept += [("gate_up", w.gate_up, True), ("down", w.down, False)]
        for name, linear, gated in kept:
            panels = linear.panels(self.kernels, gated)
            self.panels.append(panels)
            setattr(entry, name, panels.weight.data_ptr())
            setattr(entry, f"{name}_bias", None if panels.bias is None else panels.bias.data_ptr())

    def decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``kv_cache.Store.decode``."""
        token, position = np.ascontiguousarray(token), np.ascontiguousarray(position)
        hidden = torch.empty(len(token), self.model.architecture.width)
        self._run(self._step(self._order(len(token)), token, position), self.table, _bounds(len(token)), hidden)
        return hidden

    def extend(self, row: np.ndarray, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``kv_cache.Store.extend``: a row's tokens go one after the other through one thread."""
        begin = np.flatnonzero(np.diff(row, prepend=-1))
        ends = np.append(begin[1:], len(row))
        by_prompt = np.argsort(self.prompt_at[row[begin]], kind="stable")
        order = np.concatenate([np.arange(begin[n], ends[n]) for n in by_prompt])
        cuts = np.concatenate(([0], np.cumsum((ends - begin)[by_prompt])))  # where a thread's tokens may end
        parts = min(len(begin), torch.get_num_threads())
        bounds = cuts[np.searchsorted(cuts, np.arange(parts + 1) * len(row) / parts)]
        hidden = torch.empty(len(row), self.model.architecture.width)
        tokens = self._tokens(row[order], token[order], position[order], order)
        self._run(tokens.step, self.table, bounds, hidden)
        back = torch.empty_like(hidden)
        back[tokens.at] = hidden
        return back

    def products(self, rows: int) -> None:
        """As ``kv_cache.Store.products``."""
        zeros = np.zeros(rows, dtype=np.int64)
        self._run(self._step(self._order(rows), zeros, zeros), self.table, _bounds(rows), None, products=True)

    def _run(
        self, step: DecodeStep, table: Any, bounds: np.ndarray, hidden: Tensor | None, products: bool = False
    ) -> None:
        self.kernels.steps.run(step, table, bounds, (self.model.embedding, self.model.norm), hidden, products)

    def remember(self, kv: SharedPrompt) -> SharedPrompt:  # type: ignore[override]
        """The prompt unchanged: ``prefill`` has the kernels' layout already."""
        return kv

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[SharedPrompt]:
        """Keys and values of prompts ([tokens] int64 each) by steps of all their tokens in order, a prompt a thread.

        To the kernel each token is a row of its own: the full blocks before the token's are its shared prompt, and the
        token's block is the part that the row owns."""
        sizes = np.array([len(prompt) for prompt in prompts])
        blocks = -(-sizes // BLOCK)
        begin, bounds = np.cumsum(blocks) - blocks, np.concatenate(([0], np.cumsum(sizes)))
        heads, stride = self.model.architecture.key_heads, int(blocks.sum())
        kv = torch.zeros(self.model.attentions, stride, heads, self.block, dtype=self.model.dtype)
        token = np.concatenate(prompts)
        position = np.arange(len(token)) - np.repeat(bounds[:-1], sizes)
        first = np.repeat(begin, sizes)
        own = (first + position // BLOCK) * heads * self.words
        at = (kv.data_ptr() + first * (heads * self.words * 4)).astype(np.uint64)
        tokens, rooms = position // BLOCK * BLOCK, np.full(len(token), stride)
        order = np.arange(len(token), dtype=np.int32)
        step = self._step(order, token, position)
        step.head_step = self.words
        step.own, step.prompt = own.ctypes.data, at.ctypes.data
        step.prompt_tokens, step.prompt_blocks = tokens.ctypes.data, rooms.ctypes.data
        table = type(self.table).from_buffer_copy(self.table)
        for entry in table:
            if entry.attention_norm:
                entry.store = kv[entry.number].data_ptr()
        self._run(step, table, bounds, None)
        return [
            SharedPrompt(kv[:, b : b + n], int(size), stride) for b, n, size in zip(begin, blocks, sizes, strict=True)
        ]


def _bounds(rows: int) -> np.ndarray:
    """Where each thread's rows begin, and the end."""
    parts = min(rows, torch.get_num_threads())
    return np.arange(parts + 1) * rows // parts
