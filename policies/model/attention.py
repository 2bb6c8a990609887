"""Attention over packed tokens: no padding in the matrix products, padded views only here.

Shape letters: N packed tokens, Hq query heads, Hk key heads, D channels per head, B sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.model.packing import Layout
from policies.native import Kernels


class Padding:
    """How packed tokens [N, ...] map to a right-padded view [B, longest, ...] and back."""

    def __init__(self, sequence: Tensor, place: Tensor, rows: int) -> None:
        self.rows = rows
        self.longest = int(place.max()) + 1 if len(place) else 0
        self.flat = sequence * self.longest + place

    def pad(self, x: Tensor) -> Tensor:
        """[N, H, D] -> [B, H, longest, D]; padding is 0."""
        padded = x.new_zeros(self.rows * self.longest, *x.shape[1:]).index_copy(0, self.flat, x)
        return padded.view(self.rows, self.longest, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, longest, D] -> [N, H * D]."""
        return x.transpose(1, 2).reshape(self.rows * self.longest, -1).index_select(0, self.flat)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B, Hq, C, D] from query [B, Hq, C, D], key, value [B, Hk, K, D] and ``mask`` [B, 1, C, K] (true: seen)."""
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    # torch's own bfloat16 backward on a CPU has been measured at a quarter of the speed of these plain products.
    rows, heads, size, channels = query.shape
    shared = key.shape[1]
    grouped = (query * scale).reshape(rows, shared, heads // shared * size, channels)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(rows, shared, heads // shared, size, -1)
    hidden = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    weights = (scores + hidden[:, :, None]).softmax(-1).view(rows, shared, heads // shared * size, -1)
    return torch.matmul(weights, value).view(rows, heads, size, channels)


class CausalAttention:
    """Causal self-attention within each of the packed sequences.

    Args:
        sequence: [N] int64, each token's sequence, 0 to B-1, none missing.
        place: [N] int64, its place in the sequence.
        scale: multiplies the scores.
    """

    def __init__(self, sequence: Tensor, place: Tensor, scale: float) -> None:
        self.padding = Padding(sequence, place, int(sequence[-1]) + 1)
        self.scale = scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """[N, Hq * D] from query [N, Hq, D] and key, value [N, Hk, D]; a token sees the ``window`` last ones."""
        pad, longest = self.padding.pad, self.padding.longest
        mask = None
        if window is not None and window < longest:
            distance = torch.arange(longest, device=query.device)
            distance = distance[:, None] - distance
            mask = (distance >= 0) & (distance < window)
        # Padding lies to the right of every real token, so the causal mask alone keeps it out.
        mixed = F.scaled_dot_product_attention(
            pad(query), pad(key), pad(value), attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return self.padding.unpad(mixed)


class SlotAttention:
    """Attention of one token of each row to what the row holds.

    Args:
        used: [R] int64, the tokens that each of R rows holds, its last one included.
        size: at least as many.
        scale: multiplies the scores.
    """

    def __init__(self, used: Tensor, size: int, scale: float) -> None:
        self.used = used
        self.size = size
        self.scale = scale
        self.masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.masks:
            key, used = torch.arange(self.size, device=self.used.device), self.used[:, None]
            seen = key < used
            if window is not None:
                seen &= key >= used - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=key.device).masked_fill_(~seen, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """[R, Hq * D] from query [R, Hq, D] and the rows' key, value [R, >= size, Hk, D]."""
        grouped = query.view(len(query), key.shape[2], -1, query.shape[2])
        keys, values = (x[:, : self.size].transpose(1, 2) for x in (key, value))
        mask = self._mask(window, query.dtype)
        mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.scale)
        return mixed.reshape(len(query), -1)


class SharedPromptAttention:
    """Causal attention of completions to their prompt, which several may share, and to themselves.

    Args:
        prompts: attention within the prompts, whose tokens come first.
        sequence: [N'] int64, the completion that each of the remaining tokens belongs to.
        position: [N'] int64, its place in prompt + completion.
        prompt_of: [B] int64, each completion's prompt.
        prompt_size: [P] int64, tokens per prompt.
    """

    def __init__(
        self, prompts: CausalAttention, sequence: Tensor, position: Tensor, prompt_of: Tensor, prompt_size: Tensor
    ) -> None:
        self.prompts = prompts
        self.prompt_of = prompt_of
        self.size = prompt_size[prompt_of]
        self.own = Padding(sequence, position - self.size[sequence], len(prompt_of))
        self.masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None) -> Tensor:
        """[B, 1, C, P + C] bool, true where a completion token (C) sees a prompt or completion token (P + C)."""
        if window not in self.masks:
            device, rows = self.size.device, len(self.size)
            own = self.size[:, None] + torch.arange(self.own.longest, device=device)
            prompt = torch.arange(self.prompts.padding.longest, device=device).expand(rows, -1)
            key = torch.cat((prompt, own), dim=1)
            real = torch.cat((prompt < self.size[:, None], torch.ones_like(own).bool()), dim=1)
            distance = own[:, :, None] - key[:, None]
            seen = real[:, None] & (distance >= 0)
            self.masks[window] = (seen if window is None else seen & (distance < window))[:, None]
        return self.masks[window]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """[N, Hq * D] from query [N, Hq, D] and key, value [N, Hk, D], prompt tokens first."""
        n = len(query) - len(self.own.flat)
        prompt = self.prompts(query[:n], key[:n], value[:n], window)
        if not self.own.longest:
            return prompt
        padded = self.own.pad(query[n:])
        mixed = masked_attention(
            padded, self._past(key, n), self._past(value, n), self._mask(window), self.prompts.scale
        )
        return torch.cat((prompt, self.own.unpad(mixed)))

    def _past(self, x: Tensor, n: int) -> Tensor:
        return torch.cat((self.prompts.padding.pad(x[:n])[self.prompt_of], self.own.pad(x[n:])), dim=2)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, native: Kernels, layout: Layout, window: int | None) -> Tensor:
        out, normaliser = native.packed_attention(layout.struct(window), qkv)
        ctx.save_for_backward(qkv, out, normaliser)
        ctx.native, ctx.layout, ctx.window = native, layout, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, normaliser = ctx.saved_tensors
        grad = grads[0].contiguous()
        return (
            ctx.native.packed_attention_backward(ctx.layout.struct(ctx.window), qkv, out, normaliser, grad),
            None,
            None,
            None,
        )


class CompiledAttention:
    """What ``SharedPromptAttention`` computes, and the rotation before it, by the compiled kernels: without padding,
    and with no scores kept for the backward.

    Args:
        native: the kernels.
        layout: of the packed tokens.
    """

    def __init__(self, native: Kernels, layout: Layout) -> None:
        self.native = native
        self.layout = layout

    def __call__(self, heads: Tensor, window: int | None) -> Tensor:
        """[N, Hq * D] from unrotated ``heads`` [N, Hq + 2 Hk, D]; a token sees the ``window`` last ones."""
        return _PackedAttention.apply(heads.flatten(1).contiguous(), self.native, self.layout, window)
