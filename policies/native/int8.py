"""The compiled products on bytes."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from policies.native.calls import FLAG, FLOAT, INT, Memory, declare
from policies.native.sizes import PANEL

_SIGNATURES: dict[str, list[Any]] = {
    "nr_int8_pack": [Memory, INT, INT, INT, Memory, Memory],
    "nr_int8_round": [Memory, INT, INT, INT] + [Memory] * 4,
    "nr_int8_linear": [Memory, INT, INT, INT] + [Memory] * 3 + [INT] + [Memory] * 5 + [FLAG],
    "nr_int8_head_draw": [Memory] * 6 + [INT] * 3 + [FLOAT] + [Memory] * 5,
}


class Int8Kernels:
    """The library's functions on contiguous CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        self._library = library

    def pack(self, weight: Tensor, block: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """``weight`` [columns, k] float32 in panels, and its scales [columns]; ``whole`` pads these to whole panels."""
        columns, k = weight.shape
        count = -(-columns // PANEL)
        panels = torch.zeros(count, k // 4, PANEL, dtype=torch.int32)
        scale = torch.zeros(count * PANEL if whole else columns)
        source = weight.contiguous()
        self._library.nr_int8_pack(source, columns, k, block, panels, scale)
        return panels, scale

    def linear(self, x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor | None, block: int) -> Tensor:
        """[n, columns] in the dtype of ``x`` [n, k], float32 or bfloat16."""
        n, k = x.shape
        out = x.new_empty(n, len(scale))
        self._library.nr_int8_linear(
            x, n, k, block, panels, scale, bias, len(scale), *_rows(n, k), out, x.dtype == torch.bfloat16
        )
        return out

    def draw(
        self,
        hidden: Tensor,
        packed: tuple[Tensor, Tensor],
        vocabulary: int,
        block: int,
        temperature: float,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [n] and log-probabilities [n] float32 from ``hidden`` [n, width] float32, as ``sampling.draw``;
        ``packed`` is a whole ``pack``."""
        n, width = hidden.shape
        hidden, rows = hidden.contiguous(), _rows(n, width)
        self._library.nr_int8_round(hidden, n, width, block, *rows)
        token, logp = torch.empty(n, dtype=torch.int64), torch.empty(n)
        peak, total = torch.empty(2, n, len(packed[0])).unbind()
        self._library.nr_int8_head_draw(
            *rows, *packed, n, vocabulary, width, temperature, uniform, token, logp, peak, total
        )
        return token, logp


def _rows(n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for rows of bytes, their scales, their sums and their parts that are multiplied apart."""
    apart = torch.empty(n, 1 + k // 4, 2, dtype=torch.int32)
    return torch.empty(n, k, dtype=torch.int8), torch.empty(n), torch.empty(n, dtype=torch.int32), apart
