"""Whether an answer equals the gold answer: literals exactly, structures part by part, expressions as functions.

``compare`` raises ``NeedsWorker`` where only many digits can settle it (``worker``, under a deadline and a memory
limit); everything else is settled in process by string, integer and fraction arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

from envs.verifier.choices import bare_choice, chosen_letter, stated_choice
from envs.verifier.evaluate import clearly_differ, names, rounds_to
from envs.verifier.expression import Tree, parse
from envs.verifier.lexer import NotAnExpression
from envs.verifier.literal import Literal
from envs.verifier.literal import equal as literals_equal
from envs.verifier.nodes import Based, Collection, Expression, Matrix, Named, Node, Relation, Words
from envs.verifier.opposites import opposed
from envs.verifier.real_sets import equal_sets
from envs.verifier.scan import designator
from envs.verifier.structure import FLIPPED, read, words
from envs.verifier.units import without_measure, without_symbols, without_units

_TIGHT_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9])")
_TIMES = re.compile(r"(?<=[0-9])\s+x\s+(?=[0-9])")
_NO_ANGLE = re.compile(r"\\(?!frac|sqrt)[A-Za-z]|π|sin|cos|tan|cot|sec|csc|cis|exp")
_OF_LETTER = re.compile(r"([A-Za-z])\(([a-df-hj-zA-Z])\)")
_WORD = re.compile(r"[A-Za-z]\.?\s?[A-Za-z]")
_UNORDERED = ("list", "set", "either")

MAX_CHAIN = 8
"""Longer chains of equalities are no answers."""


class NeedsWorker(Exception):
    """Only a symbolic comparison can tell."""


class Oracle(Protocol):
    """Decides about expressions. May raise ``NeedsWorker``."""

    def equal(self, gold: Tree, answer: Tree) -> bool: ...
    def proportional(self, gold: Tree, answer: Tree, positive: bool) -> bool: ...
    def equal_unparsed(self, gold: str, answer: str) -> bool: ...


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

    def equal_unparsed(self, gold: str, answer: str) -> bool:
        raise NeedsWorker


class Comparer:
    """Compares normalised texts; ``oracle`` decides about expressions."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.rules: dict[type, Callable[[Any, Node], bool]] = {
            Literal: self._literal,
            Words: self._words,
            Based: lambda gold, answer: gold == answer,
            Matrix: self._matrix,
            Collection: self._collection,
            Named: self._named,
            Relation: self._relation,
            Expression: self._expression,
        }

    def compare(self, gold: str, answer: str) -> bool:
        """Whether ``answer`` equals ``gold``. Raises ``Unreadable`` if either cannot be read."""
        node = read(gold)
        if isinstance(node, Words) and words(answer) == node.words:
            return True
        if _WORD.search(gold) and opposed(gold, answer):
            return False
        if not isinstance(node, Literal) and gold.replace(" ", "") == answer.replace(" ", ""):
            return True
        stated = stated_choice(gold) if gold.startswith(("(", "\\text{(")) else None
        if stated:  # a gold of a choice and its value: either states it
            letter = chosen_letter(answer)
            return letter == stated[0] if letter else self.compare(stated[1], answer)
        choice = bare_choice(gold)
        if choice:
            letter = chosen_letter(answer, any_case=True)  # (B) 12 states the choice B
            if letter:
                return letter == choice
        if self.same(node, read(answer)):
            return True
        # Against a gold list a tight comma may separate: 3,500 are two values if the gold has two.
        apart = _TIGHT_COMMA.sub(", ", answer)
        return isinstance(node, Collection | Named) and apart != answer and self.same(node, read(apart))

    def same(self, gold: Node, answer: Node) -> bool:
        """Whether two structures state the same."""
        if isinstance(answer, Named) and not isinstance(gold, Named | Relation | Collection):
            answer = answer.value
        if (
            isinstance(answer, Collection)
            and answer.kind == "set"
            and len(answer.items) == 1
            and not isinstance(gold, Collection)
        ):
            answer = answer.items[0]
        if isinstance(answer, Relation) and isinstance(gold, Literal | Expression) and len(answer.sides) > 1:
            return self._chain(gold, answer)
        return self.rules[type(gold)](gold, answer)

    def _chain(self, gold: Literal | Expression, answer: Relation) -> bool:
        """A finished calculation, ``3 + 4 = 7`` or ``x = 3 + 4 = 7``: its last side is the answer, if all its sides are
        numbers, whatever their units, equal and written in different ways (``7 = 7`` works nothing out)."""
        if answer.rounded and not (isinstance(gold, Literal) and not gold.quotient):
            return self._rounded(gold, answer)
        sides = answer.sides[1:] if len(answer.sides) > 2 and designator(answer.sides[0]) else answer.sides
        if (
            set(answer.ops) != {"="}
            or len(sides) > MAX_CHAIN
            or len({side.replace(" ", "") for side in sides}) < len(sides)
        ):
            return False
        last = read(sides[-1], 1)
        text = _source(last)
        if text is None:
            return False
        try:
            calculated = (_TIMES.sub("×", without_units(side)) for side in sides[:-1])
            result, *others = (parse(side) for side in (text, *calculated))
        except NotAnExpression:
            return False
        if any(map(_has_name, [result, *others])) or not self.same(gold, last):
            return False
        return all(self.oracle.equal(result, side) for side in others)

    def _rounded(self, gold: Literal | Expression, answer: Relation) -> bool:
        """``10√2 ≈ 14.14`` states 10√2, and rounds it rightly, to the last digit given."""
        stated = _without_last(answer)
        decimal = read(answer.sides[-1], 1)
        if not isinstance(decimal, Literal) or not self.same(gold, stated):
            return False
        source = _source(read(answer.sides[-2], 1))
        unit = Fraction(1, 10 ** len(answer.sides[-1].partition(".")[2]))
        try:
            return source is not None and rounds_to(parse(source), decimal.value, unit)
        except NotAnExpression:
            return False

    def _literal(self, gold: Literal, answer: Node) -> bool:
        if isinstance(answer, Expression):
            answer = read(without_symbols(_without_units(answer.text)), 1)
        return isinstance(answer, Literal) and literals_equal(gold, answer)

    def _words(self, gold: Words, answer: Node) -> bool:
        if isinstance(answer, Words):
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

    def _collection(self, gold: Collection, answer: Node) -> bool:
        if _assignment(gold) or _assignment(answer):
            return self._assignments(gold, answer)
        answer = _value(answer)
        settled = equal_sets(gold, answer, self.same)
        if settled is not None:
            return settled
        if _is_union(gold) and _is_union(answer):
            assert isinstance(answer, Collection)
            return self._unordered(gold.items, answer.items)
        if gold.kind in _UNORDERED:
            expected, given = _alternatives(gold), _alternatives(answer)
            if given is None and gold.kind == "set" and len(gold.items) == 1:
                given = (answer,)
            return expected is not None and given is not None and self._unordered(expected, given)
        if not isinstance(answer, Collection):
            return False
        if gold.kind == "bracket" and gold.ends == "()" and answer.kind == "list":
            return self._pairwise(gold.items, answer.items)
        return gold.kind == answer.kind and gold.ends == answer.ends and self._pairwise(gold.items, answer.items)

    def _assignments(self, gold: Node, answer: Node) -> bool:
        """``a = 5, b = 7`` against the same by name; ``x = 1, y = 2`` also against the tuple (1, 2), in order."""
        expected, given = _assignment(gold), _assignment(answer)
        if expected and given:
            return set(expected) == set(given) and all(self.same(expected[name], given[name]) for name in expected)
        if given and isinstance(gold, Collection) and gold.ends == "()":
            return self._pairwise(gold.items, tuple(given.values()))
        if expected and isinstance(answer, Collection) and answer.ends == "()" and list(expected) == sorted(expected):
            return self._pairwise(tuple(expected.values()), answer.items)
        return False

    def _named(self, gold: Named, answer: Node) -> bool:
        if _assignment(gold) and isinstance(answer, Collection) and _assignment(answer):
            return self._assignments(gold, answer)
        if isinstance(answer, Named):
            if gold.name != answer.name:
                return self._same_function(gold, answer)
            return self.same(gold.value, answer.value)
        if isinstance(answer, Relation):
            if isinstance(gold.value, Collection):
                return answer.interval is not None and self._named(gold, answer.interval)
            return isinstance(gold.value, Expression) and self._equations(_as_relation(gold), answer)
        return self.same(gold.value, answer)

    def _same_function(self, gold: Named, answer: Named) -> bool:
        """f(x) = x^2 and f(t) = t^2: the same function of another letter."""
        one, other = _OF_LETTER.fullmatch(gold.name), _OF_LETTER.fullmatch(answer.name)
        texts = _source(gold.value), _source(answer.value)
        if one is None or other is None or one[1] != other[1] or texts[0] is None or texts[1] is None:
            return False
        try:
            trees = [parse(text) for text in texts if text is not None]
        except NotAnExpression:
            return False
        if one[2] in names(trees[1]):  # f(t) = x is no f(x) = x
            return False
        return self.oracle.equal(trees[0], _renamed(trees[1], other[2], one[2]))

    def _relation(self, gold: Relation, answer: Node) -> bool:
        if isinstance(answer, Relation):
            if gold.interval and answer.interval:
                return self._named(gold.interval, answer.interval)
            return self._equations(gold, answer)
        if gold.interval and isinstance(_value(answer), Collection):
            return self._named(gold.interval, answer)
        return (
            isinstance(answer, Named)
            and isinstance(answer.value, Expression | Literal)
            and self._equations(gold, _as_relation(answer))
        )

    def _equations(self, gold: Relation, answer: Relation) -> bool:
        if len(gold.ops) != len(answer.ops):
            return False
        if len(gold.ops) == 1:
            return self._one_relation(gold, answer)
        flipped = Relation(tuple(FLIPPED[op] for op in reversed(answer.ops)), tuple(reversed(answer.sides)))
        return any(
            gold.ops == other.ops
            and all(self.same(read(g, 1), read(a, 1)) for g, a in zip(gold.sides, other.sides, strict=True))
            for other in (answer, flipped)
        )

    def _one_relation(self, gold: Relation, answer: Relation) -> bool:
        if gold.ops != answer.ops:
            if gold.ops[0] != FLIPPED[answer.ops[0]]:
                return False
            answer = Relation(gold.ops, tuple(reversed(answer.sides)))
        try:
            trees = [("sub", parse(relation.sides[0]), parse(relation.sides[1])) for relation in (gold, answer)]
        except NotAnExpression:
            return all(self.same(read(g, 1), read(a, 1)) for g, a in zip(gold.sides, answer.sides, strict=True))
        return self.oracle.proportional(trees[0], trees[1], positive=gold.ops[0] in "<>≤≥")

    def _expression(self, gold: Expression, answer: Node) -> bool:
        alternatives = _alternatives(gold)
        if alternatives is not None:
            return self._collection(Collection("list", alternatives), answer)
        if isinstance(answer, Words):
            return words(gold.text) == answer.words
        text = _source(answer)
        if text is None or "±" in text:
            return False
        if gold.text.replace(" ", "") == text.replace(" ", ""):
            return True
        stated = gold.text
        if "°" in stated + text and not _NO_ANGLE.search(stated + text):
            stated, text = stated.replace("°", ""), text.replace("°", "")  # 180° - 2x is so many degrees
        try:
            tree = parse(stated)
        except NotAnExpression:
            return self.oracle.equal_unparsed(gold.text, text)
        try:
            return self.oracle.equal(tree, parse(text if _has_name(tree) else without_measure(text)))
        except NotAnExpression:
            return False


