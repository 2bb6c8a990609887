"""The number systems in which expressions are evaluated: double precision, exact fractions, and as many digits as it
takes.

All bound magnitudes before a power or a factorial is taken, so that no expression, however hostile, costs more than
its length.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Protocol

MAX_LOG2 = 100_000
"""Powers beyond 2 to this are not evaluated."""
MAX_FACTORIAL = 10_000
GUARD = 40
"""Digits by which two values that are the same agree, and more than rounding and conditioning take."""
MAX_MAGNITUDE = 2_000
"""Decimal; irrational values that are made of larger ones have none here."""
MAX_GAMMA = 1_000
"""Digits; a factorial of what is no whole number takes a second with five times as many."""
_SHARED = ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt")


class NoValue(Exception):
    """Undefined, not real, or too large at this point."""


class Undecided(Exception):
    """Double precision cannot tell."""


class Irrational(Exception):
    """No fraction can tell."""


class NumberSystem(Protocol):
    """The number system of an evaluation."""

    imaginary: bool
    functions: Mapping[str, Callable[[Any], Any]]

    def noted(self, value: Any) -> Any: ...  # of every value on the way
    def number(self, value: Fraction) -> Any: ...
    def constant(self, name: str) -> Any: ...
    def add(self, a: Any, b: Any) -> Any: ...
    def power(self, a: Any, b: Any) -> Any: ...
    def factorial(self, a: Any) -> Any: ...


class Doubles:
    """Python floats (complex ones if ``imaginary``). Raises ``Undecided`` where rounding could matter."""

    def __init__(self, imaginary: bool) -> None:
        source: Any = cmath if imaginary else math
        self.imaginary = imaginary
        self.functions: dict[str, Callable[[Any], Any]] = {name: getattr(source, name) for name in _SHARED}
        self.functions |= {"abs": abs, "floor": self._floor, "ceil": lambda a: -self._floor(-a)}
        for name in ("sin", "cos", "tan"):
            self.functions[name] = self._guard_precision(self.functions[name])
        self.functions["exp"] = self._guard_underflow(self.functions["exp"])
        self.functions["conj"] = lambda a: a.conjugate()

    def _guard_precision(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def guarded(a: Any) -> Any:
            value = function(a)
            if abs(a) > 1e6 or abs(value) < 1e-8:
                raise Undecided
            return value

        return guarded

    def _guard_underflow(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def guarded(a: Any) -> Any:
            value = function(a)
            if value == 0:
                raise NoValue  # underflow
            return value

        return guarded

    def _floor(self, a: Any) -> Any:
        if isinstance(a, complex) or abs(a - round(a)) < 1e-6 or abs(a) > 1e9:
            raise Undecided
        return float(math.floor(a))

    def noted(self, value: Any) -> Any:
        return value

    def number(self, value: Fraction) -> float:
        return float(value)

    def constant(self, name: str) -> Any:
        return {"pi": math.pi, "e": math.e, "i": 1j}[name]

    def add(self, a: Any, b: Any) -> Any:
        total = a + b
        if abs(total) < 1e-6 * (abs(a) + abs(b)):
            raise Undecided
        return total

    def power(self, a: Any, b: Any) -> Any:
        if a == 0 and not (isinstance(b, float) and b > 0):
            raise NoValue
        if abs(b) > 1e6:
            raise Undecided
        value = a**b
        if (isinstance(value, complex) and not self.imaginary) or (value == 0 and a != 0):
            raise NoValue
        return value

    def factorial(self, a: Any) -> Any:
        if isinstance(a, complex) or a < 0 or a > 170:
            raise Undecided
        return math.gamma(a + 1)


class Exact:
    """Fractions. Raises ``Irrational`` for what is none, or too long to be written out."""

    def __init__(self, imaginary: bool) -> None:
        self.imaginary = imaginary
        self.functions = _OfFractions({"abs": abs, "floor": self._floor, "ceil": lambda a: -self._floor(-a)})

    def _floor(self, a: Fraction) -> Fraction:
        return Fraction(math.floor(a))

    def noted(self, value: Fraction) -> Fraction:
        if _bits(value) > MAX_LOG2:
            raise Irrational
        return value

    def number(self, value: Fraction) -> Fraction:
        return Fraction(value)

    def constant(self, name: str) -> Fraction:
        raise Irrational

    def add(self, a: Fraction, b: Fraction) -> Fraction:
        return a + b

    def power(self, a: Fraction, b: Fraction) -> Fraction:
        if a == 0 and b <= 0:
            raise NoValue
        if b.denominator != 1 or (abs(a) not in (0, 1) and _bits(a) * abs(b) > MAX_LOG2):
            raise Irrational
        return a ** int(b) if abs(a) not in (0, 1) else a ** int(abs(b) % 2 or 2)

    def factorial(self, a: Fraction) -> Fraction:
        if a.denominator != 1:
            raise Irrational
        if a < 0 or a > MAX_FACTORIAL:
            raise NoValue
        return Fraction(math.factorial(int(a)))


class _OfFractions(dict[str, Callable[[Any], Any]]):
    """The functions whose values are fractions; any other raises ``Irrational``."""

    def __missing__(self, name: str) -> Callable[[Any], Any]:
        raise Irrational


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


class Digits:
    """mpmath at as many digits as leave ``GUARD`` right ones, whatever magnitudes a value is made of."""

    def __init__(self, imaginary: bool) -> None:
        import mpmath

        self.mp = mpmath.mp.clone() if hasattr(mpmath.mp, "clone") else mpmath.mp
        self.magnitude = 0.0  # decimal, the largest on the way, of small values as of large ones
        self.imaginary = imaginary
        mp = self.mp
        self.functions: dict[str, Callable[[Any], Any]] = {
            name: getattr(mp, name) for name in (*_SHARED, "floor", "ceil")
        }
        self.functions |= {"abs": mp.fabs, "conj": mp.conj, "exp": self._exp}
        for name in ("sin", "cos", "tan"):
            self.functions[name] = self._guard_magnitude(self.functions[name])
        for name in ("floor", "ceil"):
            self.functions[name] = self._snap_to_integers(self.functions[name])

    def _guard_magnitude(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def guarded(a: Any) -> Any:
            if abs(a) > 1e15:
                raise NoValue
            return function(a)

        return guarded

    def _snap_to_integers(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def snapping(a: Any) -> Any:
            whole = self.mp.nint(a)  # 3 (n / 3) is n, whatever its last digit
            near = self.mp.mpf(10) ** (GUARD / 2 - self.mp.dps)
            return whole if abs(a - whole) < near * max(1, abs(a)) else function(a)

        return snapping

    def _exp(self, a: Any) -> Any:
        if abs(a) > MAX_LOG2:
            raise NoValue
        return self.mp.exp(a)

    def precise(self, evaluated: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any, Any]:
        """Two values and a bound on the error of either."""
        self.mp.dps = 2 * GUARD
        self.magnitude = 0.0
        values = evaluated()
        if self.magnitude > GUARD / 4:
            if self.magnitude > MAX_MAGNITUDE:
                raise NoValue
            self.mp.dps = 2 * math.ceil(self.magnitude) + 2 * GUARD
            values = evaluated()
        lost = self.magnitude + GUARD / 2  # to a difference of the largest, and to rounding
        return *values, self.mp.mpf(10) ** math.ceil(lost - self.mp.dps)

    def noted(self, value: Any) -> Any:
        if value != 0 and self.mp.isfinite(value):
            self.magnitude = max(self.magnitude, abs(self.mp.mag(value)) * math.log10(2))
        return value

    def number(self, value: Fraction) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator

    def constant(self, name: str) -> Any:
        return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1)}[name]

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def power(self, a: Any, b: Any) -> Any:
        if a == 0:
            if self.mp.re(b) > 0:
                return a
            raise NoValue
        if abs(b) > 1e9 or abs(b * self.mp.log(abs(a), 2)) > MAX_LOG2:
            raise NoValue
        value = self.mp.power(a, b)
        if not self.imaginary and self.mp.im(value) != 0:
            raise NoValue
        return value

    def factorial(self, a: Any) -> Any:
        if self.mp.im(a) != 0 or a < 0 or a > MAX_FACTORIAL or (self.mp.dps > MAX_GAMMA and not self.mp.isint(a)):
            raise NoValue
        return self.mp.factorial(a)
