"""Sets of real numbers, of intervals and points: unions, differences and intersections, brought into one form.

A set is a sorted list of pairs of cuts of the real line. A cut is a number and the side of it: 0 before the number, 1
after it. Numbers that are no fractions are placed in double precision and keep their spelling for the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from envs.verifier.evaluate import approximately
from envs.verifier.expression import parse
from envs.verifier.lexer import NotAnExpression
from envs.verifier.literal import Literal
from envs.verifier.nodes import EVERYTHING, Collection, Expression, Named, Node, Relation

Number = Fraction | float
Cut = tuple[Number, int]
Pieces = list[tuple[Cut, Cut]]

_LINE: Pieces = [((-math.inf, 1), (math.inf, 0))]
_OPERATIONS = ("union", "difference", "intersection")


class _NoSet(Exception):
    """Not a set of real numbers, or of numbers that double precision does not tell apart."""


class RealSet:
    """The pieces of a set, in order, and how its numbers are spelt. Raises ``_NoSet``."""

    def __init__(self, node: Node) -> None:
        self.spelt: dict[Number, Node] = {}
        self.pieces = self._read(node)

    def node(self) -> Collection:
        """The set as a union of intervals and points, or as the one interval that it is."""
        points = [self.spelt[low[0]] for low, high in self.pieces if low[0] == high[0]]
        intervals = [
            Collection("bracket", (self._end(low[0]), self._end(high[0])), "[("[low[1]] + ")]"[high[1]])
            for low, high in self.pieces
            if low[0] != high[0]
        ]
        if not intervals or (len(intervals) == 1 and not points):
            return intervals[0] if intervals else Collection("set", tuple(points))
        return Collection("union", (*([Collection("set", tuple(points))] if points else ()), *intervals))

    def _end(self, number: Number) -> Node:
        return EVERYTHING.items[number > 0] if abs(number) == math.inf else self.spelt[number]

    def _read(self, node: Node) -> Pieces:
        if not isinstance(node, Collection):
            raise _NoSet
        if node.kind == "bracket" and len(node.items) == 2:
            low, high = map(self._number, node.items)
            piece = (low, int(node.ends[0] == "(")), (high, int(node.ends[1] == "]"))
            if not piece[0] < piece[1]:
                raise _NoSet
            return [piece]
        if node.kind == "set":
            return _united([((number, 0), (number, 1)) for number in map(self._number, node.items)])
        if node.kind not in _OPERATIONS:
            raise _NoSet
        first, *others = map(self._read, node.items)
        for other in others:
            if node.kind == "union":
                first = _united(first + other)
            else:
                first = _common(first, _rest(other) if node.kind == "difference" else other)
        return first

    def _number(self, node: Node) -> Number:
        if node in EVERYTHING.items or node == Expression("+∞"):
            return -math.inf if node == EVERYTHING.items[0] else math.inf
        number = _place(node)
        if self.spelt.setdefault(number, node) != node and not isinstance(node, Literal):
            raise _NoSet
        return number


def _place(node: Node) -> Fraction:
    if isinstance(node, Literal):
        return node.value
    try:
        value = approximately(parse(node.text)) if isinstance(node, Expression) else None
    except NotAnExpression:
        value = None
    if value is None:
        raise _NoSet
    return Fraction(round(value, 9))


def _united(pieces: Pieces) -> Pieces:
    """Pieces in order, those that overlap or touch as one."""
    joined: Pieces = []
    for low, high in sorted(pieces):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return joined


def _common(first: Pieces, second: Pieces) -> Pieces:
    met = [(max(a[0], b[0]), min(a[1], b[1])) for a in first for b in second]
    return _united([(low, high) for low, high in met if low < high])


def _rest(pieces: Pieces) -> Pieces:
    cuts = [_LINE[0][0], *(cut for piece in pieces for cut in piece), _LINE[0][1]]
    return [(low, high) for low, high in zip(cuts[::2], cuts[1::2], strict=True) if low < high]


def _set_of(node: Node) -> RealSet | None:
    try:
        return RealSet(node)
    except _NoSet:
        return None


def equal_sets(gold: Collection, answer: Node, same: Callable[[Node, Node], bool]) -> bool | None:
    """Whether two sets of real numbers of which one is a union, difference or intersection are the same; None where
    this cannot tell. ``same`` compares their ends."""
    if not isinstance(answer, Collection) or not {gold.kind, answer.kind} & {*_OPERATIONS} or gold.kind == "set":
        return None
    one, other = _set_of(gold), _set_of(answer)
    if one is None or other is None:
        return None
    cuts, others = ([cut for piece in each.pieces for cut in piece] for each in (one, other))
    return [side for _, side in cuts] == [side for _, side in others] and all(
        a[0] == b[0] if math.inf in (abs(a[0]), abs(b[0])) else same(one.spelt[a[0]], other.spelt[b[0]])
        for a, b in zip(cuts, others, strict=True)
    )


def set_operation(kind: str, items: tuple[Node, ...]) -> Node:
    """The union, difference or intersection of sets."""
    if kind == "union":
        sets = [item for item in items if isinstance(item, Collection) and item.kind == "set"]
        points = Collection("set", tuple(value for item in sets for value in item.items))
        intervals = tuple(item for item in items if item not in sets)
        return Collection("union", (points, *intervals) if sets else intervals) if intervals else points
    return Collection(kind, items)


def puncture(holes: tuple[Node, ...]) -> Collection | None:
    """The real line without some numbers, as a union of intervals; None unless they are different numbers."""
    line = _set_of(Collection("difference", (EVERYTHING, Collection("set", holes))))
    return line.node() if line and holes and len(line.pieces) == len(holes) + 1 else None


def either(items: tuple[Node, ...]) -> Node | None:
    """Intervals, or intervals and values of one unknown, joined by "or"; None for anything else."""
    named = [item.interval if isinstance(item, Relation) else item for item in items]
    unknowns = {item.name for item in named if isinstance(item, Named)}
    if len(unknowns) != 1 or not all(isinstance(item, Named) and item.name[0] != "(" for item in named):
        return None  # (x,y) = (1,2) is no interval
    values = tuple(item.value for item in named if isinstance(item, Named))
    parts = [value if isinstance(value, Collection) else Collection("set", (value,)) for value in values]
    if not any(part.kind in ("bracket", "union") for part in parts):
        return None
    return Named(unknowns.pop(), set_operation("union", tuple(parts)))


def meet(items: tuple[Node, ...], conjunction: bool) -> Node | None:
    """What conditions on one unknown leave of the real line: ``-1 < x < 1, x ≠ 0`` or ``x > 1, x < 3``; None where they
    leave nothing, or, unless "and" is the ``conjunction``, where one of them says it all."""
    first = items[0]
    if isinstance(first, Relation) and first.ops == ("≠",) and first.interval and len(items) > 1:
        holes = _holes(first.interval.value)
        if holes and not any(isinstance(item, Named | Relation) for item in items[1:]):
            line = puncture((*holes, *items[1:]))  # x ≠ 1, 2
            return Named(first.interval.name, line) if line else None
    named = [item.interval if isinstance(item, Relation) else item for item in items]
    names = {item.name for item in named if isinstance(item, Named) and item.name[0] != "("}
    if len(names) != 1 or len(items) < 2 or not all(isinstance(item, Named) for item in named):
        return None
    if not any(isinstance(item, Relation) for item in items):
        return None
    sets = tuple(item.value for item in named if isinstance(item, Named) and item.value != EVERYTHING)
    met = _set_of(Collection("intersection", sets)) if sets else None
    if met is None:
        return _between(items) if conjunction else None
    if not met.pieces:
        return None
    if len(sets) > 1 and not conjunction and met.pieces in [RealSet(each).pieces for each in sets]:
        return None
    return Named(names.pop(), met.node())


def _holes(line: Node) -> tuple[Node, ...]:
    """The number that a line has no room for."""
    return (line.items[0].items[1],) if isinstance(line, Collection) and isinstance(line.items[0], Collection) else ()


def _between(items: tuple[Node, ...]) -> Node | None:
    """The interval between two half-lines of one variable, whatever their ends."""
    intervals = [item.interval for item in items if isinstance(item, Relation) and item.interval]
    if len(items) != 2 or len(intervals) != 2 or intervals[0].name != intervals[1].name:
        return None
    infinite = (Expression("-∞"), Expression("∞"))
    for low, high in (intervals, intervals[::-1]):
        if (
            isinstance(low.value, Collection)
            and isinstance(high.value, Collection)
            and (high.value.items[0], low.value.items[1]) == infinite
        ):
            ends = low.value.ends[0] + high.value.ends[1]
            return Named(low.name, Collection("bracket", (low.value.items[0], high.value.items[1]), ends))
    return None
