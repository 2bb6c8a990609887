"""The number systems in which expressions are evaluated: double precision and 60 digits.

Both bound magnitudes before a power or a factorial is taken, so that no expression, however hostile, costs more than
its length.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

MAX_LOG2 = 100_000
"""Powers beyond 2 to this are not evaluated."""
_SHARED = ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt")


class NoValue(Exception):
    """Undefined, not real, or too large at this point."""


class Undecided(Exception):
    """Double precision cannot tell."""


class NumberSystem(Protocol):
    """The number system of an evaluation."""

    imaginary: bool
    functions: dict[str, Callable[[Any], Any]]

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


class Digits:
    """mpmath at 60 digits."""

    def __init__(self, imaginary: bool) -> None:
        import mpmath

        self.mp = mpmath.mp.clone() if hasattr(mpmath.mp, "clone") else mpmath.mp
        self.mp.dps = 60
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
            return whole if abs(a - whole) < 1e-45 else function(a)

        return snapping

    def _exp(self, a: Any) -> Any:
        if abs(a) > MAX_LOG2:
            raise NoValue
        return self.mp.exp(a)

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
        if self.mp.im(a) != 0 or a < 0 or a > 10_000:
            raise NoValue
        return self.mp.factorial(a)
