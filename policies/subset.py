"""Layer subsets: the increasing indices of the layers that a nested policy keeps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TypeAlias

from registry import UsageError

LayerSubset: TypeAlias = tuple[int, ...]


def check_subset(layers: Iterable[int], num_layers: int) -> LayerSubset:
    """``layers`` as a ``LayerSubset``; raises ``UsageError`` unless it is non-empty, increasing and within
    ``[0, num_layers)``."""
    subset = tuple(int(layer) for layer in layers)
    if not subset:
        raise UsageError("an empty layer subset leaves no layer: keep at least one")
    if any(a >= b for a, b in pairwise(subset)):
        raise UsageError(f"layer subset {subset} is not increasing: sort it and drop repeated layers")
    if subset[0] < 0 or subset[-1] >= num_layers:
        raise UsageError(f"layer subset {subset} is outside the model's layers 0 to {num_layers - 1}")
    return subset
