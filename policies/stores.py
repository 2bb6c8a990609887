"""Two stores of keys and values: one in pure torch, for any device, and one for the compiled kernels on a CPU."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.architecture import Architecture
from policies.graphs import LENGTH, ROWS, Replays, bucket
from policies.layers import kept_weights, layer, rotated
from policies.native import BLOCK, DecodeStep, Kernels
from policies.subset import LayerSubset
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
        self.replays = Replays(self._step, rows, self.device) if self.device.type == "cuda" else None

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
        n, size = len(token), int(position.max()) + 1
        rows = n
        if self.replays is not None:
            rows, size = bucket(n, ROWS, self.rows), bucket(size, LENGTH, self.longest)
        inputs = np.zeros((3, rows), dtype=np.int64)
        inputs[0, :n], inputs[1, :n] = token, position
        inputs[2] = self.rows * self.longest
        inputs[2, :n] = position + np.arange(n) * self.longest
        if self.replays is not None:
            return self.replays(inputs, size)[:n]
        return self._step(torch.from_numpy(inputs).to(self.device), size)

    def _step(self, inputs: Tensor, size: int) -> Tensor:
        """[R, width] from ``inputs`` [3, R]: tokens, positions, and the places in the store where their KV goes."""
        a = self.architecture
        token, where, flat = inputs
        n = len(token)
        x = F.embedding(token, self.weights.embedding).float()
        rotary = (self.rotary[0][where], self.rotary[1][where])
        masks = {window: self._mask(where, size, window) for window in {w.window for w in self.layers}}
        stores = iter(self.kv)

        def attend(heads: Tensor, window: int | None) -> Tensor:
            query, key, value = rotated(heads, a, rotary)
            kv = next(stores)
            kv.index_copy_(0, flat, torch.cat((key, value), dim=1).view(n, a.kv_width))
            past = kv.view(-1, self.longest, 2, a.key_heads, a.head_dim)[:n, :size]
            keys, values = past[:, :, 0].transpose(1, 2), past[:, :, 1].transpose(1, 2)
            grouped = query.view(n, a.key_heads, a.repeat, a.head_dim)
            mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=masks[window], scale=a.scale)
            return mixed.reshape(n, a.query_heads * a.head_dim)

        for weights in self.layers:
            x = layer(x, weights, a, attend)
        return F.rms_norm(x, (a.width,), self.weights.norm, a.eps)

    def _mask(self, where: Tensor, size: int, window: int | None) -> Tensor:
        key = torch.arange(size, device=self.device)
        seen = key <= where[:, None]
        if window is not None:
            seen &= key > where[:, None] - window
        mask = torch.zeros(seen.shape, dtype=self.weights.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        return mask[:, None, None]


class _SharedPrompt:
    """A prompt's keys and values of all attentions kept, [attentions, blocks, Hk, 2 * BLOCK * D]."""

    def __init__(self, store: Tensor, tokens: int, blocks: int) -> None:
        self.store = store
        self.tokens = tokens
        self.blocks = blocks


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
        self.weights = weights
        self.layers = kept_weights(weights.layers, layers)
        cos, sin = rotary
        half = a.head_dim // 2
        # rotary_table folds a sign into the first half of sin; the kernel has it in its arithmetic.
        self.cos = cos[:, 0].float().contiguous()
        self.sin = torch.cat((-sin[:, 0, :half], sin[:, 0, half:]), dim=1).float().contiguous()
        self.blocks = -(-len(cos) // BLOCK)
        # Untouched memory costs nothing, so rows have room for the longest prefix although most of it stays unused.
        self.own = [
            kernels.own_store(rows, a.key_heads, self.blocks, a.head_dim, weights.dtype)
            for w in self.layers
            if w.attends
        ]
        self.prompts: list[_SharedPrompt | None] = [None] * rows
        self.prompt_tokens = np.zeros(rows, dtype=np.int64)
        self.prompt_blocks = np.zeros(rows, dtype=np.int64)
        self.prompt_at = np.zeros(rows, dtype=np.uint64)
        self.order: np.ndarray | None = None

    def remember(self, kv: list[Tensor]) -> _SharedPrompt:
        """In the kernels' layout."""
        a, tokens = self.architecture, len(kv[0])
        blocks = -(-tokens // BLOCK)
        store = torch.zeros(len(kv), blocks, a.key_heads, 2 * BLOCK * a.head_dim, dtype=self.weights.dtype)
        for layer_index, part in enumerate(kv):
            self.kernels.store_prompt(part.contiguous(), store, layer_index)
        return _SharedPrompt(store, tokens, blocks)

    def begin(self, row: int, prompt: _SharedPrompt | None, size: int) -> None:
        """Refer to the prompt."""
        self.prompts[row] = prompt
        self.prompt_tokens[row] = prompt.tokens if prompt else 0
        self.prompt_blocks[row] = prompt.blocks if prompt else 0
        self.prompt_at[row] = prompt.store.data_ptr() if prompt else 0
        self.order = None

    def move(self, source: int, target: int, size: int) -> None:
        """Refer to the same prompt and copy what the row owns."""
        self.begin(target, self.prompts[source], size)
        used = -(-(size - int(self.prompt_tokens[source])) // BLOCK)
        for own in self.own:
            own[:used, :, target] = own[:used, :, source]

    def _tasks(self, rows: int) -> np.ndarray:
        """[rows * Hk] int32, row * Hk + head, ordered by prompt, head, row."""
        heads = self.architecture.key_heads
        if self.order is None or len(self.order) != rows * heads:
            row, head = np.divmod(np.arange(rows * heads), heads)
            self.order = np.lexsort((row, head, self.prompt_at[row])).astype(np.int32)
        return self.order

    def decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``slots.Store.decode``."""
        a, call, dtype = self.architecture, self.kernels, self.weights.dtype
        order, position = self._tasks(len(token)), np.ascontiguousarray(position)
        step = DecodeStep(
            query_heads=a.query_heads,
            key_heads=a.key_heads,
            head_dim=a.head_dim,
            rows=len(self.prompts),
            tasks=len(order),
            cos=self.cos.data_ptr(),
            sin=self.sin.data_ptr(),
            order=order.ctypes.data,
            position=position.ctypes.data,
            prompt_tokens=self.prompt_tokens.ctypes.data,
            prompt_blocks=self.prompt_blocks.ctypes.data,
            prompt=self.prompt_at.ctypes.data,
            scale=a.scale,
            eps=a.eps,
        )
        x = F.embedding(torch.from_numpy(token), self.weights.embedding).float()
        delta = None
        attention = 0  # number among those kept: the place of its keys and values
        for w in self.layers:
            if w.attends:
                step.layer, step.window = attention, w.window or 0
                qkv = w.qkv(call.add_norm(x, delta, w.attention_norm, a.eps, dtype))
                norms = (w.query_norm, w.key_norm)
                delta = w.out(call.decode_attention(step, qkv, norms, self.own[attention]))
                attention += 1
            if w.transforms:
                delta = w.down(call.silu_mul(w.gate_up(call.add_norm(x, delta, w.mlp_norm, a.eps, dtype))))
        return call.add_norm(x, delta, self.weights.norm, a.eps, dtype).float()


def fits_kernels(architecture: Architecture, weights: PackedWeights) -> bool:
    """Whether the compiled kernels cover this model: on a CPU, silu gates, heads of a multiple of 16 channels."""
    a = architecture
    return weights.embedding.device.type == "cpu" and a.gate == "silu" and a.head_dim % BLOCK == 0
