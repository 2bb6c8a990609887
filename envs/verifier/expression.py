"""A parser for mathematical expressions, in LaTeX or plain notation, into small tuples.

Grammar (lowest first): sums, products (explicit, implicit or divided), signs, powers, postfixes, atoms. A tree is
``("num", Fraction)``, ``("name", str)``, ``("const", "pi" | "e" | "i" | "inf")`` or ``(operation, *subtrees)`` with the
operations ``add sub mul div neg pow`` and the functions of ``FUNCTIONS``. Nothing is evaluated or executed.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

from envs.verifier.lexer import NotAnExpression, tokens
from envs.verifier.symbols import word_set

Tree = tuple[Any, ...]

FUNCTIONS = word_set("""
sin cos tan cot sec csc asin acos atan sinh cosh tanh log ln exp sqrt root abs floor ceil factorial binom
conj
""")
MAX_DEPTH = 40

_NAME_COMMANDS = word_set("""
alpha beta gamma delta zeta eta theta kappa lambda mu nu xi rho sigma tau upsilon chi psi omega Gamma Delta
Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar mho
""")
_ACCENTS = word_set("""
overline vec hat bar dot ddot tilde widehat mathcal mathbb overrightarrow underline angle triangle
""")
_ENDS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}


@lru_cache(maxsize=4096)
def parse(text: str) -> Tree:
    """The tree of ``text``; raises ``NotAnExpression``."""
    parser = _Parser(tokens(text))
    tree = parser.sum(0)
    if parser.token is not None:
        raise NotAnExpression(text)
    return tree


def _is_number(tree: Tree) -> bool:
    return tree[0] == "num" or (tree[0] == "neg" and _is_number(tree[1]))


class _Parser:
    """Recursive descent over a list of tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.bars = 0  # open |...|: inside, the next bar closes

    @property
    def token(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.token
        if token is None or (expected is not None and token != expected):
            raise NotAnExpression(f"{expected or 'more'} expected")
        self.position += 1
        return token

    def sum(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise NotAnExpression("too deep")
        tree = self.product(depth)
        while self.token in ("+", "-"):
            operation = "add" if self.take() == "+" else "sub"
            tree = (operation, tree, self.product(depth))
        return tree

    def product(self, depth: int) -> Tree:
        tree = last = self.sign(depth)
        while True:
            if self.token in ("·", "×", "*"):
                self.take()
                last = self.sign(depth)
                tree = ("mul", tree, last)
            elif self.token in ("/", "÷"):
                self.take()
                last = self.sign(depth)
                tree = ("div", tree, last)
            elif self._starts_factor(last):
                last = self.power(depth)
                tree = ("mul", tree, last)
            else:
                return tree

    def _starts_factor(self, last: Tree | None = None) -> bool:
        """Whether what follows multiplies. A number does after ``last``, a factor that is none: n2^{n-1}, 2^{3}5^2."""
        token = self.token
        if token is None:
            return False
        if token[0].isdigit() or token[0] == ".":
            before = self.tokens[self.position - 1]
            return before == ")" or (last is not None and before not in ("%", "°") and not _is_number(last))
        if token == "|":
            return self.bars == 0
        return (
            token[0].isalpha()
            or token in ("(", "[", "{", "π", "∞")
            or (token[0] == "\\" and token not in ("\\}", "\\rfloor", "\\rceil", "\\{", "\\\\"))
        )

    def sign(self, depth: int) -> Tree:
        if self.token not in ("+", "-"):
            return self.power(depth)
        negative = self.take() == "-"
        if self.token in ("+", "-"):
            raise NotAnExpression("doubled sign")
        tree = self.power(depth)
        return ("neg", tree) if negative else tree

    def power(self, depth: int) -> Tree:
        base = self.postfix(depth)
        if self.token != "^":
            return base
        self.take()
        return self._after_power(("pow", base, self.exponent(depth + 1)), depth)

    def _after_power(self, tree: Tree, depth: int) -> Tree:
        while self.token == "!":
            self.take()
            tree = ("factorial", tree)
        if self.token == "^":
            raise NotAnExpression("power of a power without braces")
        return tree

    def exponent(self, depth: int) -> Tree:
        if self.token in ("-", "+"):
            negative = self.take() == "-"
            tree = self.atom(depth)
            return ("neg", tree) if negative else tree
        return self.atom(depth)

    def postfix(self, depth: int) -> Tree:
        tree = self.atom(depth)
        while self.token in ("!", "°", "%"):
            mark = self.take()
            if mark == "!":
                tree = ("factorial", tree)
            elif mark == "°":
                tree = ("div", ("mul", tree, ("const", "pi")), ("num", Fraction(180)))
            else:
                tree = ("div", tree, ("num", Fraction(100)))
        return tree

    def bracket(self, depth: int) -> Tree:
        opener = self.take()
        bars, self.bars = self.bars, 0
        tree = self.sum(depth + 1)
        self.bars = bars
        self.take(_ENDS[opener])
        return tree

    def argument(self, depth: int) -> Tree:
        """A braced group, or one digit or atom (``\\frac12``)."""
        token = self.token
        if token is not None and token.isdigit() and len(token) > 1:
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
        return self.atom(depth)

    def atom(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise NotAnExpression("too deep")
        token = self.token
        if token is None:
            raise NotAnExpression("ends early")
        if token in ("(", "[", "{"):
            return self.bracket(depth)
        if token == "|" and self.bars < 2:
            self.take()
            self.bars += 1
            tree = self.sum(depth + 1)
            self.take("|")
            self.bars -= 1
            return ("abs", tree)
        self.take()
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token in ("π", "∞"):
            return ("const", "pi" if token == "π" else "inf")
        if token in ("e", "i"):
            return ("const", token) if self.token != "_" else self.name(token)
        if token.startswith("\\"):
            return self.command(token[1:], depth)
        if token.isalpha():
            return self.name(token)
        raise NotAnExpression(token)

    def number(self, token: str) -> Tree:
        value = Fraction(token.rstrip(".") or "0")
        if value.denominator == 1 and self.token == "\\frac":
            # 1\frac{4}{5} is a mixed number if both parts are whole.
            mark = self.position
            fraction = self.atom(1)
            if fraction[0] == "div" and all(side[0] == "num" for side in fraction[1:]) and fraction[2][1]:
                return ("add", ("num", value), fraction)
            self.position = mark
        return ("num", value)

    def name(self, base: str) -> Tree:
        base += self.primes()
        if self.token == "_":
            self.take()
            base += "_" + self.subscript()
        base += self.primes()
        following = self.tokens[self.position : self.position + 3]
        if following[:1] == ["("] and following[2:] == [")"] and following[1][0].isdigit():
            self.position += 3  # f(0) is the value of a function, not f times 0
            base += f"({following[1]})"
        return ("name", base)

    def primes(self) -> str:
        """Derivative marks, ``'`` or ``^{'}``."""
        marks = ""
        while self.token == "'" or self.tokens[self.position : self.position + 3] == ["^", "{", "'"]:
            braced = self.take() == "^"
            marks += self.subscript() if braced else "'"
        return marks

    def subscript(self) -> str:
        if self.token != "{":
            return self.take().removeprefix("\\text:")
        self.take()
        parts = []
        while self.token not in ("}", None):
            parts.append(self.take().removeprefix("\\text:"))
        self.take("}")
        return "".join(parts)

    def command(self, name: str, depth: int) -> Tree:
        if name == "frac":
            top = self.argument(depth + 1)
            return ("div", top, self.argument(depth + 1))
        if name == "binom":
            top = self.argument(depth + 1)
            return ("binom", top, self.argument(depth + 1))
        if name == "sqrt":
            return self.radical(depth)
        if name == "cbrt":
            return ("root", self.argument(depth + 1), ("num", Fraction(3)))
        if name in ("lfloor", "lceil"):
            tree = self.sum(depth + 1)
            self.take("\\r" + name[1:])
            return ("floor" if name == "lfloor" else "ceil", tree)
        if name in FUNCTIONS:
            return self.function(name, depth)
        if name.startswith("text:"):
            return self.name(name[5:])
        if name in _NAME_COMMANDS:
            return self.name(name)
        if name in _ACCENTS:
            return self.name(f"{name}:{self.subscript()}")
        raise NotAnExpression(name)

    def radical(self, depth: int) -> Tree:
        if self.token != "[":
            return ("sqrt", self.argument(depth + 1))
        self.take()
        index = self.sum(depth + 1)
        self.take("]")
        return ("root", self.argument(depth + 1), index)

    def function(self, name: str, depth: int) -> Tree:
        base: Tree | None = None
        power: Tree | None = None
        if self.token == "_" and name == "log":
            self.take()
            base = self.argument(depth + 1)
        if self.token == "^":
            self.take()
            power = self.exponent(depth + 1)
        inner = self.operand(depth + 1)
        if power == ("neg", ("num", Fraction(1))):
            name, power = {"sin": "asin", "cos": "acos", "tan": "atan"}.get(name, ""), None
            if not name:
                raise NotAnExpression("inverse function")
        tree: Tree = (name, inner)
        if base is not None:
            tree = ("div", ("ln", inner), ("ln", base))
        return tree if power is None else ("pow", tree, power)

    def operand(self, depth: int) -> Tree:
        """What a function applies to: a group, or the factors up to the next function or sign."""
        if self.token in ("(", "{", "["):
            return self.bracket(depth)
        tree = self.power(depth)
        while (
            self._starts_factor()
            and self.token not in ("(", "[", "{")
            and (self.token or "")[1:] not in FUNCTIONS - {"sqrt"}
        ):
            tree = ("mul", tree, self.power(depth))
        return tree
