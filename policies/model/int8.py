"""Linear maps on bytes: rollouts at nearly twice the speed of bfloat16 products, for a small divergence.

Weights have a scale per output, activations one per token, found as they come. Outliers would take most of the bytes'
range, so blocks of channels are rotated by Hadamard matrices first, weights alike, which changes no product (QuaRot,
arXiv 2404.00456, without its data). Rollouts by bytes are off-policy like nested ones, and corrected like them
(arXiv 2508.10123; FlashRL does so for whole models): log mu is that of the byte model itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.model.compute import byte_kernels
from policies.model.weights import RolloutHead, RolloutLinear
from policies.nested import Change
from policies.sharding import whole, whole_shape
from registry import UsageError

_BLOCKS = (64, 32, 16)  # channels rotated together
_LARGEST = 127


def rotation_block(width: int) -> int:
    """How many channels of ``width`` are rotated together; a ``UsageError`` where they do not divide into blocks."""
    for block in _BLOCKS:
        if width % block == 0:
            return block
    raise UsageError(
        f"int8 products need widths that are multiples of {_BLOCKS[-1]}, and this model has one of {width}: leave "
        "rollout_dtype out"
    )


def hadamard(x: Tensor, block: int) -> Tensor:
    """Blocks of the last dimension times the Hadamard matrix of their size, entries 1 and -1, in float32."""
    x, shape, step = x.float(), x.shape, 1
    while step < block:
        pairs = x.reshape(-1, 2, step)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        step *= 2
    return x.reshape(shape)


def to_bytes(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rotated rows of ``x`` [n, k] as int8 [n, k], and their scales [n] float32."""
    turned = hadamard(x, block)
    largest = turned.abs().amax(dim=1)
    factor = torch.where(largest > 0, torch.full_like(largest, _LARGEST) / largest, 0)
    return (turned * factor[:, None]).round().to(torch.int8), largest / _LARGEST


class Int8Linear(RolloutLinear):
    """As ``RolloutLinear``, its products on bytes: by the compiled kernel where there is one, else by torch's.

    Bytes are of the weights as the target multiplies them, in ``target_dtype`` (by default ``dtype``). Where that is
    bfloat16 its rounding takes back what training changed by less, and bytes of the weights before would keep it.
    """

    def __init__(
        self,
        modules: list[nn.Linear],
        dtype: torch.dtype,
        change: Change | None = None,
        target_dtype: torch.dtype | None = None,
    ) -> None:
        self.target_dtype = target_dtype or dtype
        self.block = rotation_block(modules[0].in_features)
        self._byte_kernels = byte_kernels(modules[0].weight.device)
        super().__init__(modules, dtype, change)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the modules' present weights."""
        fused = self._concatenated(self.target_dtype).float()
        if self._byte_kernels is not None:
            self.weight, self.scale = self._byte_kernels.pack(fused, self.block)
        else:
            rows, self.scale = to_bytes(fused, self.block)
            self.weight = rows.t()
        bias = self._bias()
        self.bias = None if bias is None else bias.to(self.target_dtype).float()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self._byte_kernels is not None:
            return self._byte_kernels.linear(x.contiguous(), self.weight, self.scale, self.bias, self.block)
        rows, scale = to_bytes(x, self.block)
        sums = torch._int_mm(F.pad(rows, (0, 0, 0, max(0, 32 - len(rows)))), self.weight)[: len(rows)]
        y = sums.float() * (scale / self.block)[:, None] * self.scale
        return (y if self.bias is None else y + self.bias).to(self.dtype)


class Int8Head(RolloutHead):
    """As ``RolloutHead``, its products on bytes."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype
        self.block = rotation_block(module.in_features)
        self._byte_kernels = byte_kernels(module.weight.device)
        self.refresh()

    @property
    def draws(self) -> bool:
        """As ``RolloutHead.draws``."""
        return self._byte_kernels is not None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the module's present weights."""
        self._plain = None
        weight = whole(self.module.weight)
        if whole_shape(self.module.weight):
            self.gathered, self._plain = weight, self._linear()
        if self._byte_kernels is not None:
            self._bytes = self._byte_kernels.pack(weight.to(self.dtype).float(), self.block, whole=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """As ``RolloutHead.logits``."""
        if self._plain is None:
            self._plain = self._linear()
        return self._plain(hidden)

    def _linear(self) -> Int8Linear:
        return Int8Linear([self.module], torch.float32, target_dtype=self.dtype)

    def draw(self, hidden: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """As ``RolloutHead.draw``."""
        assert self._byte_kernels is not None
        return self._byte_kernels.draw(hidden, self._bytes, self.module.out_features, self.block, temperature, uniform)
