"""Keys and values in pure torch, for any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.engine.graphs import LENGTH, Replays, bucket, upload
from policies.model.attention import SlotAttention, masked_attention
from policies.model.layers import layer, rotated
from policies.model.nested_model import NestedModel
from policies.model.unpadded import UnpaddedSlots, reads_what_rows_hold


class TorchStore:
    """A tensor [attention, row and position, keys beside values]; a shared prompt is copied into each row."""

    def __init__(self, model: NestedModel, rows: int) -> None:
        self.model = model
        self.longest = model.longest
        self.rotary = (model.rotary[0].to(model.dtype), model.rotary[1].to(model.dtype))
        self.device = model.device
        self.rows = rows
        # One row more than there are slots: padded inputs write there.
        shape = (model.attentions, (rows + 1) * self.longest, model.architecture.kv_width)
        self.kv = torch.zeros(shape, dtype=model.dtype, device=self.device)
        self.replays = Replays(rows, self.device) if self.device.type == "cuda" else None

    def remember(self, kv: list[Tensor]) -> Tensor | None:
        """The prompt's keys and values, of all attentions."""
        return torch.stack(kv) if kv else None

    def begin(self, row: int, prompt: Tensor | None, size: int) -> None:
        """Copy the prompt into the row."""
        if prompt is not None:
            at = row * self.longest
            self.kv[:, at : at + size] = prompt

    def move(self, source: int, target: int, size: int) -> None:
        """Copy the row."""
        rows = self.kv.view(len(self.kv), -1, self.longest, self.kv.shape[2])
        rows[:, target, :size] = rows[:, source, :size]

    def decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``kv_cache.Store.decode``."""
        inputs, sizes = self._inputs(position[None])
        inputs[0, 0, : len(token)] = token
        return self._run(upload(inputs[0], self.device), sizes[0])[: len(token)]

    def extend(self, row: np.ndarray, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``kv_cache.Store.extend``, of padded rows."""
        model, a = self.model, self.model.architecture
        begin = np.flatnonzero(np.diff(row, prepend=-1))
        count, size = np.diff(begin, append=len(row)), int(position.max()) + 1
        most, kinds = int(count.max()), {w.window for w in model.layers if w.attends}
        of = np.repeat(np.arange(len(begin)), count)
        place = np.arange(len(row)) - begin[of]
        where = np.zeros((len(begin), most), dtype=np.int64)
        where[of, place] = position
        distance = where[:, None, :, None] - np.arange(size)  # from a token back to a key
        seen = {w: upload((distance >= 0) & (distance < (w or size)), self.device) for w in kinds}
        ids, at, flat, rows, padded = (
            upload(x, self.device)
            for x in (token, position, row * self.longest + position, row[begin], of * most + place)
        )
        rotary = (self.rotary[0][at], self.rotary[1][at])
        stores = iter(self.kv)

        def attend(heads: Tensor, window: int | None) -> Tensor:
            query, key, value = rotated(heads, a, rotary, window)
            kv = next(stores)
            kv.index_copy_(0, flat, torch.cat((key, value), dim=1).view(len(ids), a.kv_width))
            past = kv.view(-1, self.longest, 2, a.key_heads, a.head_dim)[:, :size].index_select(0, rows)
            wide = query.new_zeros(len(begin) * most, *query.shape[1:]).index_copy(0, padded, query)
            wide = wide.view(len(begin), most, *query.shape[1:]).transpose(1, 2)
            keys, values = past.permute(2, 0, 3, 1, 4)
            mixed = masked_attention(wide, keys, values, seen[window], a.scale)
            return mixed.transpose(1, 2).reshape(len(begin) * most, -1).index_select(0, padded)

        x = model.embed(ids)
        for weights in model.layers:
            x = layer(x, weights, a, attend)
        return F.rms_norm(x, (a.width,), model.final_gain, a.eps)

    def products(self, rows: int) -> None:
        """As ``kv_cache.Store.products``."""
        self.model.multiply(rows)

    def plan(self, position: np.ndarray) -> Callable[[int, Tensor], Tensor]:
        """As ``kv_cache.Store.plan``; all positions go to the device at once."""
        planned, sizes = self._inputs(position)
        inputs, n = upload(planned, self.device), position.shape[1]

        def step(number: int, token: Tensor) -> Tensor:
            inputs[number, 0, :n] = token
            return self._run(inputs[number], sizes[number])[:n]

        return step

    def _inputs(self, position: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """[m, 3, R] of steps at ``position`` [m, n], their tokens 0 as yet, and per step the longest prefix."""
        steps, n = position.shape
        rows, sizes = n, (position.max(1) + 1).tolist()
        if self.replays is not None:
            rows = bucket(n, self.rows)
            step = self.longest if self.any_size else LENGTH
            sizes = [min(-(-size // step) * step, self.longest) for size in sizes]
        inputs = np.zeros((steps, 3, rows), dtype=np.int64)
        inputs[:, 1, :n] = position
        inputs[:, 2] = self.rows * self.longest
        inputs[:, 2, :n] = position + np.arange(n) * self.longest
        return inputs, sizes

    @cached_property
    def any_size(self) -> bool:
        """Whether a step takes as long whatever the size it is made for, so that all can be one graph."""
        a = self.model.architecture
        query = torch.empty(1, a.query_heads, a.head_dim, dtype=self.model.dtype, device=self.device)
        windowed = {weights.window is not None for weights in self.model.layers if weights.attends}
        return all(reads_what_rows_hold(query, a.key_heads, each) for each in windowed)

    def _run(self, inputs: Tensor, size: int) -> Tensor:
        return self._step(inputs, size) if self.replays is None else self.replays(self._step, inputs, size)

    def _step(self, inputs: Tensor, size: int) -> Tensor:
        """[R, width] from ``inputs`` [3, R]: tokens, positions, and the places in the store where their KV goes."""
        model, a = self.model, self.model.architecture
        token, where, flat = inputs
        n = len(token)
        x = model.embed(token)
        rotary = (self.rotary[0][where], self.rotary[1][where])
        attention = UnpaddedSlots(SlotAttention(where + 1, size, a.scale), self.longest)
        stores = iter(self.kv)

        def attend(heads: Tensor, window: int | None) -> Tensor:
            query, key, value = rotated(heads, a, rotary, window)
            kv = next(stores)
            kv.index_copy_(0, flat, torch.cat((key, value), dim=1).view(n, a.kv_width))
            past = kv.view(-1, self.longest, 2, a.key_heads, a.head_dim)[:n]
            return attention(query, past[:, :, 0], past[:, :, 1], window)

        for weights in model.layers:
            x = layer(x, weights, a, attend)
        return F.rms_norm(x, (a.width,), model.final_gain, a.eps)
