"""Attention without padding, by torch's variable-length kernel on a GPU: of packed tokens, and of decode steps.

Each sequence of queries sees a sequence of keys that ends with it: a prompt itself, or a completion its prompt and
itself. Keys and values of a prompt are gathered once per completion, and autograd sums their gradients. The kernel is
FlashAttention's (arXiv 2307.08691): half precision, heads of at most 256 channels, the last query sees the last key.
Before it is trusted it is compared with the padded attention, values and gradients, on the device it will run on.

Shape letters: N packed tokens, K gathered ones, Hq query heads, Hk key heads, D channels per head, P prompts, B
completions, R sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from policies.model.attention import CausalAttention, SharedPromptAttention, SlotAttention

TOLERANCE = 3e-2  # of values and gradients in half precision, relative to the largest; rounding makes about 0.6 %

# From this version on torch's public function shares key heads among query heads and reads a sequence's first keys.
PUBLIC = TorchVersion(torch.__version__) >= "2.12"

CAUSAL = (-1, 0)  # all keys to the left of a query's own, none to the right

# (query [N, Hq, D], key [N, Hk, D], value [N, Hk, D], window) -> [N, Hq * D]
Attention = Callable[[Tensor, Tensor, Tensor, "int | None"], Tensor]


@dataclass(frozen=True)
class Spans:
    """R sequences of queries and of keys, one after the other.

    Attributes:
        queries, keys: [R + 1] int32, where each begins, and the end.
        index: [K] int64, the packed tokens whose keys and values they are; None for all N in their order.
        longest: tokens of the longest sequence of queries and of keys.
    """

    queries: Tensor
    keys: Tensor
    index: Tensor | None
    longest: tuple[int, int]


def shared_spans(prompt_size: Tensor, prompt_of: Tensor, own: Tensor) -> Spans:
    """Of prompts with ``prompt_size`` [P] tokens, which lie first, and completions with ``own`` [B] tokens (perhaps
    none) of the prompts ``prompt_of`` [B]."""
    prompt_start = prompt_size.cumsum(0) - prompt_size
    own_start = prompt_size.sum() + own.cumsum(0) - own
    written = own > 0
    of, none = prompt_of[written], torch.zeros_like(prompt_size)
    shared = torch.cat((prompt_size, prompt_size[of]))
    keys = shared + torch.cat((none, own[written]))
    starts = torch.cat((prompt_start, prompt_start[of])), torch.cat((none, own_start[written])) - shared
    row = torch.repeat_interleave(torch.arange(len(keys), device=keys.device), keys)
    place = torch.arange(len(row), device=keys.device) - (keys.cumsum(0) - keys)[row]
    index = place + torch.where(place < shared[row], starts[0][row], starts[1][row])
    queries = torch.cat((prompt_size, own[written]))
    ends = [F.pad(size.cumsum(0), (1, 0)).int() for size in (queries, keys)]
    return Spans(ends[0], ends[1], index if len(of) else None, (int(queries.max()), int(keys.max())))


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float,
    seen: tuple[int, int],
    used: Tensor | None = None,
) -> Tensor:
    """[N, Hq, D] by the kernel, of query [N, Hq, D], key and value [K, Hk, D].

    Args:
        query, key, value: sequences, one after the other.
        spans: where they begin.
        scale: multiplies the scores.
        seen: keys to the left and to the right of a query's own place that it sees; -1: all.
        used: [R] int32, how many of each sequence's keys are there; keys are then not split among blocks of threads,
            since how they are split would depend on the other rows, and so would the rounding.
    """
    if not PUBLIC:
        return torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            spans.queries,
            spans.keys,
            *spans.longest,
            0.0,  # no dropout
            seen == CAUSAL,
            False,
            scale=scale,
            window_size_left=seen[0],
            window_size_right=seen[1],
            seqused_k=used,
        )[0]
    from torch.nn.attention.varlen import varlen_attn

    whole: dict[str, Any] = {} if used is None else {"seqused_k": used, "num_splits": 1}
    bounds = spans.queries, spans.keys, *spans.longest
    out = varlen_attn(query, key, value, *bounds, scale=scale, window_size=seen, enable_gqa=True, **whole)
    assert isinstance(out, Tensor)
    return out


def span_attention(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, window: int | None) -> Tensor:
    """[N, Hq * D] by the kernel; arguments as of an ``Attention``."""
    if spans.index is not None:
        key, value = key.index_select(0, spans.index), value.index_select(0, spans.index)
    seen = CAUSAL if window is None else (window - 1, 0)
    return flash_attention(query, key, value, spans, scale, seen).flatten(1)


def can_attend_unpadded(query: Tensor) -> bool:
    """Whether the kernel is made for a query [N, Hq, D]."""
    channels = query.shape[2]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and channels % 8 == 0 and channels <= 256


class UnpaddedAttention:
    """What ``padded`` computes, without padding where the kernel can be had and trusted.

    Args:
        padded: an ``Attention``.
        scale: multiplies the scores.
        spans: of the packed tokens; asked for once, if at all.
    """

    def __init__(self, padded: Attention, scale: float, spans: Callable[[], Spans]) -> None:
        self.padded = padded
        self.scale = scale
        self.spans = cache(spans)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """As an ``Attention``."""
        kind = query.device, query.dtype, query.shape[1:], key.shape[1]
        if can_attend_unpadded(query) and kernel_agrees(disagreement, *kind, window is not None):
            return span_attention(query, key, value, self.spans(), self.scale, window)
        return self.padded(query, key, value, window)


class UnpaddedSlots:
    """What ``padded`` computes, reading only what each row holds, where the kernel can be had and trusted.

    Args:
        padded: the attention.
        room: places of a row's keys and values.
    """

    def __init__(self, padded: SlotAttention, room: int) -> None:
        self.padded = padded
        self.each = torch.arange(len(padded.used) + 1, dtype=torch.int32, device=padded.used.device)
        self.keys = self.each * room
        self.used = padded.used.int()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """As a ``SlotAttention``."""
        if reads_what_rows_hold(query, key.shape[-2], window is not None):
            return self.kernel(query, key, value, window)
        return self.padded(query, key, value, window)

    def kernel(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """As a ``SlotAttention``, by the kernel. The query heads that share a key head go as several queries of it, so
        that its keys are read once; with a window, which begins elsewhere for each of several queries, as they are."""
        rows, channels, key_heads = len(query), query.shape[2], key.shape[2]
        several = query.shape[1] // key_heads if window is None else 1
        seen = (-1, -1) if window is None else (window - 1, 0)
        spans = Spans(self.each * several, self.keys, None, (several, self.padded.size))
        query = query.view(rows, -1, several, channels).transpose(1, 2).reshape(rows * several, -1, channels)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        mixed = flash_attention(query, key, value, spans, self.padded.scale, seen, self.used)
        return mixed.view(rows, several, -1, channels).transpose(1, 2).reshape(rows, -1)


def reads_what_rows_hold(query: Tensor, key_heads: int, windowed: bool) -> bool:
    """Whether decode steps with queries [N, Hq, D] go through the kernel, whose time does not depend on the room."""
    kind = query.device, query.dtype, query.shape[1:], key_heads
    return can_attend_unpadded(query) and kernel_agrees(slot_disagreement, *kind, windowed)


Check = Callable[[torch.device, torch.dtype, torch.Size, int, "int | None"], float]


@cache
def kernel_agrees(
    check: Check, device: torch.device, dtype: torch.dtype, heads: torch.Size, key_heads: int, windowed: bool
) -> bool:
    """Whether the kernel agrees with the padded attention for queries of ``heads`` [Hq, D]; warns if it does not."""
    try:
        error = check(device, dtype, heads, key_heads, 7 if windowed else None)
    except (ImportError, RuntimeError, TypeError, ValueError) as raised:
        reason = str(raised).strip().split("\n")[0]
    else:
        if error <= TOLERANCE:
            return True
        reason = f"it differs from padded attention by {error:.1%} of the largest number"
    use = "to decode " if check is slot_disagreement else ""
    warnings.warn(
        f"torch's variable-length attention is not used {use}for {heads[0]} and {key_heads} heads of {heads[1]} in "
        f"{dtype}{' with a window' if windowed else ''} ({reason}): padded attention is, slower and with more memory",
        stacklevel=2,
    )
    return False


@torch.inference_mode(False)
@torch.enable_grad()
def disagreement(
    device: torch.device, dtype: torch.dtype, heads: torch.Size, key_heads: int, window: int | None
) -> float:
    """The largest difference from padded float32 attention, of values and gradients, relative to the largest number."""
    generator = torch.Generator().manual_seed(0)
    prompt_size, prompt_of = torch.tensor([5, 1, 40]), torch.tensor([0, 0, 1, 2, 2, 2])
    own = torch.tensor([9, 1, 30, 0, 70, 3])
    prompt = torch.repeat_interleave(torch.arange(3), prompt_size)
    completion = torch.repeat_interleave(torch.arange(6), own)
    place = torch.cat([torch.arange(int(size)) for size in (*prompt_size, *own)])
    n, scale = len(prompt), heads[1] ** -0.5
    shapes = (heads[0], heads[1]), (key_heads, heads[1]), (key_heads, heads[1])
    inputs = [torch.randn(len(place), *shape, generator=generator) for shape in shapes]
    slope = torch.randn(len(place), heads[0] * heads[1], generator=generator).to(device)
    place[n:] += prompt_size[prompt_of][completion]
    prompt, completion, place, prompt_size, prompt_of, own = (
        x.to(device) for x in (prompt, completion, place, prompt_size, prompt_of, own)
    )
    causal = CausalAttention(prompt, place[:n], scale)
    padded = SharedPromptAttention(causal, completion, place[n:], prompt_of, prompt_size)
    spans = shared_spans(prompt_size, prompt_of, own)
    rounded = [x.to(device, dtype) for x in inputs]

    def values_and_gradients(given: list[Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(out.dtype))]

    expected = values_and_gradients([x.float() for x in rounded], lambda q, k, v: padded(q, k, v, window))
    results = values_and_gradients(rounded, lambda q, k, v: span_attention(q, k, v, spans, scale, window))
    return max(
        float((ours.float() - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(results, expected, strict=True)
    )


@torch.inference_mode(False)
@torch.no_grad()
def slot_disagreement(
    device: torch.device, dtype: torch.dtype, heads: torch.Size, key_heads: int, window: int | None
) -> float:
    """As ``disagreement``, of values alone, for rows that hold 1 to 90 of 96 places."""
    generator = torch.Generator().manual_seed(0)
    used = torch.tensor([1, 90, 7, 64, 8, 33, 1]).to(device)
    query = torch.randn(len(used), *heads, generator=generator).to(device, dtype)
    kv = torch.randn(len(used), 96, 2, key_heads, heads[1], generator=generator).to(device, dtype)
    padded = SlotAttention(used, 90, heads[1] ** -0.5)
    expected = padded(query.float(), kv[:, :, 0].float(), kv[:, :, 1].float(), window)
    mixed = UnpaddedSlots(padded, 96).kernel(query, kv[:, :, 0], kv[:, :, 1], window)
    return float((mixed.float() - expected).abs().max() / expected.abs().max())
