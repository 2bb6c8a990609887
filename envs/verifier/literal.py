"""Rational literals: integers, decimals, fractions, mixed numbers (``1.5 million``, ``1/2 dozen`` too), percentages and
scientific notation, read exactly.

A literal is a *finished* number. ``6 \\times 7``, ``4!`` and ``2^{10}`` are expressions still to be worked out and are
not literals, whatever their value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from envs.verifier.units import SCALES

MAX_DIGITS = 4000
"""Longer digit runs are not read: CPython refuses to convert more than 4300 digits."""


@dataclass(frozen=True)
class Literal:
    """A rational number as written.

    Attributes:
        value: exact.
        form: ``integer``, ``decimal``, ``fraction``, ``mixed``, ``scientific`` or ``power`` (a bare power of ten).
        percent: whether a percent sign followed; ``value`` is then the number before the sign.
        digits: significant digits of a decimal.
    """

    value: Fraction
    form: str
    percent: bool = False
    digits: int = 0

    @property
    def quotient(self) -> bool:
        """Written as p/q."""
        return self.form in ("fraction", "mixed")


_NUMBER = r"(?:0*[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])(?! ?/)|[0-9]+)"
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+)"
_DECIMAL = rf"(?:{_NUMBER}(?:\.[0-9]*)?|\.[0-9]+)"
_EXPONENT = (
    r"(?:\{\s*(?P<braced>[-+]?\s*[0-9]{1,4})\s*\}|\(\s*(?P<round>[-+]?[0-9]{1,4})\s*\)|(?P<bare>[-+]?[0-9]{1,4}))"
)
_TERM = rf"[-+]?\s*{_INTEGER}(?:\.[0-9]+)?|\(\s*[-+]?\s*{_INTEGER}(?:\.[0-9]+)?\s*\)"
_ROUND = rf"\(\s*[-+]?\s*{_INTEGER}\s*\)"
_QUOTIENT = (
    rf"(?:\\frac\s*(?:\{{\s*(?P<p1>{_TERM})\s*\}}|(?P<p2>[0-9]))"
    rf"\s*(?:\{{\s*(?P<q1>{_TERM})\s*\}}|(?P<q2>[0-9]))"
    rf"|\{{?(?P<p3>{_INTEGER}|{_ROUND})\}}?\s*/\s*\{{?(?P<q3>[-+]?{_INTEGER}|{_ROUND})\}}?)"
)
_SIGN = r"(?P<sign>[-+]?)\s*"
_FORMS = tuple(
    (form, re.compile(_SIGN + pattern))
    for form, pattern in (
        ("scientific", rf"(?P<mantissa>{_DECIMAL})\s*[×·x]\s*(?:10|\{{10\}})\s*\^\s*{_EXPONENT}"),
        ("scientific", rf"(?P<mantissa>{_DECIMAL})[eE]{_EXPONENT}(?![0-9])"),
        ("power", rf"(?P<mantissa>)10\s*\^\s*{_EXPONENT}"),
        ("mixed", rf"(?P<whole>[0-9]+)(?:\s*(?=\\frac)|\s+(?=[0-9])){_QUOTIENT}"),
        ("fraction", _QUOTIENT),
        ("repeating", r"(?P<head>[0-9]*\.[0-9]*)\\(?:overline|bar|dot)\s*\{?(?P<cycle>[0-9]+)\}?"),
        ("decimal", rf"(?P<number>{_DECIMAL})"),
    )
)
_PERCENT = re.compile(
    r"\s*(?:%|\\text\{\s*(?:%|percent|percentage|per cent|pct)\s*\}|(?:percent(?:age)?|per cent|pct)\b)"
)
_CURRENCY = re.compile(r"(?:¢|US|USD|EUR|GBP|INR|CAD|AUD|Rs\.?|\\text\{\s*(?:US|USD|EUR|Rs\.?)?\s*\})\s*(?=[-+.0-9\\])")
_SCALE = re.compile(
    rf"\s*(?P<open>\\text\{{\s*)?(?P<word>{'|'.join(SCALES)})s?\b(?:\s+of\b)?\s*(?P<close>\}})?", re.IGNORECASE
)
_SECONDS = re.compile(r"\^\s*\{?\s*'")
_INTEGRAL = re.compile(r"[-+]?[0-9]{1,18}")


def parse_literal(text: str) -> tuple[Literal, str] | None:
    """A literal at the start of normalised ``text`` and what follows it (a unit, perhaps); None if none starts there.

    The longest reading wins: in ``1 4/5`` a mixed number, in ``1.5×10^3`` scientific notation.
    """
    if _INTEGRAL.fullmatch(text):
        return Literal(Fraction(int(text)), "integer"), ""
    if len(text) > MAX_DIGITS:
        return None
    prefix = _CURRENCY.match(text)
    if prefix:
        text = text[prefix.end() :]
    for form, pattern in _FORMS:
        match = pattern.match(text)
        if match is None:
            continue
        literal = _read(form, match)
        if literal is None:
            return None
        rest = text[match.end() :]
        if rest[:1] and rest[0] in "0123456789.^!_" and not _SECONDS.match(rest):
            return None
        if rest and form in ("decimal", "fraction", "mixed") and _SCALE.match(rest):
            literal, rest = _scaled(literal, rest)
        percent = _PERCENT.match(rest)
        if percent:
            rest = rest[percent.end() :]
            literal = Literal(literal.value, literal.form, True, literal.digits)
        return literal, rest.strip()
    return None


def _scaled(literal: Literal, rest: str) -> tuple[Literal, str]:
    """A literal times the scale words that begin ``rest``, and what follows them."""
    value = literal.value
    while (scale := _SCALE.match(rest)) and (scale["open"] or not scale["close"]):
        value *= SCALES[scale["word"].lower()]
        rest = ("\\text{" if scale["open"] and not scale["close"] else "") + rest[scale.end() :]
    return Literal(value, "integer" if value.denominator == 1 else literal.form, digits=literal.digits), rest


def _integer(text: str) -> int:
    return int(text.replace(",", "").replace(" ", ""))


def _term(text: str) -> Fraction:
    text = text.strip("() ")
    sign = -1 if text[0] == "-" else 1
    return sign * _decimal(text.lstrip("+- "))


def _read(form: str, match: re.Match[str]) -> Literal | None:
    groups = match.groupdict()
    sign = -1 if match["sign"] == "-" else 1
    if form in ("scientific", "power"):
        exponent = _integer(groups["braced"] or groups["round"] or groups["bare"])
        mantissa = _decimal(groups["mantissa"]) if groups["mantissa"] else Fraction(1)
        return Literal(sign * mantissa * Fraction(10) ** exponent, form)
    if form in ("mixed", "fraction"):
        top = _term(groups["p1"] or groups["p2"] or groups["p3"])
        bottom = _term(groups["q1"] or groups["q2"] or groups["q3"])
        if bottom == 0 or (form == "mixed" and (top < 0 or bottom < 0)):
            return None
        return Literal(sign * (int(groups.get("whole") or 0) + top / bottom), form)
    if form == "repeating":
        head, cycle = groups["head"], groups["cycle"]
        places = len(head.partition(".")[2])
        period = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**places)
        return Literal(sign * (_decimal(head if head != "." else "0") + period), "fraction")
    number = groups["number"].replace(",", "").replace(" ", "")
    if "." not in number:
        return Literal(Fraction(sign * int(number)), "integer")
    digits = len(number.replace(".", "").lstrip("0"))
    return Literal(sign * _decimal(number), "decimal", digits=digits)


def _decimal(text: str) -> Fraction:
    whole, _, part = text.replace(",", "").replace(" ", "").partition(".")
    return Fraction(int((whole + part) or "0"), 10 ** len(part))


def equal(gold: Literal, answer: Literal) -> bool:
    """Whether ``answer`` states the gold number, by the rules for percentages, quotients and rounded decimals.

    A gold with % takes 28%, 28 and 0.28; a gold without takes 28% for 28 or for 0.28. For an integer gold a quotient
    is unfinished. A quotient gold also takes a decimal of at least 7 significant digits within a relative 1e-6.
    """
    if answer.form == "power" and gold.form not in ("power", "scientific"):
        return False
    if answer.quotient and not gold.quotient and gold.value.denominator == 1 and not gold.percent:
        return False
    values = {answer.value}
    if gold.percent and not answer.percent:
        values.add(answer.value * 100)
    if answer.percent and not gold.percent:
        values.add(answer.value / 100)
    if gold.value in values:
        return True
    if gold.quotient and answer.form == "decimal" and answer.digits >= 7:
        return any(abs(value - gold.value) <= abs(gold.value) / 10**6 for value in values)
    return False
