"""Whether two expression trees are the same function, decided by their values at fixed points.

Two analytic expressions of answer size that agree at several generic points to 40 digits are the same function; two
that differ clearly at one point are not. In double precision only *difference* can be concluded, cheaply and in the
calling process (``Doubles``); agreement is settled at 60 digits (``Digits``) in a worker, where a deadline and a memory
limit hold. Magnitudes are bounded before a power or a factorial is taken, comparisons are relative, and a point where
a value is undefined, or not real, says nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from envs.verifier.expression import Tree
from envs.verifier.numbers import Digits, Doubles, NoValue, NumberSystem, Undecided

POINTS = ((1, 3), (3, 1), (7, 2), (-2, 1), (40, 1), (-70, 1), (600, 1))
"""Scales (numerator, denominator) of the sample points; a name's value at a point is near the scale and fixed by its
spelling. Both signs and several magnitudes, so that |x + 3| is not x + 3."""

STEPS = 60
"""Whole sample points for expressions with floors or ceilings."""


def names(tree: Tree) -> frozenset[str]:
    """The variables of a tree."""
    if tree[0] == "name":
        return frozenset((tree[1],))
    return frozenset().union(*(names(branch) for branch in tree[1:] if isinstance(branch, tuple)))


def has_constant(tree: Tree, name: str) -> bool:
    """Whether a constant occurs in a tree."""
    if tree[0] == "const":
        return tree[1] == name
    return any(has_constant(branch, name) for branch in tree[1:] if isinstance(branch, tuple))


def has_steps(tree: Tree) -> bool:
    """Whether a tree rounds: its variables are whole numbers then, and generic points do not tell its steps."""
    return tree[0] in ("floor", "ceil") or any(has_steps(branch) for branch in tree[1:] if isinstance(branch, tuple))


def sample(name: str, point: int) -> Fraction:
    """The value of a variable at a sample point; beyond ``POINTS`` they are whole numbers."""
    if point >= len(POINTS):
        return Fraction(2 + (point + zlib.crc32(name.encode())) % STEPS)
    top, bottom = POINTS[point]
    jitter = Fraction(zlib.crc32(f"{name}/{point}".encode()) % 9973, 9973)
    return Fraction(top, bottom) * (1 + jitter / 2)


def evaluate(tree: Tree, point: int, system: NumberSystem) -> Any:
    """The value of a tree at a sample point in a number system; raises ``NoValue`` (or ``Undecided``)."""
    try:
        value = _evaluate(tree, point, system)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
        raise NoValue from error
    if value != value or abs(value) == math.inf:
        raise NoValue
    return value


def _evaluate(tree: Tree, point: int, system: NumberSystem) -> Any:
    operation = tree[0]
    if operation == "num":
        return system.number(tree[1])
    if operation == "const":
        if tree[1] == "inf":
            raise NoValue
        return system.constant(tree[1])
    if operation == "name":
        return system.number(sample(tree[1], point))
    first = _evaluate(tree[1], point, system)
    if len(tree) == 2:
        return _unary(operation, first, system)
    return _binary(tree, first, _evaluate(tree[2], point, system), system)


def _binary(tree: Tree, first: Any, second: Any, system: NumberSystem) -> Any:
    operation = tree[0]
    if operation == "add":
        return system.add(first, second)
    if operation == "sub":
        return system.add(first, -second)
    if operation == "mul":
        return first * second
    if operation == "div":
        return first / second
    if operation == "pow":
        return _rational_power(tree[2], first, second, system)
    if operation == "root":
        return _root(first, second, system)
    if operation == "binom":
        return system.factorial(first) / (system.factorial(second) * system.factorial(first - second))
    raise NoValue


def _unary(operation: str, value: Any, system: NumberSystem) -> Any:
    if operation == "neg":
        return -value
    if operation == "factorial":
        return system.factorial(value)
    if operation == "ln":
        return _real(system.functions["log"], value, system)
    if operation == "log":
        return _real(system.functions["log"], value, system) / system.functions["log"](system.number(Fraction(10)))
    if operation in ("cot", "sec", "csc"):
        return 1 / system.functions[{"cot": "tan", "sec": "cos", "csc": "sin"}[operation]](value)
    if operation in ("sqrt", "asin", "acos"):
        return _real(system.functions[operation], value, system)
    return system.functions[operation](value)


def _real(function: Callable[[Any], Any], value: Any, system: NumberSystem) -> Any:
    """The result of a function whose value may leave the reals, which is no value in a real evaluation."""
    result = function(value)
    if not system.imaginary and getattr(result, "imag", 0) != 0:
        raise NoValue
    return result


def _rational_power(exponent: Tree, base: Any, power: Any, system: NumberSystem) -> Any:
    if not system.imaginary and base < 0 and exponent[0] == "div" and all(side[0] == "num" for side in exponent[1:]):
        fraction = Fraction(exponent[1][1], exponent[2][1])
        if fraction.denominator % 2 == 1:
            size = system.power(-base, power)
            return -size if fraction.numerator % 2 else size
    return system.power(base, power)


def _root(base: Any, index: Any, system: NumberSystem) -> Any:
    if not system.imaginary and base < 0 and index == int(index) and int(index) % 2 == 1:
        return -system.power(-base, 1 / index)
    return system.power(base, 1 / index)


@lru_cache(maxsize=4)
def _number_system(system: type, imaginary: bool) -> Any:
    return system(imaginary)


def _values(trees: tuple[Tree, Tree], system: type) -> list[tuple[Any, Any]]:
    """Pairs of values at the points where both trees have one."""
    free = names(trees[0]) | names(trees[1])
    imaginary = any(has_constant(tree, "i") for tree in trees)
    points = len(POINTS) + (STEPS if any(map(has_steps, trees)) else 0)
    pairs: list[tuple[Any, Any]] = []
    for numbers in (_number_system(system, imaginary), _number_system(system, True)):
        for point in range(points if free else 1):
            try:
                pairs.append((evaluate(trees[0], point, numbers), evaluate(trees[1], point, numbers)))
            except NoValue:
                continue
        if pairs or imaginary:
            break
        imaginary = True
    return pairs


def _close(a: Any, b: Any, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def clearly_differ(a: Tree, b: Tree) -> bool:
    """Whether two trees differ in double precision beyond doubt; False means that more digits are needed."""
    try:
        return any(not _close(x, y, 1e-7) for x, y in _values((a, b), Doubles))
    except Undecided:
        return False


def equal(a: Tree, b: Tree) -> bool:
    """Whether two trees are the same function, at 60 digits."""
    pairs = _values((a, b), Digits)
    return bool(pairs) and all(_close(x, y, 1e-40) for x, y in pairs)


def has_value(tree: Tree) -> bool:
    """Whether a tree can be evaluated, within the bounds, at any sample point."""
    return bool(_values((tree, tree), Digits))


def proportional(a: Tree, b: Tree, positive: bool) -> bool:
    """Whether a = c b with a constant c (positive if asked): the relations a = 0 and b = 0 (a < 0 and b < 0) agree."""
    pairs = [(x, y) for x, y in _values((a, b), Digits) if x != 0 and y != 0]
    if len(pairs) < 2 and (names(a) | names(b)):
        return False
    ratios = [x / y for x, y in pairs]
    if not ratios or (positive and not all(getattr(r, "imag", 0) == 0 and r > 0 for r in ratios)):
        return False
    return all(_close(ratio, ratios[0], 1e-40) for ratio in ratios)
