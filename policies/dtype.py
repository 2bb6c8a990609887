"""What a policy's matrix products are in, and on what device: by name, or as suits the processor."""

from __future__ import annotations

import sys
from functools import cache

import torch

from policies.model.compute import fast_dtype
from policies.pretrained.load import BUILT_IN, folder_dtype, locate
from registry import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO = "auto"


def settle_dtype(dtype: str | None, name_or_path: str, device: str = "cpu") -> str | None:
    """``dtype`` as it is given; for ``auto`` the one that ``device`` is fastest in, which is told once on stderr. The
    built-in model stays as it is by default, float32 (None), so that its numbers do not depend on the machine.

    Raises:
        UsageError: an unknown dtype, a device that is none.
    """
    if dtype != AUTO:
        compute_dtype(dtype)
        return dtype
    target = device_of(device)
    if name_or_path in BUILT_IN:
        return None
    chosen, why = fast_dtype(target)
    try:
        locate(name_or_path)
    except UsageError:
        return chosen  # whoever loads it says so, and nothing is computed
    _tell_dtype(chosen, why, rounds=chosen == "bfloat16" and folder_dtype(name_or_path) == "float32")
    return chosen


@cache
def _tell_dtype(dtype: str, why: str, rounds: bool) -> None:
    other = next(name for name in DTYPES if name != dtype)
    loss = "; weights that config.json says are float32 are rounded to it" if rounds else ""
    print(f"computing in dtype={dtype}: {why}{loss}; dtype={other} is the other choice", file=sys.stderr)


def device_of(name: str) -> torch.device:
    """The device of this name. Raises ``UsageError`` for what is neither a CPU nor an NVIDIA or AMD card: nothing was
    compared on others."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device={name!r} is not a torch device: use 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"device={name!r} is not supported: no computation here was compared with a processor's on such a device. "
            "Use 'cpu', where the compiled kernels run, or 'cuda'"
        )
    return device


def available_device(name: str) -> torch.device:
    """``device_of``, where torch finds it. Raises ``UsageError`` where it does not."""
    device = device_of(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={name!r}, but torch finds no CUDA device: use 'cpu'")
    return device


def compute_dtype(name: str | None) -> torch.dtype:
    """The dtype of this name, float32 of None. Raises ``UsageError`` for an unknown one."""
    if name not in (None, *DTYPES):
        raise UsageError(f"dtype={name!r} is unknown: use one of {', '.join((AUTO, *DTYPES))}")
    return DTYPES[name or "float32"]
