"""Optional compiled kernels for a CPU.

Of decoding: whole steps, or what lies between the matrix products. Of updates: attention, norms, gates and small
products. The bfloat16 head with its draws and slopes. Products on bytes.

Built on first use where there is a C++ compiler; without one the pure torch path does the same, slower, and a warning
says so. ``NESTED_REFT_NATIVE=0`` chooses the pure path.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from policies.native.build import open_library
from policies.native.calls import FLAG, FLOAT, INT, Memory, declare
from policies.native.int8 import Int8Kernels
from policies.native.packed import PackedLayout
from policies.native.sizes import BLOCK, PANEL
from policies.native.step import DecodeStep, LayerStep, StepKernels

_SIGNATURES: dict[str, list[Any]] = {
    "nr_keep_freed_memory": [],
    "nr_add_norm": [Memory, Memory, Memory, Memory, INT, INT, FLOAT, FLAG],
    "nr_silu_mul": [Memory, Memory, INT, INT, FLAG],
    "nr_decode_attention": [ctypes.POINTER(DecodeStep), ctypes.POINTER(LayerStep), Memory, Memory],
    "nr_large_pages": [Memory, INT],
    "nr_store_prompt": [Memory, Memory] + [INT] * 5 + [FLAG],
    "nr_packed_attention": [ctypes.POINTER(PackedLayout)] + [Memory] * 3 + [FLAG],
    "nr_packed_attention_backward": [ctypes.POINTER(PackedLayout)] + [Memory] * 5 + [FLAG],
    "nr_norm_forward": [Memory] * 4 + [INT, INT, FLOAT, FLAG],
    "nr_norm_backward": [Memory] * 6 + [INT, INT, INT, FLAG],
    "nr_silu_mul_backward": [Memory] * 3 + [INT, INT, FLAG],
    "nr_small_product": [Memory] * 3 + [INT] * 3,
    "nr_outer_product": [Memory] * 3 + [INT] * 3,
    "nr_pack_head": [Memory, Memory, INT, INT],
    "nr_head_logp": [Memory, Memory, INT, INT, INT, FLOAT] + [Memory] * 6 + [INT],
    "nr_head_slope": [Memory, Memory, INT, INT, INT, FLOAT] + [Memory] * 4 + [INT, Memory, INT],
    "nr_head_draw": [Memory, Memory, INT, INT, INT, FLOAT] + [Memory] * 5,
}


class Kernels:
    """The library's functions on contiguous CPU tensors; the compute dtype is float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        self._library = library
        self.bf16_head = bool(library.nr_head_available())
        self.steps = StepKernels(library)
        self.int8 = Int8Kernels(library) if library.nr_int8_available() else None
        library.nr_keep_freed_memory()

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Add ``delta`` [N, d] of ``dtype`` to the float32 ``x`` [N, d] in place; the sum's RMS norm in ``dtype``."""
        out = torch.empty(x.shape, dtype=dtype)
        rows, width = x.shape
        self._library.nr_add_norm(x, delta, weight, out, rows, width, eps, dtype == torch.bfloat16)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up [N, I] of ``gate_up`` [N, 2 I]."""
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self._library.nr_silu_mul(gate_up, out, rows, width // 2, gate_up.dtype == torch.bfloat16)
        return out

    def silu_mul_backward(self, gate_up: Tensor, grad: Tensor) -> Tensor:
        """The gradient [N, 2 I] of ``silu_mul`` from ``grad`` [N, I] of the same dtype."""
        rows, width = grad.shape
        out = torch.empty_like(gate_up)
        self._library.nr_silu_mul_backward(gate_up, grad, out, rows, width, grad.dtype == torch.bfloat16)
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The RMS norm [N, d] in ``dtype`` of the float32 ``x`` [N, d], and the inverse root mean squares [N]."""
        rows, width = x.shape
        out, inverse = torch.empty(x.shape, dtype=dtype), x.new_empty(rows)
        self._library.nr_norm_forward(x, weight, out, inverse, rows, width, eps, dtype == torch.bfloat16)
        return out, inverse

    def norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients float32 to ``x`` [N, d] and ``weight`` [d] from that of the norm, ``grad`` [N, d]."""
        rows, width = x.shape
        threads = torch.get_num_threads()
        grad_x, grad_weight = torch.empty_like(x), x.new_empty(threads, width)
        self._library.nr_norm_backward(
            grad, x, weight, inverse, grad_x, grad_weight, threads, rows, width, grad.dtype == torch.bfloat16
        )
        return grad_x, grad_weight.sum(0)

    def small_product(self, x: Tensor, b: Tensor) -> Tensor:
        """x @ b [N, M] for float32 ``x`` [N, K] and a small ``b`` [K, M]; M is a multiple of 16."""
        out = x.new_empty(len(x), b.shape[1])
        self._library.nr_small_product(x, b, out, *out.shape, len(b))
        return out

    def outer_product(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad.T @ x [M, K] for float32 ``grad`` [N, M] and ``x`` [N, K]; K is a multiple of 16."""
        out = x.new_empty(grad.shape[1], x.shape[1])
        self._library.nr_outer_product(grad, x, out, len(x), *out.shape)
        return out

    def packed_attention(self, layout: PackedLayout, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Causal attention [N, Hq D] of an update's packed tokens, and the scores' logsumexp [N, Hq] float32, from the
        unrotated ``qkv`` [N, (Hq + 2 Hk) D]."""
        out = qkv.new_empty(len(qkv), layout.query_heads * layout.head_dim)
        normaliser = torch.empty(len(qkv), layout.query_heads)
        self._library.nr_packed_attention(layout, qkv, out, normaliser, qkv.dtype == torch.bfloat16)
        return out, normaliser

    def packed_attention_backward(
        self, layout: PackedLayout, qkv: Tensor, out: Tensor, normaliser: Tensor, grad: Tensor
    ) -> Tensor:
        """The gradient of ``qkv`` from that of ``out``, ``grad`` [N, Hq D]."""
        grad_qkv = torch.empty_like(qkv)
        is_bf16 = qkv.dtype == torch.bfloat16
        self._library.nr_packed_attention_backward(layout, qkv, out, normaliser, grad, grad_qkv, is_bf16)
        return grad_qkv

    def decode_attention(self, step: DecodeStep, layer: LayerStep, qkv: Tensor) -> Tensor:
        """Rotate, store and attend: [n, Hq D] from the fused projections ``qkv`` [n, (Hq + 2 Hk) D] of one layer."""
        out = qkv.new_empty(len(qkv), step.query_heads * step.head_dim)
        self._library.nr_decode_attention(step, layer, qkv, out)
        return out

    def own_store(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for keys and values; what is not used costs nothing."""
        store = torch.empty(shape, dtype=dtype)
        self._library.nr_large_pages(store, store.numel() * store.element_size())
        return store

    def store_prompt(self, kv: Tensor, store: Tensor, layer: int) -> None:
        """Write a prompt's ``kv`` [tokens, 2 Hk D] into ``store`` [layers, blocks, Hk, 2 * BLOCK * D] at ``layer``."""
        _, blocks, heads, size = store.shape
        self._library.nr_store_prompt(
            kv, store, layer, len(kv), blocks, heads, size // (2 * BLOCK), kv.dtype == torch.bfloat16
        )

    def pack_head(self, weight: Tensor) -> Tensor:
        """The head's bfloat16 ``weight`` [V, width] in panels."""
        vocabulary, width = weight.shape
        packed = weight.new_empty(-(-vocabulary // PANEL), width // 2, PANEL, 2)
        self._library.nr_pack_head(weight, packed, vocabulary, width)
        return packed

    def head_logp(
        self, hidden: Tensor, packed: Tensor, vocabulary: int, temperature: float, token: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [n] of ``token`` [n], normalisers [n] and the panels' maxima [n, panels], float32, from
        ``hidden`` [n, width] bfloat16. Into ``kept`` [at most panels, n, PANEL] bfloat16 go the first panels'
        exponentials, which are what ``head_slope`` need not compute again."""
        rows, width = hidden.shape
        logp, normaliser = torch.empty(2, rows).unbind()
        peak, total = torch.empty(rows, len(packed)), torch.empty(rows, len(packed))
        self._library.nr_head_logp(
            hidden, packed, rows, vocabulary, width, temperature, token, logp, normaliser, peak, total, kept, len(kept)
        )
        return logp, normaliser, peak

    def head_slope(
        self,
        hidden: Tensor,
        packed: Tensor,
        vocabulary: int,
        temperature: float,
        rows: tuple[Tensor, Tensor],
        kept: tuple[Tensor, Tensor],
    ) -> Tensor:
        """-factor softmax(logits / temperature) [n, V] bfloat16; ``rows`` are the normalisers [n] and factors [n],
        ``kept`` the exponentials of the first panels of ``packed`` and the maxima [n, panels] of all of them."""
        count, width = hidden.shape
        out = hidden.new_empty(count, vocabulary)
        exponentials, peak = kept
        self._library.nr_head_slope(
            hidden,
            packed,
            count,
            vocabulary,
            width,
            temperature,
            *rows,
            out,
            exponentials,
            len(exponentials),
            peak,
            peak.stride(0),
        )
        return out

    def head_draw(
        self, hidden: Tensor, packed: Tensor, vocabulary: int, temperature: float, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [n] and log-probabilities [n] float32 from ``hidden`` [n, width] bfloat16, as ``sampling.draw``."""
        rows, width = hidden.shape
        token, logp = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
        peak, total = torch.empty(2, rows, len(packed)).unbind()
        self._library.nr_head_draw(
            hidden, packed, rows, vocabulary, width, temperature, uniform, token, logp, peak, total
        )
        return token, logp


@cache
def kernels() -> Kernels | None:
    """The compiled kernels, built if need be; None where they are switched off or (with a warning) cannot be built."""
    if os.environ.get("NESTED_REFT_NATIVE", "1") == "0":
        return None
    try:
        return Kernels(open_library())
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"the compiled kernels could not be built ({reason}): rollouts use pure torch, which is slower; install "
            "a C++ compiler and ninja, or set NESTED_REFT_NATIVE=0 to silence this",
            stacklevel=2,
        )
        return None
