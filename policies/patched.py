"""A layer subset whose kept output maps are changed, so that they make up for what is skipped.

A layer writes to the residual stream through two linear maps: its attention's output projection and its MLP's down
projection. A patched subset adds a matrix and a bias to some of those that it keeps. The changed maps have the shape of
the old ones, so a patched rollout costs what a plain skip costs, but for packing the changed maps once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

from policies.subset import LayerSubset, halves
from registry import UsageError


@dataclass(frozen=True)
class Change:
    """What is added to one output map: ``weight`` [width, in] and ``bias`` [width], float32. ``in`` is the width of the
    attention's heads together, or that of the MLP's inner layer."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PatchedSubset:
    """Takes the place of a ``LayerSubset`` wherever a policy computes with one.

    Attributes:
        layers: what is kept.
        changes: of the output maps of half layers kept, by the half's number (``subset.halves``). They are added to the
            target's present weights, so they stay in force, if not exact, when the target moves.
        int8: whether the products are on bytes (``policies.int8``); such a policy has no gradient.
    """

    layers: LayerSubset
    changes: Mapping[int, Change] = field(default_factory=dict)
    int8: bool = False

    def __post_init__(self) -> None:
        skipped = set(self.changes) - set(halves(self.layers))
        if skipped:
            raise UsageError(f"patches change the half layers {sorted(skipped)}, which {self.layers} skips")


Nested: TypeAlias = LayerSubset | PatchedSubset


def layers_of(nested: Nested) -> LayerSubset:
    """What a plain or patched subset keeps."""
    return nested.layers if isinstance(nested, PatchedSubset) else nested


def changes_of(nested: Nested) -> Mapping[int, Change]:
    """The changes of a patched subset, none of a plain one."""
    return nested.changes if isinstance(nested, PatchedSubset) else {}


def is_int8(nested: Nested) -> bool:
    """Whether the products are on bytes."""
    return isinstance(nested, PatchedSubset) and nested.int8


def with_int8(nested: Nested, int8: bool = True) -> Nested:
    """The same subset and changes, the products on bytes or not."""
    if isinstance(nested, PatchedSubset):
        return replace(nested, int8=int8)
    return PatchedSubset(nested, int8=True) if int8 else nested
