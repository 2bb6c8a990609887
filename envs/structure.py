"""The shape of an answer: a literal, words, a list, a tuple, a matrix, a relation ... or an expression.

``read`` takes normalised text (``envs.notation``) apart at its top level; the parts are read in turn. Nothing is
evaluated here, and what cannot be read raises ``Unreadable``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from envs.literal import Literal, parse_literal
from envs.units import is_unit

MAX_NESTING = 12
MAX_ITEMS = 64


class Unreadable(Exception):
    """The text is no answer: unbalanced, empty where something must stand, or nested too deeply."""


@dataclass(frozen=True)
class Text:
    """Words. ``explicit`` if they stood in ``\\text{...}``."""

    words: str
    explicit: bool


@dataclass(frozen=True)
class Based:
    """A numeral with its base as subscript, such as 2516_8."""

    digits: str
    base: str


@dataclass(frozen=True)
class Group:
    """Several values. ``kind``: ``list`` and ``set`` (unordered), ``bracket`` (tuple or interval, with its ends in
    ``ends``), ``ratio`` (3:4), ``union`` (unordered), ``intersection``, ``difference``."""

    kind: str
    items: tuple[Node, ...]
    ends: str = ""


@dataclass(frozen=True)
class Matrix:
    """Rows of cells."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Named:
    """``name = value``, where the name is a single designator; ``name`` in canonical spelling."""

    name: str
    value: Node


@dataclass(frozen=True)
class Relation:
    """``sides[0] ops[0] sides[1] ...`` with ops of ``= < > ≤ ≥ ≠ ≡``."""

    ops: tuple[str, ...]
    sides: tuple[str, ...]


@dataclass(frozen=True)
class Expression:
    """Anything else, for ``envs.expression`` to parse."""

    text: str


Node = Literal | Text | Based | Group | Matrix | Named | Relation | Expression

