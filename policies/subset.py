"""Layer subsets: what a nested policy keeps, in order.

A block kept is a whole layer, given by its index, or one half of it: ``"7.attention"`` or ``"7.mlp"``. The half that is
left out adds nothing to the residual stream. Half n of layer l has the number 2 l + n, attention before MLP.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, TypeAlias

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
    found: list[int] = []
    for block in layers:
        if not isinstance(block, str):
            found += (2 * int(block), 2 * int(block) + 1)
            continue
        index, _, half = block.partition(".")
        if not index.isdecimal() or half not in HALVES:
            raise UsageError(f"{block!r} is no block of a layer subset: write 7, '7.attention' or '7.mlp'")
        found.append(2 * int(index) + HALVES.index(half))
    return found


def from_halves(kept: Iterable[int]) -> LayerSubset:
    """The subset of increasing half-layer numbers; two halves of a layer make it whole."""
    found: list[Block] = []
    for half in kept:
        layer, which = divmod(half, 2)
        if which and found and found[-1] == f"{layer}.{HALVES[0]}":
            found[-1] = layer
        else:
            found.append(f"{layer}.{HALVES[which]}")
    return tuple(found)


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
    """The subset that is left when ``skipped`` (layers or halves, in any order) is taken out of all layers."""
    return check_subset(from_halves(sorted(set(range(2 * num_layers)) - set(halves(skipped)))), num_layers)


def layers_skipped(layers: LayerSubset, num_layers: int, attention_share: float) -> float:
    """How many layers' worth of weights ``layers`` leaves out of ``num_layers``: a whole layer counts 1, its attention
    ``attention_share`` and its MLP the rest. Exactly the number of skipped layers where no layer is halved."""
    found = float(num_layers)
    for block in kept_blocks(layers):
        found -= 1.0 if block.attention and block.mlp else attention_share if block.attention else 1 - attention_share
    return found
