"""What computes: the one place that chooses between the compiled kernels, oneDNN and plain torch.

Every choice asks ``native.kernels()`` by that name, so a test that wants the torch path patches one function. What a
GPU has of its own (products with float32 results, attention without padding) is asked where it is called, since it is
compared with the plain computation on the device first.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

import policies.native as native
from policies.native import Kernels
from policies.native.sizes import LANES
from policies.pretrained.architecture import Architecture

# Both caches keep what they make for each number of rows, up to half a megabyte of it, and every update brings other
# numbers of rows: with their 1024 entries a process grows by a gigabyte. What is made again takes half a millisecond.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # of oneDNN, of torch in front of it
    os.environ.setdefault(_cache, "128")

_SMALL_HEAD = 2**20  # weights of a float32 head that each core reads for its own rows
_WHOLE_STEP_BYTES = 2**24  # of all layers' matrices: half of the last-level cache of a small machine


def kernels_for(device: torch.device) -> Kernels | None:
    """The compiled kernels, on a CPU that has them."""
    return native.kernels() if device.type == "cpu" else None


def elementwise_kernels(x: Tensor) -> Kernels | None:
    """For norms, gates and small products of ``x``."""
    return kernels_for(x.device) if x.dtype in (torch.float32, torch.bfloat16) else None


def attention_kernels(architecture: Architecture, device: torch.device) -> Kernels | None:
    """For attention over packed tokens, in updates and in prefill."""
    return kernels_for(device) if architecture.head_dim % LANES == 0 else None


def decode_kernels(architecture: Architecture, device: torch.device) -> Kernels | None:
    """For decode steps: silu gates, heads of a multiple of 16 channels."""
    a = architecture
    covered = a.gate == "silu" and not a.gemma and a.head_dim % native.BLOCK == 0
    return kernels_for(device) if covered else None


def takes_whole_steps(kernels: Kernels, architecture: Architecture, dtype: torch.dtype) -> bool:
    """Whether a model that the decode kernels cover is small enough for whole steps, and its dtype multiplied there."""
    size = architecture.layers * architecture.layer_weights * dtype.itemsize
    return (dtype == torch.float32 or kernels.bf16_head) and size <= _WHOLE_STEP_BYTES


def drawing_head_kernels(device: torch.device, vocabulary: int, width: int, dtype: torch.dtype) -> Kernels | None:
    """For a rollout's head that projects and draws in one call: bfloat16 heads of any size, small float32 ones."""
    kernels = kernels_for(device)
    if kernels is None:
        return None
    if dtype == torch.bfloat16:
        return kernels if kernels.bf16_head and width % 2 == 0 else None
    return kernels if vocabulary * width <= _SMALL_HEAD else None


def scoring_head_kernels(device: torch.device, dtype: torch.dtype, width: int) -> Kernels | None:
    """For an update's head: bfloat16 operands, float32 sums reduced in registers."""
    if dtype != torch.bfloat16 or width % 2:
        return None
    kernels = kernels_for(device)
    return kernels if kernels is not None and kernels.bf16_head else None


def byte_kernels(device: torch.device) -> native.Int8Kernels | None:
    """For products on bytes."""
    kernels = kernels_for(device)
    return None if kernels is None else kernels.int8


def calls_onednn(device: torch.device) -> bool:
    """Whether oneDNN's linear can be called directly on ``device``."""
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fast_dtype(device: torch.device) -> tuple[str, str]:
    """The dtype of products that ``device`` is fastest in without bytes, and why, as the end of a sentence."""
    if device.type == "cuda":
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "this card multiplies it") if able else ("float32", "this card has no bfloat16 products")
    able = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    if able:
        return "bfloat16", "this processor multiplies it"
    return "float32", "this processor has no bfloat16 products (AVX-512 bf16, AMX)"


@cache
def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What operands of ``dtype`` are multiplied in on ``device``: float32 for the bfloat16 ones of a processor that has
    no such products (AVX2 alone). Rounded operands have the same products in both."""
    half = device.type == "cpu" and dtype == torch.bfloat16
    return torch.float32 if half and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else dtype