_TOKEN = re.compile(
    r"\\text\{[^{}]*\}|\\\\|\\[{}]|\\[A-Za-z]+|[()\[\]{}]|,|;|:|…|[=<>≤≥≠≈∈≡∪∩∖]|"
    r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
_OPENERS = frozenset(["(", "[", "{", "\\{", "\\begin", "\\lfloor", "\\lceil"])
_CLOSERS = frozenset([")", "]", "}", "\\}", "\\end", "\\rfloor", "\\rceil"])
_CONJUNCTION = re.compile(r"\\text\{\s*,?\s*(?:and|or)\s*\}|and|or")
_LIST_MARKS = frozenset([",", ";", "\\\\"])
_RELATIONS = frozenset("=<>≤≥≠≡")
_BASED = re.compile(r"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*\{?\s*([0-9]{1,2})\s*\}?")
_MATRIX = re.compile(
    r"\\begin\{(?:[pbB]?matrix|smallmatrix|array)\}(.*)\\end\{(?:[pbB]?matrix|smallmatrix|array)\}", re.DOTALL
)
_COLUMNS = re.compile(r"\s*\{[lcr|]+\}")
_PROSE = re.compile(r"[A-Za-z]+(?:['.\-][A-Za-z]+)*(?:\.?[ ,]+[A-Za-z]+(?:['.\-][A-Za-z]+)*)*")
_WORD = re.compile(r"[A-Za-z]{3}")
_MATH_WORDS = frozenset(["sqrt", "pi", "infinity", "inf", "sin", "cos", "tan", "log", "ln", "exp", "cot", "sec", "csc"])
_LETTER = r"(?:[A-Za-z]|[α-ωΑ-Ω]|\\[a-z]+(?:\{\s*[A-Za-z]+\s*\})?|\\text\{[^{}]*\})"
_NAME = rf"{_LETTER}'*(?:_(?:[A-Za-z0-9]|\{{[^{{}}]*\}}|\\[a-z]+))?'*"
_DESIGNATOR = re.compile(
    rf"(?:\\angle|m\s*\\angle|\\triangle|\\overline|\\max|\\min|\\deg)?\s*\{{?\s*"
    rf"(?:{_NAME}|[A-Z]{{2,4}}|[A-Za-z]{{3,}}|\|\s*[A-Z]{{1,3}}\s*\||{_NAME}\s*\(\s*{_NAME}\s*(?:,\s*{_NAME}\s*)*\)"
    rf"|[A-Z]\s*\([^()=]{{1,20}}\)|[a-z]\s*\(\s*-?[0-9]+\s*\)|\(\s*{_NAME}\s*(?:,\s*{_NAME}\s*)+\))\s*\}}?"
)
_NOT_NAMES = re.compile(r"\\(?:frac|sqrt|sin|cos|tan|log|ln|pi|binom|lfloor|lceil|begin|int|sum|lim|prod)(?![a-z])|π")
_COMPARISONS = re.compile(r"[<>≤≥≠=≡]")
_VISIBLE = re.compile(r"[^\s]")


@lru_cache(maxsize=4096)
def read(text: str, depth: int = 0) -> Node:
    """The structure of normalised ``text``; raises ``Unreadable``."""
    text = text.strip(" .,;:") if depth else text.strip()
    if depth > MAX_NESTING or not text:
        raise Unreadable
    if text[0] in "≈=" and len(text) > 1:
        text = text[1:].strip()
    return _simple(text) or _parts(text, depth) or Expression(text)


def _simple(text: str) -> Node | None:
    """Literals with or without a unit, numerals with a base, and words."""
    found = parse_literal(text)
    if found and (not found[1] or is_unit(found[1])):
        return found[0]
    based = _BASED.fullmatch(text)
    if based and any(c.isdigit() for c in based[1]):
        return Based(based[1].upper().lstrip("0"), based[2])
    if text.startswith("\\text{") and text.find("}") == len(text) - 1:
        inner = text[6:-1].strip()
        found = parse_literal(inner)
        if found and (not found[1] or is_unit(found[1])):
            return found[0]
        if not _CONJUNCTION.search(inner) or not any(c.isdigit() for c in inner):
            return Text(words(inner), True)
    bare = text.strip("()[] ")
    if (
        len(bare) > 3
        and _PROSE.fullmatch(bare)
        and _WORD.search(bare)
        and bare not in _MATH_WORDS
        and not _separated(bare)
    ):
        return Text(words(bare), False)
    return None


def _separated(text: str) -> bool:
    """A short list such as ``a and b`` rather than prose."""
    pieces = re.split(r",|\band\b|\bor\b", text)
    return len(pieces) > 1 and all(len(piece.strip()) <= 2 for piece in pieces)


def words(text: str) -> str:
    """Words as they compare: without fonts, brackets, quotes, punctuation and case."""
    text = re.sub(r"\\(?:text|[a-z]+)\s*\{|[{}()\[\]\"'.,;:!$]", " ", text)
    return " ".join(text.split()).casefold()


def top_level(text: str) -> list[tuple[int, int, str]]:
    """(start, end, token) of the separators and relation signs outside of all brackets; raises ``Unreadable`` if the
    brackets do not balance."""
    depth, found = 0, []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENERS:
            depth += 1
        elif token in _CLOSERS:
            depth -= 1
            if depth < 0:
                raise Unreadable
        elif depth == 0 and (token[0] != "\\" or token == "\\\\" or _CONJUNCTION.fullmatch(token)):
            found.append((match.start(), match.end(), token))
    if depth:
        raise Unreadable
    return found


def _cut(text: str, marks: list[tuple[int, int, str]]) -> list[str]:
    starts = [0] + [end for _, end, _ in marks]
    ends = [start for start, _, _ in marks] + [len(text)]
    return [text[a:b].strip() for a, b in zip(starts, ends, strict=True)]


def _parts(text: str, depth: int) -> Node | None:
    marks = top_level(text)
    separators = [m for m in marks if m[2] in _LIST_MARKS or _CONJUNCTION.fullmatch(m[2])]
    if separators:
        return _list(text, separators, depth)
    relations = [m for m in marks if m[2] in _RELATIONS or m[2] in "≈∈"]
    if relations:
        return _relation(text, relations, depth)
    for kind, sign in (("union", "∪"), ("difference", "∖"), ("intersection", "∩")):
        operators = [m for m in marks if m[2] == sign]
        if operators:
            return Group(kind, _read_all(_cut(text, operators), depth))
    matrix = _MATRIX.fullmatch(text)
    if matrix and "\\begin" not in matrix[1]:
        return _matrix(matrix[1], depth)
    colons = [m for m in marks if m[2] == ":"]
    if colons:
        return Group("ratio", _read_all(_cut(text, colons), depth))
    return _bracketed(text, depth)


def _read_all(pieces: list[str], depth: int) -> tuple[Node, ...]:
    if len(pieces) > MAX_ITEMS:
        raise Unreadable
    return tuple(read(piece, depth + 1) for piece in pieces)


def _list(text: str, separators: list[tuple[int, int, str]], depth: int) -> Node:
    pieces = [piece for piece in _cut(text, separators) if piece]
    if not pieces or len(pieces) < len(separators) - sum(bool(_CONJUNCTION.fullmatch(m[2])) for m in separators):
        raise Unreadable
    if len(pieces) == 1:
        return read(pieces[0], depth + 1)
    items = _read_all(pieces, depth)
    if isinstance(items[0], Named) and not any(isinstance(item, Named | Relation) for item in items[1:]):
        return Named(items[0].name, Group("list", (items[0].value, *items[1:])))
    names = {item.name if isinstance(item, Named) else None for item in items}
    if len(names) == 1 and None not in names:
        values = tuple(item.value for item in items if isinstance(item, Named))
        return Named(names.pop() or "", Group("list", values))
    return Group("list", items)


def designator(text: str) -> str | None:
    """The canonical spelling of a single name (``x``, ``a_n``, ``f(x)``, ``|AB|``, ``(p,q)``, a word), or None."""
    if len(text) > 60 or _NOT_NAMES.search(text) or not _DESIGNATOR.fullmatch(text):
        return None
    return re.sub(r"\\text|\\(?:left|right)|[\s{}]", "", text)


def _relation(text: str, marks: list[tuple[int, int, str]], depth: int) -> Node:
    sides = _cut(text, marks)
    ops = tuple("=" if m[2] == "≈" else m[2] for m in marks)
    if any(not side for side in sides):
        raise Unreadable
    if len(sides) == 2 and ops[0] in "=∈":
        left, right = designator(sides[0]), designator(sides[1])
        if left is not None and (right is None or len(sides[0]) <= len(sides[1])):
            return Named(left, read(sides[1], depth + 1))
        if right is not None and ops[0] == "=":
            return Named(right, read(sides[0], depth + 1))
    if "∈" in ops:
        raise Unreadable
    return Relation(ops, tuple(sides))


def _matrix(body: str, depth: int) -> Node:
    body = _COLUMNS.sub("", body, count=1) if body.lstrip().startswith("{") else body
    rows = [row for row in body.replace("\\hline", "").split("\\\\") if row.strip()]
    if len(rows) > MAX_ITEMS:
        raise Unreadable
    return Matrix(tuple(_read_all(row.split("&"), depth) for row in rows))


def _bracketed(text: str, depth: int) -> Node | None:
    """A text that one pair of brackets encloses."""
    opener = "\\{" if text.startswith("\\{") else text[0]
    closer = "\\}" if text.endswith("\\}") else text[-1]
    if opener not in ("(", "[", "{", "\\{") or closer not in (")", "]", "}", "\\}"):
        return None
    if (opener == "{") != (closer == "}") or (opener == "\\{") != (closer == "\\}"):
        return None
    inner = text[len(opener) : len(text) - len(closer)]
    try:
        marks = top_level(inner)
    except Unreadable:
        return None  # the brackets belong to different pairs, as in (x+1)(x-1)
    if opener == "{":
        return read(inner, depth + 1)
    separators = [m for m in marks if m[2] in (",", ";")]
    if opener == "\\{":
        items = _read_all(_cut(inner, separators), depth) if inner.strip() else ()
        return Group("set", items)
    if separators:
        return Group("bracket", _read_all(_cut(inner, separators), depth), opener + closer)
    return read(inner, depth + 1) if opener + closer in ("()", "[]") else None
