"""The compiled products on bytes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from policies.native.sizes import PANEL

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "nr_int8_pack": [_POINTER, _INT, _INT, _INT, _POINTER, _POINTER],
    "nr_int8_round": [_POINTER, _INT, _INT, _INT] + [_POINTER] * 3,
    "nr_int8_linear": [_POINTER, _INT, _INT, _INT] + [_POINTER] * 3 + [_INT] + [_POINTER] * 4 + [ctypes.c_int],
    "nr_int8_head_draw": [_POINTER] * 5 + [_INT] * 3 + [_FLOAT] + [_POINTER] * 5,
}


class Int8Kernels:
    """The library's functions on contiguous CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def pack(self, weight: Tensor, block: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """``weight`` [columns, k] float32 in panels, and its scales [columns]; ``whole`` pads these to whole panels."""
        columns, k = weight.shape
        count = -(-columns // PANEL)
        panels = torch.zeros(count, k // 4, PANEL, dtype=torch.int32)
        scale = torch.zeros(count * PANEL if whole else columns)
        source = weight.contiguous()
        self._library.nr_int8_pack(source.data_ptr(), columns, k, block, panels.data_ptr(), scale.data_ptr())
        return panels, scale

    def linear(self, x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor | None, block: int) -> Tensor:
        """[n, columns] in the dtype of ``x`` [n, k], float32 or bfloat16."""
        n, k = x.shape
        out = x.new_empty(n, len(scale))
        tensors = (*_rows(n, k), out)
        self._library.nr_int8_linear(
            x.data_ptr(),
            n,
            k,
            block,
            panels.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            len(scale),
            *(tensor.data_ptr() for tensor in tensors),
            x.dtype == torch.bfloat16,
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
        self._library.nr_int8_round(hidden.data_ptr(), n, width, block, *(tensor.data_ptr() for tensor in rows))
        token, logp = torch.empty(n, dtype=torch.int64), torch.empty(n)
        peak, total = torch.empty(2, n, len(packed[0])).unbind()
        self._library.nr_int8_head_draw(
            *(tensor.data_ptr() for tensor in (*rows, *packed)),
            n,
            vocabulary,
            width,
            temperature,
            *(tensor.data_ptr() for tensor in (uniform, token, logp, peak, total)),
        )
        return token, logp


def _rows(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for rows of bytes, their scales and their sums."""
    return torch.empty(n, k, dtype=torch.int8), torch.empty(n), torch.empty(n, dtype=torch.int32)
