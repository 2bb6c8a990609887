"""A decode step's descriptions for the compiled kernels, and whole steps in one call."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.native.calls import FLAG, FLOAT, INT, Array, Memory, declare
from policies.native.sizes import LANES, PANEL

_POINTER = ctypes.c_void_p


class DecodeStep(ctypes.Structure):
    """Mirrors the struct of the same name in attend.h."""

    _fields_ = (
        *((name, INT) for name in ("query_heads", "key_heads", "head_dim", "width", "inner")),
        *((name, INT) for name in ("rows", "head_step", "block_step")),
        *((name, _POINTER) for name in ("cos", "sin", "order", "token", "position", "own")),
        *((name, _POINTER) for name in ("prompt_tokens", "prompt_blocks", "prompt")),
        ("scale", FLOAT),
        ("eps", FLOAT),
        ("is_bf16", ctypes.c_int32),
    )


class LayerStep(ctypes.Structure):
    """Mirrors the struct of the same name in attend.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _POINTER) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("qkv_bias", "out_bias", "gate_up_bias", "down_bias")),
        ("store", _POINTER),
        ("number", INT),
        ("window", INT),
    )


_SIGNATURES: dict[str, list[Any]] = {
    "nr_pack_panels": [Memory, Memory, INT, INT, FLAG, FLAG],
    "nr_draw": [Memory, Memory, INT, INT, INT, FLOAT, Memory, Memory, Memory],
    "nr_run": [ctypes.POINTER(DecodeStep), ctypes.POINTER(LayerStep), INT, Array, INT, Memory, Memory, Memory, FLAG],
}


class Panels:
    """A weight [columns, k], float32 or bfloat16, and its bias [columns], as whole steps multiply with them.

    ``gated``: the columns are gates, then what they multiply; they come to lie side by side."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, gated: bool = False) -> None:
        columns, k = weight.shape
        pack = 4 // weight.element_size()
        count = -(-(columns // 2) // LANES) if gated else -(-columns // PANEL)
        self.columns = columns
        self.weight = weight.new_empty(count, -(-k // pack), PANEL, pack)
        source, is_bf16 = weight.contiguous(), weight.dtype == torch.bfloat16
        library.nr_pack_panels(source, self.weight, columns, k, gated, is_bf16)
        self.bias: Tensor | None = None
        if bias is not None:
            source, self.bias = bias.float().contiguous(), torch.empty(count, PANEL)
            library.nr_pack_panels(source, self.bias, columns, 1, gated, False)


class StepKernels:
    """Whole decode steps, and draws from float32 heads, in one call each."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        self._library = library

    def pack(self, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Panels:
        """``Panels`` of a weight."""
        return Panels(self._library, weight, bias, gated)

    def run(
        self,
        step: DecodeStep,
        layers: Any,
        bounds: np.ndarray,
        ends: tuple[Tensor, Tensor],
        hidden: Tensor | None,
        products: bool = False,
    ) -> None:
        """Rows ``bounds[i]`` to ``bounds[i + 1]`` (int64) of ``step.order``, one part per thread, through ``layers``,
        an array of ``LayerStep``.

        ``ends`` are the embedding [V, width] and the last norm's weight [width]; ``hidden`` [rows, width] receives the
        final hidden states, or is None where keys and values are all that is wanted. All three are float32. With
        ``products`` nothing is computed but the matrix products, on whatever numbers there are: to time them."""
        embedding, norm = ends
        self._library.nr_run(step, layers, len(layers), bounds, len(bounds) - 1, embedding, norm, hidden, products)

    def draw(self, hidden: Tensor, head: Panels, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n] and log-probabilities [n] float32 from ``hidden`` [n, width] float32, as ``sampling.draw``."""
        rows, width = hidden.shape
        token, logp = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self._library.nr_draw(hidden, head.weight, rows, head.columns, width, temperature, uniform, token, logp)
        return token, logp
