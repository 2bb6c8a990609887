"""Two stores of keys and values: one in pure torch, for any device, and one for the compiled kernels on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.architecture import Architecture
from policies.attention import SlotAttention
from policies.graphs import LENGTH, ROWS, Replays, bucket, upload
from policies.layers import embed, gain, kept_weights, layer, rotated
from policies.native import BLOCK, Kernels
from policies.native.step import DecodeStep, LayerStep
from policies.subset import LayerSubset
from policies.varlen import UnpaddedSlots
from policies.weights import PackedWeights


class TorchStore:
    """One [row, position] tensor per attention, keys beside values; a shared prompt is copied into each row."""

    def __init__(
        self,
        weights: PackedWeights,
        architecture: Architecture,
        layers: LayerSubset,
        rows: int,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        self.weights = weights
        self.architecture = architecture
        self.layers = kept_weights(weights.layers, layers)
        self.longest = len(rotary[0])
        self.rotary = (rotary[0].to(weights.dtype), rotary[1].to(weights.dtype))
        self.device = weights.embedding.device
        self.rows = rows
        # One row more than there are slots: padded inputs write there.
        shape = ((rows + 1) * self.longest, architecture.kv_width)
        self.kv = [torch.zeros(shape, dtype=weights.dtype, device=self.device) for w in self.layers if w.attends]
        self.replays = Replays(rows, self.device) if self.device.type == "cuda" else None

    def remember(self, kv: list[Tensor]) -> list[Tensor]:
        """As it is."""
        return kv

    def begin(self, row: int, prompt: list[Tensor] | None, size: int) -> None:
        """Copy the prompt into the row."""
        at = row * self.longest
        for kv, part in zip(self.kv, prompt or (), strict=False):
            kv[at : at + size] = part

    def move(self, source: int, target: int, size: int) -> None:
        """Copy the row."""
        for kv in self.kv:
            rows = kv.view(-1, self.longest, kv.shape[1])
            rows[target, :size] = rows[source, :size]

    def decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``slots.Store.decode``."""
        inputs, sizes = self._inputs(position[None])
        inputs[0, 0, : len(token)] = token
        return self._run(upload(inputs[0], self.device), sizes[0])[: len(token)]

    def plan(self, position: np.ndarray) -> Callable[[int, Tensor], Tensor]:
        """As ``slots.Store.plan``; all positions go to the device at once."""
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
            rows, sizes = bucket(n, ROWS, self.rows), [bucket(size, LENGTH, self.longest) for size in sizes]
        inputs = np.zeros((steps, 3, rows), dtype=np.int64)
        inputs[:, 1, :n] = position
        inputs[:, 2] = self.rows * self.longest
        inputs[:, 2, :n] = position + np.arange(n) * self.longest
        return inputs, sizes

    def _run(self, inputs: Tensor, size: int) -> Tensor:
        return self._step(inputs, size) if self.replays is None else self.replays(self._step, inputs, size)

    def _step(self, inputs: Tensor, size: int) -> Tensor:
        """[R, width] from ``inputs`` [3, R]: tokens, positions, and the places in the store where their KV goes."""
        a = self.architecture
        token, where, flat = inputs
        n = len(token)
        x = embed(token, self.weights.embedding, a)
        rotary = (self.rotary[0][where], self.rotary[1][where])
        attention = UnpaddedSlots(SlotAttention(where + 1, size, a.scale), self.longest)
        stores = iter(self.kv)

        def attend(heads: Tensor, window: int | None) -> Tensor:
            query, key, value = rotated(heads, a, rotary, window)
            kv = next(stores)
            kv.index_copy_(0, flat, torch.cat((key, value), dim=1).view(n, a.kv_width))
            past = kv.view(-1, self.longest, 2, a.key_heads, a.head_dim)[:n]
            return attention(query, past[:, :, 0], past[:, :, 1], window)

        for weights in self.layers:
            x = layer(x, weights, a, attend)
        return F.rms_norm(x, (a.width,), gain(self.weights.norm, a), a.eps)


class SharedPrompt:
    """A prompt's keys and values of all attentions kept, [attentions, blocks, Hk, 2 * BLOCK * D].

    ``room`` is how many blocks lie between two attentions: more than its own where it is a view into a batch."""

    def __init__(self, store: Tensor, tokens: int, room: int) -> None:
        self.store = store
        self.tokens = tokens
        self.room = room


