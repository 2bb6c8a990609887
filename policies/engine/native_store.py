"""Two stores of keys and values: one in pure torch, for any device, and one for the compiled kernels on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.model.nested_model import NestedModel
from policies.native import BLOCK, Kernels
from policies.native.step import DecodeStep, LayerStep


class SharedPrompt:
    """A prompt's keys and values of all attentions kept, [attentions, blocks, Hk, 2 * BLOCK * D].

    ``stride`` is how many blocks lie between two attentions: more than the prompt's own where the store is a view into
    that of a batch of prompts."""

    def __init__(self, store: Tensor, tokens: int, stride: int) -> None:
        self.store = store
        self.tokens = tokens
        self.stride = stride


class Tokens(NamedTuple):
    """A step of some tokens of any rows: where they lie among others, its description, and the memory it points to."""

    at: Tensor
    step: DecodeStep
    memory: tuple[np.ndarray, ...]


def _one_of_each_row(row: np.ndarray) -> list[np.ndarray]:
    """The first tokens of the rows of ``row`` [N], then the second ones, and so on."""
    begin = np.flatnonzero(np.diff(row, prepend=-1))
    place = np.arange(len(row)) - np.repeat(begin, np.diff(begin, append=len(row)))
    return [np.flatnonzero(place == n) for n in range(int(place.max()) + 1)]


class NativeStore:
    """The compiled kernels' layout: rows refer to a shared prompt and own only what comes after it.

    Rows with the same prompt are attended one after the other, so that the prompt is read from cache."""

    def __init__(self, kernels: Kernels, model: NestedModel, rows: int) -> None:
        a = model.architecture
        self.kernels = kernels
        self.model = model
        self.device = torch.device("cpu")
        self.cos, self.sin = (table[:, 0].float().contiguous() for table in model.rotary)
        # Untouched memory costs nothing, so rows have room for the longest prefix although most of it stays unused.
        self.block = 2 * BLOCK * a.head_dim
        shape = (model.attentions, -(-model.longest // BLOCK), a.key_heads, rows, self.block)
        self.own = self._room(shape)
        self.prompts: list[SharedPrompt | None] = [None] * rows
        self.prompt_tokens = np.zeros(rows, dtype=np.int64)
        self.prompt_blocks = np.zeros(rows, dtype=np.int64)
        self.prompt_at = np.zeros(rows, dtype=np.uint64)
        self.order: np.ndarray | None = None
        self.words = self.block * model.dtype.itemsize // 4
        self.offsets = np.arange(rows) * self.words
        self.table = self._table(list(self.own))

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        return self.kernels.own_store(shape, self.model.dtype)

    def _table(self, stores: list[Tensor]) -> Any:
        """The kept layers for the kernels; ``stores`` are those of their attentions."""
        table = (LayerStep * len(self.model.layers))()
        attention = 0  # number among those kept: the place of its keys and values
        for entry, w in zip(table, self.model.layers, strict=True):
            entry.window = w.window or 0
            entry.query_norm, entry.key_norm = (None if n is None else n.data_ptr() for n in (w.query_norm, w.key_norm))
            if w.attends:
                entry.number, entry.store = attention, stores[attention].data_ptr()
                attention += 1
        return table

    def remember(self, kv: list[Tensor]) -> SharedPrompt:
        """In the kernels' layout."""
        a, tokens = self.model.architecture, len(kv[0])
        blocks = -(-tokens // BLOCK)
        store = torch.zeros(len(kv), blocks, a.key_heads, self.block, dtype=self.model.dtype)
        for layer_index, part in enumerate(kv):
            self.kernels.store_prompt(part.contiguous(), store, layer_index)
        return SharedPrompt(store, tokens, blocks)

    def begin(self, row: int, prompt: SharedPrompt | None, size: int) -> None:
        """Refer to the prompt."""
        self.prompts[row] = prompt
        self.prompt_tokens[row] = prompt.tokens if prompt else 0
        self.prompt_blocks[row] = prompt.stride if prompt else 0
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
        a = self.model.architecture
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
            is_bf16=self.model.dtype == torch.bfloat16,
        )

    def decode(self, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``kv_cache.Store.decode``."""
        model, call = self.model, self.kernels
        eps, dtype = model.architecture.eps, model.dtype
        token, position = np.ascontiguousarray(token), np.ascontiguousarray(position)
        step = self._step(self._order(len(token)), token, position)
        x = F.embedding(torch.from_numpy(token), model.embedding).float()
        delta = None
        for w, entry in zip(model.layers, self.table, strict=True):
            if w.attends:
                qkv = w.qkv(call.add_norm(x, delta, w.attention_norm, eps, dtype))
                delta = w.out(call.decode_attention(step, entry, qkv))
            if w.transforms:
                delta = w.down(call.silu_mul(w.gate_up(call.add_norm(x, delta, w.mlp_norm, eps, dtype))))
        return call.add_norm(x, delta, model.norm, eps, dtype).float()

    def extend(self, row: np.ndarray, token: np.ndarray, position: np.ndarray) -> Tensor:
        """As ``kv_cache.Store.extend``: products of all tokens together, attention of one token of each row at a
        time."""
        model, call = self.model, self.kernels
        eps, dtype = model.architecture.eps, model.dtype
        parts = [self._tokens(row[at], token[at], position[at], at) for at in _one_of_each_row(row)]
        x = F.embedding(torch.from_numpy(token), model.embedding).float()
        delta = None
        for w, entry in zip(model.layers, self.table, strict=True):
            if w.attends:
                qkv = w.qkv(call.add_norm(x, delta, w.attention_norm, eps, dtype))
                mixed = qkv.new_empty(len(qkv), model.architecture.query_heads * model.architecture.head_dim)
                for part in parts:
                    mixed[part.at] = call.decode_attention(part.step, entry, qkv[part.at].contiguous())
                delta = w.out(mixed)
            if w.transforms:
                delta = w.down(call.silu_mul(w.gate_up(call.add_norm(x, delta, w.mlp_norm, eps, dtype))))
        return call.add_norm(x, delta, model.norm, eps, dtype).float()

    def _tokens(self, row: np.ndarray, token: np.ndarray, position: np.ndarray, at: np.ndarray) -> Tokens:
        """The description of a step of ``token`` [N] at ``position`` [N] in ``row`` [N], in that order."""
        own, tokens, blocks, prompt = (
            x[row] for x in (self.offsets, self.prompt_tokens, self.prompt_blocks, self.prompt_at)
        )
        order = np.arange(len(row), dtype=np.int32)
        token, position = np.ascontiguousarray(token), np.ascontiguousarray(position)
        step = self._step(order, token, position)
        step.own, step.prompt = own.ctypes.data, prompt.ctypes.data
        step.prompt_tokens, step.prompt_blocks = tokens.ctypes.data, blocks.ctypes.data
        return Tokens(torch.from_numpy(at), step, (own, tokens, blocks, prompt, order, token, position))

    def products(self, rows: int) -> None:
        """As ``kv_cache.Store.products``."""
        self.model.multiply(rows)

    def plan(self, position: np.ndarray) -> Callable[[int, Tensor], Tensor]:
        """As ``kv_cache.Store.plan``."""
        return lambda number, token: self.decode(token.numpy(), position[number])
