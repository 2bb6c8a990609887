"""Layer subsets: what a nested policy keeps, in order.

A block kept is a whole layer, given by its index, or one half of it: ``"7.attention"`` or ``"7.mlp"``. The half that is
left out adds nothing to the residual stream. Half n of layer l has the number 2 l + n, attention before MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from torch import Tensor

from registry import UsageError

Block: TypeAlias = int | str
LayerSubset: TypeAlias = tuple[Block, ...]
HALVES = ("attention", "mlp")


class KeptBlock(NamedTuple):
    """What is kept of one layer: at least one of its halves."""

    layer: int
    attention: bool
    mlp: bool


def halves(layers: Iterable[Block]) -> list[int]:
    """The numbers of the half layers that ``layers`` are made of; raises ``UsageError`` for what is no block."""
    numbers: list[int] = []
    for block in layers:
        if not isinstance(block, str):
            numbers += (2 * int(block), 2 * int(block) + 1)
            continue
        index, _, half = block.partition(".")
        if not index.isdecimal() or half not in HALVES:
            raise UsageError(f"{block!r} is no block of a layer subset: write 7, '7.attention' or '7.mlp'")
        numbers.append(2 * int(index) + HALVES.index(half))
    return numbers


def from_halves(kept: Iterable[int]) -> LayerSubset:
    """The subset of increasing half-layer numbers; two halves of a layer make it whole."""
    blocks: list[Block] = []
    for half in kept:
        layer, which = divmod(half, 2)
        if which and blocks and blocks[-1] == f"{layer}.{HALVES[0]}":
            blocks[-1] = layer
        else:
            blocks.append(f"{layer}.{HALVES[which]}")
    return tuple(blocks)


def check_subset(layers: Iterable[Block], num_layers: int) -> LayerSubset:
    """``layers`` as a ``LayerSubset`` in its one spelling; raises ``UsageError`` unless it is increasing, within
    ``num_layers`` layers, and keeps the attention of at least one of them."""
    subset = tuple(layers)
    if not subset:
        raise UsageError("an empty layer subset leaves no layer: keep at least one")
    numbers = halves(subset)
    if any(a >= b for a, b in pairwise(numbers)):
        raise UsageError(f"layer subset {subset} is not increasing: sort it and drop repeated layers")
    if numbers[0] < 0 or numbers[-1] >= 2 * num_layers:
        raise UsageError(f"layer subset {subset} is outside the model's layers 0 to {num_layers - 1}")
    if all(number % 2 for number in numbers):
        raise UsageError(f"layer subset {subset} keeps no attention, so no token could see another: keep at least one")
    return from_halves(numbers)


def kept_blocks(layers: LayerSubset) -> list[KeptBlock]:
    """What is kept of each layer of which anything is kept, in order."""
    kept = set(halves(layers))
    return [KeptBlock(n, 2 * n in kept, 2 * n + 1 in kept) for n in sorted({half // 2 for half in kept})]


def without(skipped: Iterable[Block], num_layers: int) -> LayerSubset:
    """The subset that is left when ``skipped`` (layers or halves, in any order) is taken out of all layers.

    >>> without([2, "1.mlp"], num_layers=4)
    (0, '1.attention', 3)
    """
    return check_subset(from_halves(sorted(set(range(2 * num_layers)) - set(halves(skipped)))), num_layers)


def layers_skipped(layers: LayerSubset, num_layers: int, attention_share: float) -> float:
    """How many layers' worth of weights ``layers`` leaves out of ``num_layers``: a whole layer counts 1, its attention
    ``attention_share`` and its MLP the rest. Exactly the number of skipped layers where no layer is halved."""
    skipped = float(num_layers)
    for block in kept_blocks(layers):
        skipped -= 1.0 if block.attention and block.mlp else attention_share if block.attention else 1 - attention_share
    return skipped


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
        changes: of the output maps of half layers kept, by the half's number (``nested.halves``). They are added to the
            target's present weights, so they stay in force, if not exact, when the target moves.
        int8: whether the products are on bytes (``policies.model.int8``); such a policy has no gradient.
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
