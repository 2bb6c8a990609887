"""Decode steps as CUDA graphs: one launch instead of some hundred small kernels.

A graph fixes shapes and addresses, so steps are padded to a bucket of rows and of length, and their inputs are copied
into one buffer. A bucket is captured when it comes back, once per behaviour (a subset and a weight version), and
compared with the plain step at once; where the two differ, the plain steps go on, with a warning.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH = 16, 128  # a bucket's rows and length are multiples of these
CAPTURE_AT = 3  # visits; the first ones warm the libraries up
LIMIT = 64  # graphs kept, least recently used last
TOLERANCE = 1e-2  # of the final hidden states, relative to their scale: products may be split otherwise when captured

Step = Callable[[Tensor, int], Tensor]


def bucket(value: int, multiple: int, largest: int) -> int:
    """``value`` rounded up to a multiple, at most ``largest``."""
    return min(-(-value // multiple) * multiple, largest)


def cuda_capture(step: Step, inputs: Tensor, size: int, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """A captured ``step(inputs, size)``: what replays it, and the tensor that a replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = step(inputs, size)
    return graph.replay, out


class Replays:
    """``step`` by replay. Shape letter: R rows.

    Args:
        step: ``(inputs [3, R] int64, size)`` to final hidden states [R, width]; reads no tensor on the host.
        rows: the largest R.
        device: of the inputs.
        capture: as ``cuda_capture``.
    """

    def __init__(self, step: Step, rows: int, device: torch.device, capture: Any = cuda_capture) -> None:
        self.step = step
        self.capture = capture
        self.inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.visits: Counter[tuple[int, int]] = Counter()
        self.captured: OrderedDict[tuple[int, int], tuple[Callable[[], None], Tensor]] = OrderedDict()
        self.trusted = True

    def __call__(self, inputs: Tensor, size: int) -> Tensor:
        """[R, width] of ``inputs`` [3, R] and the longest prefix ``size``."""
        key = (inputs.shape[1], size)
        given = self.inputs[:, : inputs.shape[1]]
        given.copy_(inputs)
        self.visits[key] += 1
        if not self.trusted or self.visits[key] < CAPTURE_AT:
            return self.step(given, size)
        if key not in self.captured:
            return self._try(key, given)
        self.captured.move_to_end(key)
        replay, out = self.captured[key]
        replay()
        return out.clone()

    def _try(self, key: tuple[int, int], given: Tensor) -> Tensor:
        """Capture a bucket; the result is the plain step's, which the replay has to equal."""
        plain = self.step(given, key[1])
        replay, out = self.capture(self.step, given, key[1], self.pool)
        replay()
        if not (out - plain).abs().max() <= TOLERANCE * plain.abs().max():
            self.trusted = False
            warnings.warn(
                f"a CUDA graph of {key[0]} rows and length {key[1]} does not reproduce the plain step: decoding goes "
                "on without graphs, slower",
                stacklevel=2,
            )
            return plain
        self.captured[key] = (replay, out)
        if len(self.captured) > LIMIT:
            self.captured.popitem(last=False)
        return plain
