"""Whether two expression trees are the same function, decided by their values at fixed points.

Two analytic expressions of answer size that agree at several generic points are the same function; two that differ
clearly at one point are not. In double precision only *difference* can be concluded, cheaply and in the calling process
(``Doubles``). Agreement is settled in a worker, where a deadline and a memory limit hold: exactly where a value is
rational (``Exact``), else with 40 digits more than the magnitudes on the way to it cost (``Digits``), so that
2^1009 - 1 is not 2^1009. Magnitudes are bounded before a power or a factorial is taken, and a point where a value is
undefined, or not real, says nothing.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from envs.verifier.expression import Tree
from envs.verifier.numbers import Digits, Doubles, Exact, Irrational, NoValue, NumberSystem, Undecided

POINTS = ((1, 3), (3, 1), (7, 2), (-2, 1), (40, 1), (-70, 1), (600, 1))
"""Scales (numerator, denominator) of the sample points; a name's value at a point is near the scale and fixed by its
spelling. Both signs and several magnitudes, so that |x + 3| is not x + 3."""

STEPS = 60
"""Whole sample points for expressions with floors or ceilings: so many in a row, and as many far and wide."""
_WHOLE = re.compile(r"[i-nNM](?:_.*)?")
"""The names that stand for whole numbers by convention."""


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
    """The value of a variable at a sample point; beyond ``POINTS`` they are whole numbers, in a row at first, then of
    no pattern."""
    if point >= len(POINTS) + STEPS:
        return Fraction(2 + zlib.crc32(f"{name}/{point}".encode()) % (9973 if point % 4 == 0 else 397))
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
    return system.noted(_operate(tree, point, system))


def _operate(tree: Tree, point: int, system: NumberSystem) -> Any:
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


@lru_cache(maxsize=8)
def _number_system(system: type, imaginary: bool) -> Any:
    return system(imaginary)


def _at_points(trees: tuple[Tree, Tree], measure: Callable[[int, bool], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """What ``measure`` finds at the points where both trees have a value: a real one, or else a complex one. Two trees
    that round are compared at whole numbers alone, if their variables stand for such."""
    free = names(trees[0]) | names(trees[1])
    imaginary = any(has_constant(tree, "i") for tree in trees)
    stepped = [has_steps(tree) for tree in trees]
    first = len(POINTS) if all(stepped) and all(map(_WHOLE.fullmatch, free)) else 0
    points = range(first, len(POINTS) + (2 * STEPS if any(stepped) else 0))
    found: list[tuple[Any, ...]] = []
    for complex_values in (imaginary, True):
        for point in points if free else (0,):
            try:
                found.append(measure(point, complex_values))
            except NoValue:
                continue
        if found or imaginary:
            break
    return found


def _precise(trees: tuple[Tree, Tree]) -> list[tuple[Any, Any, Any]]:
    """The values of both trees, with a bound on what rounding has made of their difference: 0 where they are exact."""

    def measure(point: int, imaginary: bool) -> tuple[Any, Any, Any]:
        try:
            exact = _number_system(Exact, False)
            return evaluate(trees[0], point, exact), evaluate(trees[1], point, exact), 0
        except Irrational:
            digits = _number_system(Digits, imaginary)
            return digits.precise(lambda: (evaluate(trees[0], point, digits), evaluate(trees[1], point, digits)))

    return _at_points(trees, measure)


def clearly_differ(a: Tree, b: Tree) -> bool:
    """Whether two trees differ in double precision beyond doubt; False means that more digits are needed."""

    def measure(point: int, imaginary: bool) -> tuple[Any, Any]:
        doubles = _number_system(Doubles, imaginary)
        return evaluate(a, point, doubles), evaluate(b, point, doubles)

    try:
        return any(abs(x - y) > 1e-7 * max(abs(x), abs(y)) for x, y in _at_points((a, b), measure))
    except Undecided:
        return False


def rounds_to(tree: Tree, value: Fraction, unit: Fraction) -> bool:
    """Whether a tree without variables is ``value`` when rounded, or cut off, to whole ``unit``s, as far as double
    precision tells."""
    if names(tree):
        return False
    try:
        beyond = (evaluate(tree, 0, _number_system(Doubles, False)) - float(value)) * (-1 if value < 0 else 1)
    except (NoValue, Undecided, OverflowError):
        return False
    return bool(-0.5 * float(unit) <= beyond < float(unit))


def approximately(tree: Tree) -> float | None:
    """The real value of a tree without variables in double precision; None if there is none, or only more digits
    tell."""
    if names(tree):
        return None
    try:
        return float(evaluate(tree, 0, _number_system(Doubles, False)))
    except (NoValue, Undecided):
        return None


def equal(a: Tree, b: Tree) -> bool:
    """Whether two trees are the same function."""
    values = _precise((a, b))
    return bool(values) and all(abs(x - y) <= error for x, y, error in values)


def has_value(tree: Tree) -> bool:
    """Whether a tree can be evaluated, within the bounds, at any sample point."""
    return bool(_precise((tree, tree)))


def proportional(a: Tree, b: Tree, positive: bool) -> bool:
    """Whether a = c b with a constant c (positive if asked): the relations a = 0 and b = 0 (a < 0 and b < 0) agree."""
    values = [(x, y, error) for x, y, error in _precise((a, b)) if abs(x) > error and abs(y) > error]
    if len(values) < 2 and (names(a) | names(b)):
        return False
    if not values or (positive and not all(getattr(x / y, "imag", 0) == 0 and x / y > 0 for x, y, _ in values)):
        return False
    x, y, error = values[0]
    return all(
        abs(x * other_y - other_x * y) <= error * (abs(other_x) + abs(other_y)) + other * (abs(x) + abs(y))
        for other_x, other_y, other in values
    )
