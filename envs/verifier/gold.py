"""What a gold answer may be: a value of any row, read into the texts that verdicts compare, or refused by name.

``read_gold`` takes a value as a data set has it; ``unparsed_parts`` says whether the verifier reads the text as
mathematics or as words. A gold that passes neither would mark every completion wrong.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from numbers import Rational, Real
from typing import Any

from envs.verifier.expression import Tree, parse
from envs.verifier.extract import gold_of, is_solution
from envs.verifier.lexer import NotAnExpression
from envs.verifier.nodes import Collection, Expression, Matrix, Named, Node, Relation, Unreadable
from envs.verifier.notation import normalise
from envs.verifier.structure import read
from envs.verifier.symbols import FUNCTION_WORDS, word_set
from registry import UsageError

_DAMAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")
_BLANK_AND_LETTERS = re.compile(r"([\t\n\r])([A-Za-z]+)")
_ESCAPED = {"\t": "t", "\n": "n", "\r": "r"}
_COMMANDS = word_set("""
times text textbf textit textrm textnormal textsf texttt textup textsc textstyle textcolor textdegree textdollar theta
tau tan tanh to top tfrac tbinom triangle tilde therefore thinspace thickspace thickapprox tiny
ne neq nu ni not notin nabla neg nmid nleq ngeq nless ngtr nexists nsubseteq nparallel ncong nsim nolimits normalsize
noindent newline
rho right rightarrow rangle rbrace rbrack rceil rfloor rvert rVert rm rightharpoonup
""")
"""The LaTeX commands whose backslash and first letter are an escape of JSON, but for those with ``\\b`` and ``\\f``."""
_DOUBLED = re.compile(r"\\\\[A-Za-z]")
_NO_BACKSLASH = re.compile(r"(?<![A-Za-z\\])([A-Za-z]{2,})\s*\{")
_BEFORE_BRACES = (*FUNCTION_WORDS, "arcsin", "arccos", "arctan", "abs", "mod")
_TEXT = re.compile(r"\\text\{[^{}]*\}")
_WORDS = re.compile(
    r"(?<![A-Za-z\\])(?:(?!and |or )[A-Za-z]{2,} +(?!and\b|or\b)[A-Za-z]{2,}|(?!and |or )[A-Za-z]{3,} +[0-9])"
)
_WHERE = re.compile(r"\bwhere\b")
_SURROUNDING_DOLLARS = re.compile(r"\$([^$]*)\$\.?")
MAX_EXPONENT = 400  # of a number that is written without one
_ENVIRONMENT = re.compile(
    r"\\begin\{(cases|aligned|array|gathered|split)\}(?:\s*\{[lcr|]+\})?(.*?)\\end\{\1\}", re.DOTALL
)
_PRINTED_ITEM = re.compile(r"""(?P<item>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\})(?P<next>\s+(?=['"{]))?""", re.DOTALL)
"""A text or the end of an object in a printed list, and the blanks before the next item where no comma is."""
_MISSING = word_set("nan null <na>")
_LABEL = re.compile(r"(?=[^A-Za-z]*[A-Za-z])(?:[A-Za-z]{3,}|[0-9]+)(?:[ ,]+(?:[A-Za-z]{3,}|[0-9]+)){0,2}")


def read_gold(value: Any, where: str, solution: bool = False) -> tuple[str, ...]:
    """The accepted answers that ``value`` states, each as bare text, the first one foremost.

    Text is taken as it is, a worked solution (``####`` or a box) by its final answer, a whole float as an integer.
    Several strings are several accepted spellings or roundings, any of which is right.

    Args:
        value: text, a number, or a list of strings.
        where: names the row in errors.
        solution: whether the text must be a worked solution.

    Raises:
        UsageError: no answer, an empty or a damaged one, a list of numbers, or a value of another type.
    """
    if isinstance(value, str) and value.strip().startswith(("['", '["')):
        with suppress(ValueError):  # unless it is no list in a string
            value = printed_list(value)
    value = unpacked(value)
    if not isinstance(value, list | tuple):
        return (_one_answer(value, where, solution),)
    if not value:
        raise UsageError(f"{where} has an empty list of answers; correct or leave out that row")
    if len(value) > 1 and not all(isinstance(item, str) for item in value):
        raise UsageError(
            f"{where} has the list {str(value)[:80]} as its answer, which is ambiguous: give one string such as "
            f"{', '.join(map(str, value))[:80]!r} if all belong to the answer, or a list of strings if any one is right"
        )
    return tuple(dict.fromkeys(_one_answer(item, where, solution) for item in value))


def printed_list(text: str) -> Any:
    """The list that a text is, as Python or numpy prints one; numpy puts no commas between its items, which are texts
    or objects. Raises ``ValueError`` for a text that is none."""

    def separated(match: re.Match[str]) -> str:
        return match[0] if match["next"] is None else f"{match['item']},{match['next']}"

    try:
        return ast.literal_eval(_PRINTED_ITEM.sub(separated, text.strip()))
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None


def unpacked(value: Any) -> Any:
    """An array as the list of its numbers, each of the array's own type; one without dimensions as its number."""
    if not hasattr(value, "tolist") or isinstance(value, Real | str):
        return value
    value = value.numpy() if hasattr(value, "numpy") else value  # of torch
    if getattr(value, "ndim", 0):
        return list(value)
    number = value[()]
    return number if isinstance(number, Real) or not hasattr(number, "item") else number.item()


def _one_answer(value: Any, where: str, solution: bool) -> str:
    value = unpacked(value)
    if value is None:
        raise UsageError(f"{where} has no answer (None); correct or leave out that row")
    if isinstance(value, Real | Decimal) and not isinstance(value, Rational):
        return _number_text(Decimal(str(value)), where)
    if not isinstance(value, str | Rational):
        inside = ", with a dot for one inside of an object" if isinstance(value, Mapping) else ""
        raise UsageError(
            f"{where} has {str(value)[:60]!r} of type {type(value).__name__} as its answer; give text or a number, or "
            f"name the answer's column with answer=...{inside}"
        )
    text = str(value)
    if solution or is_solution(text):
        text = gold_of(text, where)
    _check_characters(text, where)
    text = text.strip()
    match = _SURROUNDING_DOLLARS.fullmatch(text)
    text = match[1].strip() if match else text
    if not text or text.casefold() in _MISSING:
        raise UsageError(f"{where} has an empty answer ({text!r}); correct or leave out that row")
    return text


def _number_text(number: Decimal, where: str) -> str:
    """A number with all its digits and without an exponent; a whole one as an integer."""
    if not number.is_finite() or abs(number.adjusted()) > MAX_EXPONENT:
        raise UsageError(f"{where} has no answer ({number!s}); correct or leave out that row")
    whole = number.to_integral_value()
    return format(whole if whole == number else number, "f")


def _check_characters(text: str, where: str) -> None:
    """Raise ``UsageError`` for LaTeX whose backslashes an escape has swallowed (``\\frac`` in JSON is a form feed and
    ``rac``), doubled or lost."""
    damage = _DAMAGE.search(text)
    swallowed = next((m for m in _BLANK_AND_LETTERS.finditer(text) if _ESCAPED[m[1]] + m[2] in _COMMANDS), None)
    if damage or swallowed or _is_mojibake(text):
        raise UsageError(
            f"{where} has the gold answer {text[:80]!r} with damaged characters: a backslash of its LaTeX was read "
            "as an escape (in JSON write \\\\frac for \\frac), or the file was decoded wrongly (it must be UTF-8)"
        )
    doubled = _DOUBLED.search(text)
    if doubled and ("\\begin{" not in text or "\\\\begin{" in text):
        raise UsageError(
            f"{where} has the gold answer {text[:80]!r} with a doubled backslash before {doubled[0][2:]!r}: it was "
            "escaped twice; write one backslash"
        )
    bare = next((m[1] for m in _NO_BACKSLASH.finditer(text) if not m[1].endswith(_BEFORE_BRACES)), None)
    if bare:
        raise UsageError(
            f"{where} has the gold answer {text[:80]!r}, in which {bare!r} lacks its backslash; correct that row"
        )


def is_damaged(text: str) -> bool:
    """Whether a question or a solution has characters that a backslash of its LaTeX may have become: ``\\times`` a tab
    and ``imes``. A line break is none of them: lines begin with any word."""
    return _DAMAGE.search(text) is not None or any(
        match[1] == "\t" and "t" + match[2] in _COMMANDS for match in _BLANK_AND_LETTERS.finditer(text)
    )


def _is_mojibake(text: str) -> bool:
    """Whether a text is UTF-8 that was decoded as Windows-1252: π as Ï€."""
    with suppress(UnicodeError):
        return text.encode("cp1252").decode("utf-8") != text
    return False


def unparsed_parts(gold: str, where: str) -> list[str]:
    """The parts of a gold answer, in normalised text, that only math-verify may be able to read; mostly none.

    A gold is words (``\\text{east}``, ``no solution``), or each of its parts is a literal or an expression of our
    grammar, or else LaTeX with commands beyond it. Raises ``UsageError`` for anything else, sentences about expressions
    included, but for a last clause with "where", which says what names stand for.
    """
    stated = _WHERE.split(gold, maxsplit=1)[0]
    try:
        parts = [part for leaf in _expressions(read(normalise(gold))) if (part := _unparsed(leaf))]
        is_sentence = any(map(_is_sentence, _expressions(read(normalise(stated)))))
    except (Unreadable, RecursionError, ValueError, OverflowError):
        raise unreadable(gold, where) from None
    if is_sentence or any("\\" not in part for part in parts):
        raise unreadable(gold, where)
    return parts


def unreadable(gold: str, where: str) -> UsageError:
    """The error for a gold that is neither words nor mathematics."""
    return UsageError(
        f"{where}: the verifier cannot read the gold answer {gold[:80]!r}; give the bare answer, correct or leave out "
        "that row, or name the answer column"
    )


def _expressions(node: Node) -> Iterator[str]:
    if isinstance(node, Expression):
        yield node.text
    elif isinstance(node, Named):
        yield from _expressions(node.value)
    elif isinstance(node, Relation):
        for side in node.sides:
            yield from _expressions(read(side, 1))
    elif isinstance(node, Collection | Matrix):
        rows = node.rows if isinstance(node, Matrix) else (node.items,)
        for item in (item for row in rows for item in row):
            yield from _expressions(item)


def _is_sentence(text: str) -> bool:
    """Whether words stand side by side in an expression: the grammar reads them as products of letters."""
    return not _LABEL.fullmatch(text) and _WORDS.search(_TEXT.sub(" . ", text)) is not None


def _unparsed(text: str) -> str:
    """``text`` if it is outside of the grammar, else an empty one. An ellipsis and a label (``June 20``) stand for
    themselves, and an environment such as cases for its cells."""
    environment = _ENVIRONMENT.fullmatch(text)
    if environment:
        cells = filter(str.strip, re.split(r"\\\\|&", environment[2]))
        return text if any(_unparsed(leaf) for cell in cells for leaf in _expressions(read(cell, 1))) else ""
    if text == "…" or _LABEL.fullmatch(text):
        return ""
    try:
        tree = parse(text.replace("±", "+").replace("∓", "-").lstrip("+ "))
    except NotAnExpression:
        return text
    if _divides_by_zero(tree):
        raise Unreadable
    return ""


def _divides_by_zero(tree: Tree) -> bool:
    if tree[0] in ("num", "name", "const"):
        return False
    return (tree[0] == "div" and tree[2] == ("num", 0)) or any(map(_divides_by_zero, tree[1:]))
