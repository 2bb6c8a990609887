"""The layout of an update's packed tokens as packed_attention.cpp reads it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
LANES = 16  # floats of a vector, as in tiles.h: heads and the widths of gradients are of a multiple of so many channels


class PackedLayout(ctypes.Structure):
    """Mirrors the struct of the same name in packed_attention.cpp."""

    _fields_ = (
        *((name, _INT) for name in ("query_heads", "key_heads", "head_dim", "window", "prompts")),
        *((name, _POINTER) for name in ("prompt_start", "prompt_size", "first", "start", "size", "cos", "sin")),
        ("scale", ctypes.c_float),
    )