class NativeStore:
    """The compiled kernels' layout: rows refer to a shared prompt and own only what comes after it.

    Rows with the same prompt are attended one after the other, so that the prompt is read from cache."""

    def __init__(
        self,
        kernels: Kernels,
        weights: PackedWeights,
        architecture: Architecture,
        layers: LayerSubset,
        rows: int,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        a = self.architecture = architecture
        self.kernels = kernels
        self.device = torch.device("cpu")
        self.weights = weights
        self.layers = kept_weights(weights.layers, layers)
        self.cos, self.sin = (table[:, 0].float().contiguous() for table in rotary)
        # Untouched memory costs nothing, so rows have room for the longest prefix although most of it stays unused.
        self.attentions = sum(w.attends for w in self.layers)
        self.block = 2 * BLOCK * a.head_dim
        shape = (self.attentions, -(-len(self.cos) // BLOCK), a.key_heads, rows, self.block)
        self.own = self._room(shape)
        self.prompts: list[SharedPrompt | None] = [None] * rows
        self.prompt_tokens = np.zeros(rows, dtype=np.int64)
        self.prompt_blocks = np.zeros(rows, dtype=np.int64)
        self.prompt_at = np.zeros(rows, dtype=np.uint64)
        self.order: np.ndarray | None = None
        self.words = self.block * weights.dtype.itemsize // 4
        self.offsets = np.arange(rows) * self.words
        self.table = self._table(list(self.own))

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        return self.kernels.own_store(shape, self.weights.dtype)

    def _table(self, stores: list[Tensor]) -> Any:
        """The kept layers for the kernels; ``stores`` are those of their attentions."""
        table = (LayerStep * len(self.layers))()
        attention = 0  # number among those kept: the place of its keys and values
        for entry, w in zip(table, self.layers, strict=True):
            entry.window = w.window or 0
            entry.query_norm, entry.key_norm = (None if n is None else n.data_ptr() for n in (w.query_norm, w.key_norm))
            if w.attends:
                entry.number, entry.store = attention, stores[attention].data_ptr()
                attention += 1
        return table

    def remember(self, kv: list[Tensor]) -> SharedPrompt:
        """In the kernels' layout."""
        a, tokens = self.architecture, len(kv[0])
        blocks = -(-tokens // BLOCK)
        store = torch.zeros(len(kv), blocks, a.key_heads, self.block, dtype=self.weights.dtype)
        for layer_index, part in enumerate(kv):
            self.kernels.store_prompt(part.contiguous(), store, layer_index)
        return SharedPrompt(store, tokens, blocks)

    def begin(self, row: int, prompt: SharedPrompt | None, size: int) -> None:
        """Refer to the prompt."""
        self.prompts[row] = prompt
        self.prompt_tokens[row] = prompt.tokens if prompt else 0
        self.prompt_blocks[row] = prompt.room if prompt else 0
        self.prompt_at[row] = prompt.store.data_ptr() if prompt else 0
        self.order = None

    def move(self, source: int, target: int, size: int) -> None:
        """Refer to the same prompt and copy what the row owns."""
        self.begin(target, self.prompts[source], size)
        used = -(-(size - int(self.prompt_tokens[source])) // BLOCK)
        self.own[:, :used, :, target] = self.own[:, :used, :, source]

    def _order(self, rows: int) -> np.ndarray:
        """[rows] int32, those of one prompt together."""
        if self.order is None or len(self.order) != rows:
            self.order = np.argsort(self.prompt_at[:rows], kind="stable").astype(np.int32)
        return self.order

    def _step(self, order: np.ndarray, token: np.ndarray, position: np.ndarray) -> DecodeStep:
        """The description of a step of one token a row, in the order given; the arrays must outlive it."""
        a = self.architecture
        return DecodeStep(
            query_heads=a.query_heads,
            key_heads=a.key_heads,
            head_dim=a.head_dim,
            width=a.width,
            inner=a.inner,
            rows=len(order),
            head_step=len(self.prompts) * self.words,
            block_step=a.key_heads * len(self.prompts) * self.words,
            cos=self.cos.data_ptr(),
            sin=self.sin.data_ptr(),
            order=order.ctypes.data,
            token=token.ctypes.data,
            position=position.ctypes.data,
            own=self.offsets.ctypes.data,
            prompt_tokens=self.prompt_tokens.ctypes.data,
            prompt_blocks=self.prompt_blocks.ctypes.data,
            prompt=self.prompt_at.ctypes.data,
            scale=a.scale,
            eps=a.eps,
            is_bf16=self.weights.dtype == torch.bfloat16,
        )

    def decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``slots.Store.decode``."""
        a, call, dtype = self.architecture, self.kernels, self.weights.dtype
        token, position = np.ascontiguousarray(token), np.ascontiguousarray(position)
        step = self._step(self._order(len(token)), token, position)
        x = F.embedding(torch.from_numpy(token), self.weights.embedding).float()
        delta = None
        for w, entry in zip(self.layers, self.table, strict=True):
            if w.attends:
                qkv = w.qkv(call.add_norm(x, delta, w.attention_norm, a.eps, dtype))
                delta = w.out(call.decode_attention(step, entry, qkv))
            if w.transforms:
                delta = w.down(call.silu_mul(w.gate_up(call.add_norm(x, delta, w.mlp_norm, a.eps, dtype))))
        return call.add_norm(x, delta, self.weights.norm, a.eps, dtype).float()

    def plan(self, position: np.ndarray) -> Callable[[int, Tensor], Tensor]:
        """As ``slots.Store.plan``."""
        return lambda number, token: self.decode(token.numpy(), position[number])


def fits_kernels(architecture: Architecture, weights: PackedWeights) -> bool:
    """Whether the compiled kernels cover this model: on a CPU, silu gates, heads of a multiple of 16 channels."""
    a = architecture
    return weights.embedding.device.type == "cpu" and a.gate == "silu" and not a.gemma and a.head_dim % BLOCK == 0
