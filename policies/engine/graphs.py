"""Decode steps as CUDA graphs: one launch instead of some hundred small kernels.

A graph fixes shapes and addresses, so steps are padded to a bucket of rows and, where attention reads padding, of
length, and their inputs are copied into one buffer. A bucket is captured when it comes back, once per behaviour (a
subset and a weight version), and compared with the plain step at once; where the two differ, the plain steps go on,
with a warning.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS, LENGTH = 16, 128  # a bucket has this many rows or 2, 4, 8... times as many, and a multiple of this length
CAPTURE_AT = 2  # visits; the first one warms the libraries up
LIMIT = 64  # graphs kept, least recently used last
TOLERANCE = 1e-2  # of the final hidden states, relative to their scale: products may be split otherwise when captured

Step = Callable[[Tensor, int], Tensor]


def bucket(rows: int, most: int) -> int:
    """``rows`` rounded up, at most ``most``: few graphs, since a padded row costs a GPU less than a capture."""
    size = ROWS
    while size < rows:
        size *= 2
    return min(size, most)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` on ``device``, without waiting for what a GPU is at."""
    host = torch.from_numpy(array)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def cuda_capture(step: Step, inputs: Tensor, size: int, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """A captured ``step(inputs, size)``: what replays it, and the tensor that a replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = step(inputs, size)
    return graph.replay, out


class Replays:
    """Decode steps by replay. Shape letter: R rows.

    Args:
        rows: the largest R.
        device: of the inputs.
        capture: as ``cuda_capture``.
    """

    def __init__(self, rows: int, device: torch.device, capture: Any = cuda_capture) -> None:
        self.capture = capture
        self.inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.visits: Counter[tuple[int, int]] = Counter()
        self.captured: OrderedDict[tuple[int, int], tuple[Callable[[], None], Tensor]] = OrderedDict()
        self.trusted = True

    def __call__(self, step: Step, inputs: Tensor, size: int) -> Tensor:
        """[R, width] of ``inputs`` [3, R] int64 and the longest prefix ``size``, as ``step`` gives it: always the same
        one, which reads no tensor on the host. (It is not kept, since its store, which it keeps, keeps these.)"""
        key = (inputs.shape[1], size)
        given = self.inputs[:, : inputs.shape[1]]
        given.copy_(inputs)
        self.visits[key] += 1
        if not self.trusted or self.visits[key] < CAPTURE_AT:
            return step(given, size)
        if key not in self.captured:
            return self._try(step, key, given)
        self.captured.move_to_end(key)
        replay, out = self.captured[key]
        replay()
        return out.clone()

    def _try(self, step: Step, key: tuple[int, int], given: Tensor) -> Tensor:
        """Capture a bucket; the result is the plain step's, which the replay has to equal."""
        plain = step(given, key[1])
        try:
            replay, out = self.capture(step, given, key[1], self.pool)
        except RuntimeError as error:
            return self._distrust(key, f"cannot be captured ({str(error).strip().split(chr(10))[0]})", plain)
        replay()
        if not (out - plain).abs().max() <= TOLERANCE * plain.abs().max():
            return self._distrust(key, "does not reproduce the plain step", plain)
        self.captured[key] = (replay, out)
        if len(self.captured) > LIMIT:
            self.captured.popitem(last=False)
        return plain

    def _distrust(self, key: tuple[int, int], why: str, plain: Tensor) -> Tensor:
        self.trusted = False
        warnings.warn(
            f"a CUDA graph of {key[0]} rows and length {key[1]} {why}: decoding goes on without graphs, slower",
            stacklevel=3,
        )
        return plain
