"""Products of half-precision operands with float32 results, for logits: rounded to bfloat16 they are 0.125 apart at 16.

A GPU multiplies such operands many times as fast as float32 ones and sums in float32 anyway; torch's ``mm`` hands that
out where it can. Elsewhere the rounded operands are multiplied in float32.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from policies.gradients import product

TOLERANCE = 1e-4  # relative to the largest: float32 sums are ten times nearer, a result in bfloat16 forty times farther


def operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [M, K] rounded to ``dtype``, as ``float_product`` takes it."""
    rounded = weight.detach().to(dtype)
    return rounded if fits(rounded) and trusted(rounded.device, dtype) else rounded.float()


def float_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32 [N, M] for ``x`` [N, K] in the dtype that the ``operand`` [M, K] was rounded to; no
    gradient."""
    return product(x.float(), weight) if weight.dtype == torch.float32 else half_product(x, weight)


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    """As ``float_product``, of operands in half precision; only on a GPU."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def fits(weight: Tensor) -> bool:
    """Whether ``half_product`` is made for such operands."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


@cache
def trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``half_product`` gives the float32 sums on ``device``; warns if it does not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 192, generator=generator).to(device, dtype) for size in (40, 304))
    expected = x.double() @ weight.double().T
    try:
        found = half_product(x, weight)
    except (RuntimeError, TypeError) as raised:
        reason = str(raised).strip().split("\n")[0]
    else:
        error = float((found.double() - expected).abs().max() / expected.abs().max())
        if found.dtype == torch.float32 and error <= TOLERANCE:
            return True
        reason = f"it is off by {error:.1e} of the largest number"
    warnings.warn(
        f"no products of {dtype} with float32 results here ({reason}): the head multiplies in float32, slower",
        stacklevel=2,
    )
    return False