def _without_units(text: str) -> str:
    """A fraction without the unit words in it: 14/3 for ``\\frac{14\\text{ cm}}{3}``."""
    return without_units(text) if text.startswith(("\\frac", "-\\frac")) and "\\text" in text else text


def _without_last(relation: Relation) -> Node:
    """A chain without its last side."""
    sides = relation.sides[:-1]
    if len(sides) == 1:
        return read(sides[0], 1)
    name = designator(sides[0])
    return Named(name, read(sides[1], 1)) if name and len(sides) == 2 else Relation(relation.ops[:-1], sides)


def _has_name(tree: Tree) -> bool:
    """Whether a variable occurs."""
    return tree[0] == "name" or (tree[0] not in ("num", "const") and any(map(_has_name, tree[1:])))


def _renamed(tree: Tree, old: str, new: str) -> Tree:
    if tree == ("name", old):
        return ("name", new)
    return tuple(_renamed(branch, old, new) if isinstance(branch, tuple) else branch for branch in tree)


def _value(node: Node) -> Node:
    """What a name or a solved inequality stands for."""
    if isinstance(node, Relation) and node.interval:
        node = node.interval
    return node.value if isinstance(node, Named) else node


def _is_union(node: Node) -> bool:
    """Whether a node is a union, or intervals joined by "or", which may be one."""
    return isinstance(node, Collection) and (
        node.kind == "union" or (node.kind == "either" and all(isinstance(item, Collection) for item in node.items))
    )


