"""The layout of an update's packed tokens as packed_attention.cpp reads it."""

from __future__ import annotations

import ctypes

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class PackedLayout(ctypes.Structure):
    """Mirrors the struct of the same name in packed_attention.cpp."""

    _fields_ = (
        *((name, _INT) for name in ("query_heads", "key_heads", "head_dim", "window", "prompts")),
        *((name, _POINTER) for name in ("prompt_start", "prompt_size", "first", "start", "size", "cos", "sin")),
        ("scale", ctypes.c_float),
    )
