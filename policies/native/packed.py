"""The layout of an update's packed tokens as packed_attention.cpp reads it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policies.native.sizes import LANES as LANES

if TYPE_CHECKING:
    from policies.architecture import Architecture
    from policies.scoring import Packing

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class PackedLayout(ctypes.Structure):
    """Mirrors the struct of the same name in packed_attention.cpp."""

    _fields_ = (
        *((name, _INT) for name in ("query_heads", "key_heads", "head_dim", "window", "prompts")),
        *((name, _POINTER) for name in ("prompt_start", "prompt_size", "first", "start", "size", "cos", "sin")),
        ("scale", ctypes.c_float),
    )


class Layout:
    """``PackedLayout`` structs of one micro-batch, one for each window, and the memory that they point to.

    Args:
        packing: the micro-batch.
        architecture: of the model.
        rotary: cos and sin [positions, tables, D] of ``layers.rotary_table``.
    """

    def __init__(self, packing: Packing, architecture: Architecture, rotary: tuple[Tensor, Tensor]) -> None:
        self.architecture = architecture
        prompts, n = len(packing.prompt_size), packing.prompt_tokens
        sizes = packing.own_size
        starts = n + sizes.cumsum(0) - sizes
        order = packing.prompt_of.argsort(stable=True)
        members = torch.bincount(packing.prompt_of, minlength=prompts)
        self.memory = {
            "prompt_start": packing.prompt_size.cumsum(0) - packing.prompt_size,
            "prompt_size": packing.prompt_size,
            "first": torch.cat((torch.zeros(1, dtype=torch.int64), members.cumsum(0))),
            "start": starts[order],
            "size": sizes[order],
        }
        self.tables = [[part.float().contiguous() for part in table.unbind(1)] for table in rotary]

    def struct(self, window: int | None) -> PackedLayout:
        """What the kernels take, for attention to the ``window`` last tokens; valid as long as this object."""
        a = self.architecture
        table = 1 if a.ropes and window is not None else 0
        return PackedLayout(
            query_heads=a.query_heads,
            key_heads=a.key_heads,
            head_dim=a.head_dim,
            window=window or 0,
            prompts=len(self.memory["prompt_size"]),
            cos=self.tables[0][table].data_ptr(),
            sin=self.tables[1][table].data_ptr(),
            scale=a.scale,
            **{name: tensor.data_ptr() for name, tensor in self.memory.items()},
        )
