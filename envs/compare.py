"""Whether an answer equals the gold answer: literals exactly, structures part by part, expressions as functions.

``compare`` raises ``NeedsWorker`` where only many digits can settle it (``envs.worker``, under a deadline and a memory
limit); everything else is settled in process by string, integer and fraction arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

from envs.evaluate import clearly_differ
from envs.expression import NotAnExpression, Tree, parse
from envs.literal import Literal
from envs.literal import equal as literals_equal
from envs.structure import (
    Based,
    Expression,
    Group,
    Matrix,
    Named,
    Node,
    Relation,
    Text,
    Unreadable,
    designator,
    read,
    words,
)

_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠", "≡": "≡"}


class NeedsWorker(Exception):
    """Only a symbolic comparison can tell."""


class Oracle(Protocol):
    """Decides about expressions. May raise ``NeedsWorker``."""

    def equal(self, gold: Tree, answer: Tree) -> bool: ...
    def proportional(self, gold: Tree, answer: Tree, positive: bool) -> bool: ...
    def unparsed(self, gold: str, answer: str) -> bool: ...


class InProcess:
    """Rejects what differs in double precision; leaves the rest to a worker."""

    def equal(self, gold: Tree, answer: Tree) -> bool:
        if gold == answer:
            return True
        if clearly_differ(gold, answer):
            return False
        raise NeedsWorker

    def proportional(self, gold: Tree, answer: Tree, positive: bool) -> bool:
        if gold == answer:
            return True
        raise NeedsWorker

    def unparsed(self, gold: str, answer: str) -> bool:
        raise NeedsWorker


class Comparer:
    """Compares normalised texts; ``oracle`` decides about expressions."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.rules: dict[type, Callable[[Any, Node], bool]] = {
            Literal: self._literal,
            Text: self._text,
            Based: lambda gold, answer: gold == answer,
            Matrix: self._matrix,
            Group: self._group,
            Named: self._named,
            Relation: self._relation,
            Expression: self._expression,
        }

    def compare(self, gold: str, answer: str) -> bool:
        """Whether ``answer`` equals ``gold``. Raises ``Unreadable`` if either cannot be read."""
        gold_node = read(gold)
        if isinstance(gold_node, Text) and words(answer) == gold_node.words:
            return True
        if gold.replace(" ", "") == answer.replace(" ", "") and not isinstance(gold_node, Literal):
            return True
        return self.same(gold_node, read(_ungrouped(answer) if _several(gold_node) else answer))

    def same(self, gold: Node, answer: Node) -> bool:
        """Whether two structures state the same."""
        if isinstance(answer, Named) and not isinstance(gold, Named | Relation):
            answer = answer.value
        return self.rules[type(gold)](gold, answer)

    def _literal(self, gold: Literal, answer: Node) -> bool:
        return isinstance(answer, Literal) and literals_equal(gold, answer)

    def _text(self, gold: Text, answer: Node) -> bool:
        if isinstance(answer, Text):
            return answer.words == gold.words
        return isinstance(answer, Expression) and words(answer.text) == gold.words

    def _matrix(self, gold: Matrix, answer: Node) -> bool:
        if not isinstance(answer, Matrix) or [len(r) for r in gold.rows] != [len(r) for r in answer.rows]:
            return False
        return all(self._pairwise(g, a) for g, a in zip(gold.rows, answer.rows, strict=True))

    def _pairwise(self, gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
        return len(gold) == len(answer) and all(self.same(g, a) for g, a in zip(gold, answer, strict=True))

    def _unordered(self, gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
        """A one-to-one matching; equality is transitive, so the first partner found is as good as any."""
        left = list(answer)
        if len(gold) != len(left):
            return False
        for item in gold:
            partner = next((n for n, other in enumerate(left) if self.same(item, other)), None)
            if partner is None:
                return False
            del left[partner]
        return True

    def _group(self, gold: Group, answer: Node) -> bool:
        if gold.kind in ("list", "set"):
            expected, given = _alternatives(gold), _alternatives(answer)
            return expected is not None and given is not None and self._unordered(expected, given)
        if isinstance(answer, Relation):
            answer = _interval(answer) or answer
            answer = answer.value if isinstance(answer, Named) else answer
        if not isinstance(answer, Group):
            return False
        if gold.kind == "union":
            return answer.kind == "union" and self._unordered(gold.items, answer.items)
        if gold.kind == "bracket" and gold.ends == "()" and answer.kind == "list":
            return self._pairwise(gold.items, answer.items)
        return gold.kind == answer.kind and gold.ends == answer.ends and self._pairwise(gold.items, answer.items)

    def _named(self, gold: Named, answer: Node) -> bool:
        if isinstance(answer, Named):
            return gold.name == answer.name and self.same(gold.value, answer.value)
        if isinstance(answer, Relation):
            return isinstance(gold.value, Expression) and self._equations(_as_relation(gold), answer)
        return self.same(gold.value, answer)

    def _relation(self, gold: Relation, answer: Node) -> bool:
        interval = _interval(gold)
        if isinstance(answer, Group) and interval:
            return self.same(interval.value, answer)
        if isinstance(answer, Named):
            other: Named | None = answer if isinstance(answer.value, Group) else None
            if other is None:
                return isinstance(answer.value, Expression) and self._equations(gold, _as_relation(answer))
        else:
            other = _interval(answer) if isinstance(answer, Relation) else None
        if interval and other:
            return interval.name == other.name and self.same(interval.value, other.value)
        return isinstance(answer, Relation) and self._equations(gold, answer)

    def _equations(self, gold: Relation, answer: Relation) -> bool:
        if len(gold.ops) != len(answer.ops):
            return False
        if len(gold.ops) == 1:
            return self._one_relation(gold, answer)
        flipped = Relation(tuple(_FLIPPED[op] for op in reversed(answer.ops)), tuple(reversed(answer.sides)))
        return any(
            gold.ops == other.ops
            and all(self.same(read(g, 1), read(a, 1)) for g, a in zip(gold.sides, other.sides, strict=True))
            for other in (answer, flipped)
        )

    def _one_relation(self, gold: Relation, answer: Relation) -> bool:
        if gold.ops != answer.ops:
            if gold.ops[0] != _FLIPPED[answer.ops[0]]:
                return False
            answer = Relation(gold.ops, tuple(reversed(answer.sides)))
        try:
            trees = [("sub", parse(relation.sides[0]), parse(relation.sides[1])) for relation in (gold, answer)]
        except NotAnExpression:
            return all(self.same(read(g, 1), read(a, 1)) for g, a in zip(gold.sides, answer.sides, strict=True))
        return self.oracle.proportional(trees[0], trees[1], positive=gold.ops[0] in "<>≤≥")

    def _expression(self, gold: Expression, answer: Node) -> bool:
        alternatives = _alternatives(gold)
        if alternatives is not None and len(alternatives) > 1:
            return self._group(Group("list", alternatives), answer)
        if isinstance(answer, Text):
            return words(gold.text) == answer.words
        text = _source(answer)
        if text is None or "±" in text:
            return False
        if gold.text.replace(" ", "") == text.replace(" ", ""):
            return True
        try:
            tree = parse(gold.text)
        except NotAnExpression:
            return self.oracle.unparsed(gold.text, text)
        try:
            return self.oracle.equal(tree, parse(text))
        except NotAnExpression:
            return False


def _source(node: Node) -> str | None:
    """An expression's text (a literal's is rebuilt from its value), None for a structure."""
    if isinstance(node, Expression):
        return node.text
    if isinstance(node, Literal):
        value = node.value / 100 if node.percent else node.value
        sign = "-" if value < 0 else ""
        return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return None


def _alternatives(node: Node) -> tuple[Node, ...] | None:
    """The values of a list or set, with ``±`` written out; None for a single value or another structure."""
    if isinstance(node, Named):
        node = node.value
    if isinstance(node, Group) and node.kind in ("list", "set"):
        return tuple(
            value for item in node.items for value in (_alternatives(item) if _signed(item) else None) or (item,)
        )
    if _signed(node):
        assert isinstance(node, Expression)
        plus = node.text.replace("±", "+").replace("∓", "-")
        minus = node.text.replace("±", "-").replace("∓", "+")
        return read(plus.lstrip("+ "), 1), read(minus, 1)
    return None


def _signed(node: Node) -> bool:
    return isinstance(node, Expression) and "±" in node.text


def _several(node: Node) -> bool:
    return isinstance(node, Group) or (isinstance(node, Named) and isinstance(node.value, Group))


def _ungrouped(text: str) -> str:
    """Against a gold list, a comma separates: ``3,500`` is two values unless the gold is one."""
    return re.sub(r"(?<=[0-9]),(?=[0-9])", ", ", text)


def _as_relation(named: Named) -> Relation:
    value = named.value
    return Relation(("=",), (named.name, _source(value) or ""))


def _interval(relation: Relation) -> Named | None:
    """``a < x ≤ b`` as x in (a, b], ``x ≥ a`` as x in [a, ∞); None for other relations."""
    ops, sides = relation.ops, relation.sides
    if not set(ops) <= set("<>≤≥"):
        return None
    if ops[0] in ">≥":
        ops, sides = tuple(_FLIPPED[op] for op in reversed(ops)), tuple(reversed(sides))
    if not set(ops) <= set("<≤"):
        return None
    infinite = ("-∞", *sides, "∞")
    if len(sides) == 3:
        low, name, high, ends = sides[0], designator(sides[1]), sides[2], ops
    elif len(sides) == 2 and designator(sides[0]) and not designator(sides[1]):
        low, name, high, ends = infinite[0], designator(sides[0]), sides[1], ("<", ops[0])
    elif len(sides) == 2 and designator(sides[1]) and not designator(sides[0]):
        low, name, high, ends = sides[0], designator(sides[1]), infinite[-1], (ops[0], "<")
    else:
        return None
    if name is None:
        return None
    brackets = ("[" if ends[0] == "≤" else "(") + ("]" if ends[1] == "≤" else ")")
    return Named(name, Group("bracket", (read(low, 1), read(high, 1)), brackets))


__all__ = ["Comparer", "InProcess", "NeedsWorker", "Unreadable"]
