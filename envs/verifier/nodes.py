"""The kinds of answers, as data."""

from __future__ import annotations

from dataclasses import dataclass

from envs.verifier.literal import Literal


class Unreadable(Exception):
    """The text is no answer: unbalanced, empty where something must stand, or nested too deeply."""


@dataclass(frozen=True)
class Words:
    """Words, as they compare."""

    words: str


@dataclass(frozen=True)
class Based:
    """A numeral with its base as subscript, such as 2516_8."""

    digits: str
    base: str


@dataclass(frozen=True)
class Collection:
    """Several values. ``kind``: ``list`` and ``set`` (unordered), ``either`` (a list joined by "or", of which no two
    hold at once), ``bracket`` (tuple or interval, with its two ends in ``ends``), ``ratio`` (3:4), ``union``
    (unordered), ``intersection``, ``difference``."""

    kind: str
    items: tuple[Node, ...]
    ends: str = ""


@dataclass(frozen=True)
class Matrix:
    """Rows of cells."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Named:
    """``name = value`` (or ``name ∈ value``), where the name is a single designator, in canonical spelling."""

    name: str
    value: Node


@dataclass(frozen=True)
class Relation:
    """``sides[0] ops[0] sides[1] ...`` with ops of ``= < > ≤ ≥ ≠ ≡``. ``interval`` says the same as ``name ∈ [a, b)``
    where that can be said. ``rounded``: the last sign was ≈, which is = in ``ops``."""

    ops: tuple[str, ...]
    sides: tuple[str, ...]
    interval: Named | None = None
    rounded: bool = False


@dataclass(frozen=True)
class Expression:
    """Anything else, for ``envs.verifier.expression`` to parse."""

    text: str


Node = Literal | Words | Based | Collection | Matrix | Named | Relation | Expression
EVERYTHING = Collection("bracket", (Expression("-∞"), Expression("∞")), "()")
"""The real line."""
EMPTY = Collection("set", ())