def _assignment(node: Node) -> dict[str, Node] | None:
    """The values of several names (``a = 5, b = 7`` or ``(a, b) = (5, 7)``) by name; None for anything else."""
    if isinstance(node, Collection) and node.kind == "list":
        named = {item.name: item.value for item in node.items if isinstance(item, Named)}
        return named if len(named) == len(node.items) else None
    if isinstance(node, Named) and node.name.startswith("(") and isinstance(node.value, Collection):
        names = node.name.strip("()").split(",")
        if node.value.ends == "()" and len(names) == len(node.value.items):
            return dict(zip(names, node.value.items, strict=True))
    return None


def _alternatives(node: Node) -> tuple[Node, ...] | None:
    """The values of a list or set, with ``±`` written out; None for a single value or another structure."""
    node = _value(node)
    if isinstance(node, Collection) and node.kind in _UNORDERED:
        written_out = ((_alternatives(item) if _has_sign_choice(item) else None) or (item,) for item in node.items)
        return tuple(value for values in written_out for value in values)
    if _has_sign_choice(node):
        assert isinstance(node, Expression)
        plus = node.text.replace("±", "+").replace("∓", "-")
        minus = node.text.replace("±", "-").replace("∓", "+")
        return read(plus.lstrip("+ "), 1), read(minus, 1)
    return None


def _has_sign_choice(node: Node) -> bool:
    return isinstance(node, Expression) and "±" in node.text


def _source(node: Node) -> str | None:
    """An expression's text (a literal's is rebuilt from its value), None for a structure."""
    if isinstance(node, Expression):
        return node.text
    if isinstance(node, Literal):
        value = node.value / 100 if node.percent else node.value
        sign = "-" if value < 0 else ""
        return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return None


def _as_relation(named: Named) -> Relation:
    return Relation(("=",), (named.name, _source(named.value) or ""))
