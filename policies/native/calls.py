"""How Python's values become arguments of the compiled functions."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

INT, FLOAT, FLAG = ctypes.c_int64, ctypes.c_float, ctypes.c_int
_pointer = ctypes.c_void_p.from_param


class Memory:
    """The type of an argument that is a contiguous CPU tensor, or None for a null pointer."""

    @staticmethod
    def from_param(tensor: Tensor | None) -> Any:
        """What ctypes passes."""
        return _pointer(None if tensor is None else tensor.data_ptr())


class Array:
    """The type of an argument that is a contiguous numpy array."""

    @staticmethod
    def from_param(array: Any) -> Any:
        """What ctypes passes."""
        return _pointer(array.ctypes.data)


def declare(library: ctypes.CDLL, signatures: dict[str, list[Any]]) -> None:
    """Give the library's functions, which return nothing, their arguments' types."""
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
