"""The shape of an answer: a literal, words, a list, a tuple, a matrix, a relation ... or an expression.

``read`` takes normalised text (``notation``) apart at its top level; the parts are read in turn. Nothing is
evaluated here, except that a matrix takes its factor in. What cannot be read raises ``Unreadable``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache

from envs.verifier.literal import Literal, parse_literal
from envs.verifier.nodes import (
    EMPTY,
    EVERYTHING,
    Based,
    Collection,
    Expression,
    Matrix,
    Named,
    Node,
    Relation,
    Unreadable,
    Words,
)
from envs.verifier.real_sets import either, meet, puncture, set_operation
from envs.verifier.scan import CONJUNCTION, LIST_MARKS, Mark, cut, designator, top_level
from envs.verifier.symbols import word_set
from envs.verifier.units import is_unit, without_lead, without_unit

MAX_NESTING = 12
MAX_ITEMS = 64
FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠", "≡": "≡"}

_BASED = re.compile(r"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*\{?\s*([0-9]{1,2})\s*\}?")
_GRID = r"\{(?:[pbB]?matrix|smallmatrix|array)\}"
_MATRIX = re.compile(rf"([^\\]|\\frac|\\sqrt)*?\\begin{_GRID}(.*)\\end{_GRID}", re.DOTALL)
_TRANSPOSED = re.compile(
    r"(.*[)\]}])\s*\^\s*\{?\s*(?:T|\\top|\\intercal|\\text\{\s*T\s*\}|\\mathsf\s*\{?T\}?)\s*\}?", re.DOTALL
)
_COLUMNS = re.compile(r"\s*\{[lcr|]+\}")
_HALF_OPEN = re.compile(r"([A-Za-z])\s*(\([^()\[\]]*\]|\[[^()\[\]]*\))")
_BUILDER = re.compile(r"([^|:∈]{1,12})(?:∈[^|:]{1,12})?[|:](.+)", re.DOTALL)
_PROSE = re.compile(r"[A-Za-z]+(?:['.\-][A-Za-z]+)*(?:\.?[ ,]+[A-Za-z]+(?:['.\-][A-Za-z]+)*)*")
_MINUS = re.compile(r"\A(?:\\text\{\s*(?:minus|negative)\s*\}|(?:minus|negative)\b)\s*(?=[0-9.\\(∞])", re.IGNORECASE)
_NEGATED = re.compile(r"-\s*(?:\(\s*((?:[0-9./{} ]|\\frac)+)\)|\{\s*((?:[0-9./ ]|\\frac *\{[0-9]+\} *\{[0-9]+\})+)\})")
_INFINITY = re.compile(r"(?<![A-Za-z\\])infinity(?![A-Za-z])", re.IGNORECASE)
_OUTWARD = re.compile(r"([\[\](])([^\[\]()∪]*[,;][^\[\]()∪]*)([\[\])])\s*(∪|$)\s*")
_WORD = re.compile(r"[A-Za-z]{3}")
_CALL = re.compile(r"\\(gcd|lcm|max|min)\s*\(([A-Za-z0-9, ]{3,30})\)")
_WORKED_OUT: dict[str, Callable[..., int]] = {"gcd": math.gcd, "lcm": math.lcm, "max": max, "min": min}
_EXCEPT = re.compile(
    r"(?:(?:\\text\{\s*)?(?:(?:all|the|any|every) ){0,2}(?:real numbers?|reals?)|\\mathbb\{R\}\s*(?:\\text\{\s*)?)"
    r"(?: x)?,?\s*(?:except|other than|but|excluding|not equal to)(?: for)?\s*\}?(?P<holes>.+?)\}?",
    re.DOTALL,
)
_FOR_ALL = re.compile(
    r"(?<=\S)[,;]?\s*(?:\\text\{\s*,?\s*for (?:all|every|any|each)(?: real(?: numbers?)?| reals)?\s*\}|\\forall"
    r"|\bfor (?:all|every|any|each)(?: real(?: numbers?)?| reals)?\b)\s*[A-Za-z]\s*(?:∈\s*\\mathbb\{R\})?\Z"
)
"""That an equation holds everywhere."""
_LESS = re.compile(r"(\\mathbb\{R\})\s*-\s*(?=\\\{|[\[(][^()\[\]]*,)|([\[(][^()\[\]]*,[^()\[\]]*[)\]])\s*-\s*(?=\\\{)")
_REAL_LINE = frozenset(("real numbers", "all real numbers", "the real numbers", "all reals", "the reals"))
_MATH_WORDS = word_set("sqrt infinity inf sin cos tan log ln exp cot sec csc")
_ONLY_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|[\s,.;:])+")
_SHORT_WORDS = word_set("yes no odd all one two six ten none")


@lru_cache(maxsize=4096)
def read(text: str, depth: int = 0) -> Node:
    """The structure of normalised ``text``; raises ``Unreadable``."""
    text = text.lstrip(" ,;:").rstrip(" .,;:") if depth else text.strip()
    if depth > MAX_NESTING or not text:
        raise Unreadable
    if text[0] in "≈=" and len(text) > 1:
        text = text[1:].strip()
    text = _facing(_MINUS.sub("-", _INFINITY.sub("∞", without_lead(text))))
    if "for" in text:
        text = _FOR_ALL.sub("", text) or text
    if text[0] in "\\[(" and "-" in text:
        text = _LESS.sub(r"\1\2∖", text)
    negated = _NEGATED.fullmatch(text)
    if negated:  # a number as it is written: -(-5) is still to be worked out
        text = f"-{negated[1] or negated[2]}"
    bare = text if _ONLY_WORDS.fullmatch(text) else without_unit(text)
    return _without_points(text, depth) or _simple(text) or _parts(text, depth) or Expression(bare)


def _without_points(text: str, depth: int) -> Node | None:
    """The real line without points, in words."""
    match = _EXCEPT.fullmatch(text) if "real" in text or text.startswith("\\mathbb{R}") else None
    if match is None:
        return None
    holes = read(match["holes"] + ("}" if match["holes"].count("{") > match["holes"].count("}") else ""), depth + 1)
    holes = holes.value if isinstance(holes, Named) else holes
    several = isinstance(holes, Collection) and holes.kind in ("list", "set", "either")
    return puncture(holes.items if isinstance(holes, Collection) and several else (holes,))


def _facing(text: str) -> str:
    """Intervals whose open ends are brackets that face away, ``]1,2[``, with parentheses there."""
    if text[0] not in "[](" or ("]" not in text[:-1] and "[" not in text[1:]):
        return text
    pieces, end = [], 0
    while match := _OUTWARD.match(text, end):
        left, inner, right, cup = match.groups()
        pieces.append(("(" if left in "](" else "[") + inner + (")" if right in "[)" else "]") + cup)
        end = match.end()
    return "".join(pieces) if end == len(text) else text


def _simple(text: str) -> Node | None:
    """Literals with or without a unit, numerals with a base, and words."""
    literal = parse_literal(text)
    if literal and (not literal[1] or is_unit(literal[1])):
        return literal[0]
    if text == "∅":
        return EMPTY
    based = _BASED.fullmatch(text)
    if based and any(c.isdigit() for c in based[1]):
        return Based(based[1].upper().lstrip("0"), based[2])
    if text.startswith("\\text{") and text.find("}") == len(text) - 1:
        inner = without_lead(text[6:-1].strip())
        literal = parse_literal(inner)
        if literal and (not literal[1] or is_unit(literal[1])):
            return literal[0]
        if not any(c.isdigit() for c in inner):
            return _worded(inner)
        return _parts(inner, 1) or _worded(inner)
    bare = text.strip("()[] ")
    if bare.lower() in _SHORT_WORDS:
        return _worded(bare)
    prose = len(bare) > 3 and _PROSE.fullmatch(bare) and _WORD.search(bare)
    if prose and bare not in _MATH_WORDS and not _is_short_list(bare):
        return _worded(bare)
    return None


def _worded(text: str) -> Node:
    """Words, or the set that they name."""
    return EVERYTHING if words(text) in _REAL_LINE else Words(words(text))


def _is_short_list(text: str) -> bool:
    """A short list such as ``a and b`` rather than prose."""
    pieces = re.split(r",|\band\b|\bor\b", text)
    return len(pieces) > 1 and all(len(piece.strip()) <= 2 for piece in pieces)


def words(text: str) -> str:
    """Words as they compare: without fonts, brackets, quotes, punctuation and case."""
    text = re.sub(r"\\(?:text|math[a-z]+)\s*\{|[{}()\[\]\"'.,;:!$]", " ", text)
    return " ".join(text.split()).casefold()


def _parts(text: str, depth: int) -> Node | None:
    marks = top_level(text, thousands=depth == 0)
    separators = [m for m in marks if m[2] in LIST_MARKS or CONJUNCTION.fullmatch(m[2])]
    if separators:
        return _list(text, separators, depth)
    relations = [m for m in marks if m[2] in FLIPPED or m[2] in "≈∈"]
    unions = [m for m in marks if m[2] == "∪"] if relations else []
    if unions and all(any(m[2] in piece for m in relations) for piece in cut(text, unions)):
        return _list(text, [(start, end, "or") for start, end, _ in unions], depth)  # x < 1 ∪ x > 3
    if relations:
        return _relation(text, relations, depth)
    for kind, sign in (("union", "∪"), ("difference", "∖"), ("intersection", "∩")):
        operators = [m for m in marks if m[2] == sign]
        if operators:
            return set_operation(kind, _read_all(cut(text, operators), depth))
    if text == "\\mathbb{R}":
        return EVERYTHING
    transposed = _TRANSPOSED.fullmatch(text) if text[-1] in "T}p" and "^" in text else None
    if transposed and (column := _transpose(read(transposed[1], depth + 1))):
        return column
    matrix = _MATRIX.fullmatch(text)
    if matrix and "\\begin" not in matrix[2]:
        return _matrix(text[: text.index("\\begin")].strip("·× "), matrix[2], depth)
    colons = [m for m in marks if m[2] == ":"]
    if colons:
        return Collection("ratio", _read_all(cut(text, colons), depth))
    half_open = _HALF_OPEN.fullmatch(text)
    if half_open:  # t(0,4] is no value of a function
        return Named(half_open[1], read(half_open[2], depth + 1))
    return _read_bracketed(text, depth)


def _read_all(pieces: list[str], depth: int) -> tuple[Node, ...]:
    if len(pieces) > MAX_ITEMS:
        raise Unreadable
    return tuple(read(piece, depth + 1) for piece in pieces)


def _list(text: str, separators: list[Mark], depth: int) -> Node:
    pieces = [piece for piece in cut(text, separators) if piece]
    conjunctions = [m[2] for m in separators if CONJUNCTION.fullmatch(m[2])]
    if not pieces or len(pieces) < len(separators) - len(conjunctions):
        raise Unreadable
    if len(pieces) == 1:
        return read(pieces[0], depth + 1)
    items = _read_all(pieces, depth)
    words = {"or" if "or" in conjunction else "and" for conjunction in conjunctions}
    joined = either(items) if words == {"or"} else meet(items, bool(words)) if words <= {"and"} else None
    kind = "either" if words == {"or"} else "list"
    return joined or _named_list(items, kind) or Collection(kind, items)


def _named_list(items: tuple[Node, ...], kind: str) -> Node | None:
    """``x = 1, 2``, ``x = 1, x = 2`` and ``x_1 = 1, x_2 = 2`` name the values of one unknown."""
    if isinstance(items[0], Named) and not any(isinstance(item, Named | Relation) for item in items[1:]):
        return Named(items[0].name, Collection(kind, (items[0].value, *items[1:])))
    named = [item for item in items if isinstance(item, Named)]
    stems = {item.name.partition("_")[0] for item in named}
    if len(named) == len(items) and len(stems) == 1:
        return Named(stems.pop(), Collection(kind, tuple(item.value for item in named)))
    return None


def _relation(text: str, marks: list[Mark], depth: int) -> Node:
    sides = cut(text, marks)
    ops = tuple("=" if m[2] == "≈" else m[2] for m in marks)
    rounded = marks[-1][2] == "≈"
    if any(not side for side in sides):
        raise Unreadable
    if len(sides) == 2 and ops[0] in "=∈":
        left, right = designator(sides[0]), designator(sides[1])
        shorter = len(sides[0]) <= len(sides[1])
        if left and right and "(" in left + right:  # in f(x) = x the function is the name
            shorter = left.endswith(f"({right})") or (shorter and not right.endswith(f"({left})"))
        if left is not None and (right is None or shorter):
            return Named(left, read(sides[1], depth + 1))
        if right is not None and ops[0] == "=":
            return Named(right, read(sides[0], depth + 1))
    if len(sides) == 2 and ops == ("=",) and (named := _of_whole_numbers(sides, depth)):
        return named
    if "∈" in ops:
        raise Unreadable
    return Relation(ops, tuple(sides), _interval(ops, sides, depth), rounded)


def _of_whole_numbers(sides: list[str], depth: int) -> Named | None:
    """``\\gcd(10,15) = 5`` as a name with its value, if the value is right or the arguments are names."""
    call = _CALL.fullmatch(sides[0])
    value = read(sides[1], depth + 1) if call else None
    if call is None or not isinstance(value, Literal):
        return None
    arguments = [argument.strip() for argument in call[2].split(",")]
    if all(argument.isdigit() for argument in arguments):
        worked_out = _WORKED_OUT[call[1]](*map(int, arguments))
        return Named(re.sub(r"\s", "", sides[0]), value) if value.value == worked_out else None
    return Named(re.sub(r"\s", "", sides[0]), value) if all(map(designator, arguments)) else None


def _interval(ops: tuple[str, ...], sides: list[str], depth: int) -> Named | None:
    """``a < x ≤ b`` as x in (a, b], ``x ≥ a`` as x in [a, ∞), ``x ≠ a`` as x in (-∞, a) ∪ (a, ∞); None for other
    relations."""
    if ops == ("≠",):
        name, hole = designator(sides[0]), sides[1]
        if name is None:
            name, hole = designator(sides[1]), sides[0]
        line = puncture((read(hole, depth + 1),)) if name else None
        return Named(name, line) if name and line else None
    if ops[0] in ">≥":
        ops, sides = tuple(FLIPPED[op] for op in reversed(ops)), sides[::-1]
    if not set(ops) <= set("<≤") or len(sides) > 3:
        return None
    names = [designator(side) for side in sides]
    if len(sides) == 3:
        (low, _, high), name, ends = sides, names[1], ops
    elif names[0] and not names[1]:
        low, name, high, ends = "-∞", names[0], sides[1], ("<", ops[0])
    elif names[1] and not names[0]:
        low, name, high, ends = sides[0], names[1], "∞", (ops[0], "<")
    else:
        return None
    if name is None or name[0] == "|":
        return None  # |z| < 5 bounds |z| from below, too
    brackets = ("[" if ends[0] == "≤" else "(") + ("]" if ends[1] == "≤" else ")")
    return Named(name, Collection("bracket", (read(low, depth + 1), read(high, depth + 1)), brackets))


def _matrix(factor: str, body: str, depth: int) -> Node | None:
    body = _COLUMNS.sub("", body, count=1) if body.lstrip().startswith("{") else body
    rows = [row for row in body.replace("\\hline", "").split("\\\\") if row.strip()]
    if len(rows) > MAX_ITEMS:
        raise Unreadable
    cells = tuple(_read_all(row.split("&"), depth) for row in rows)
    if not factor:
        return Matrix(cells)
    scale = read("-1" if factor == "-" else factor, depth + 1)
    if not isinstance(scale, Literal):
        return None
    return Matrix(tuple(tuple(_scale(scale, cell) for cell in row) for row in cells))


def _matrix_of_rows(rows: list[str], depth: int) -> Matrix | None:
    """``[1,2]`` and ``[3,4]`` as the rows of a matrix; None unless each is in brackets, and for a single number."""
    if not all(len(row) > 2 and row[0] == "[" and row[-1] == "]" for row in rows):
        return None
    try:
        cells = [cut(row[1:-1], [mark for mark in top_level(row[1:-1]) if mark[2] == ","]) for row in rows]
    except Unreadable:
        return None  # the brackets belong to different pairs
    if len(rows) == len(cells[0]) == 1:
        return None
    return Matrix(tuple(_read_all(row, depth + 1) for row in cells))


def _transpose(node: Node) -> Matrix | None:
    """A matrix transposed, a tuple as a column; None for anything else."""
    if isinstance(node, Matrix) and len({len(row) for row in node.rows}) == 1:
        return Matrix(tuple(zip(*node.rows, strict=True)))
    if isinstance(node, Collection) and node.ends in ("()", "[]"):
        return Matrix(tuple((item,) for item in node.items))
    return None


def _scale(scale: Literal, cell: Node) -> Node:
    if isinstance(cell, Literal):
        value = scale.value * cell.value
        return Literal(value, "integer" if value.denominator == 1 else "fraction")
    if isinstance(cell, Expression):
        return Expression(f"\\frac{{{scale.value.numerator}}}{{{scale.value.denominator}}}·({cell.text})")
    raise Unreadable


def _read_bracketed(text: str, depth: int) -> Node | None:
    """A text that one pair of brackets encloses."""
    opener = "\\{" if text.startswith("\\{") else text[0]
    closer = "\\}" if text.endswith("\\}") else text[-1]
    if opener not in ("(", "[", "{", "\\{") or closer not in (")", "]", "}", "\\}"):
        return None
    if (opener == "{") != (closer == "}") or (opener == "\\{") != (closer == "\\}"):
        return None
    inner = text[len(opener) : len(text) - len(closer)].strip()
    try:
        separators = [m for m in top_level(inner) if m[2] in (",", ";")]
    except Unreadable:
        return None  # the brackets belong to different pairs, as in (x+1)(x-1)
    if opener == "{":
        return read(inner, depth + 1)
    if opener == "\\{":
        builder = None if separators else _BUILDER.fullmatch(inner)
        if builder and designator(builder[1].strip()):
            return read(builder[2], depth + 1)
        return Collection("set", _read_all(cut(inner, separators), depth) if inner.strip() else ())
    if opener == inner[:1] == "[" and closer == inner[-1:] == "]":
        matrix = _matrix_of_rows(cut(inner, separators), depth)
        if matrix:
            return matrix
    if separators:
        return Collection("bracket", _read_all(cut(inner, separators), depth), opener + closer)
    return read(inner, depth + 1) if opener + closer in ("()", "[]") else None
