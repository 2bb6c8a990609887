"""Finding the separators of a text outside of its brackets, and the single names that may stand before ``=``."""

from __future__ import annotations

import re

from envs.verifier.nodes import Unreadable

Mark = tuple[int, int, str]
"""Start, end and text of a separator or relation sign."""

LIST_MARKS = frozenset([",", ";", "\\\\"])
CONJUNCTION = re.compile(r"\\text\{\s*,?\s*(?:and|or)\s*\}|and|or")
_TOKEN = re.compile(
    r"\\text\{[^{}]*\}|\\\\|\\[{}]|\\[A-Za-z]+|[()\[\]{}]|,|;|:|[=<>≤≥≠≈∈≡∪∩∖]|"
    r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
_OPENERS = frozenset(["(", "[", "{", "\\{", "\\begin", "\\lfloor", "\\lceil"])
_CLOSERS = frozenset([")", "]", "}", "\\}", "\\end", "\\rfloor", "\\rceil"])
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_LETTER = r"(?:[A-Za-zα-ωΑ-Ω]|\\[A-Za-z]+(?:\{\s*[A-Za-z]+\s*\})?|\\text\{[^{}]*\})"
_NAME = rf"{_LETTER}'*(?:_(?:[A-Za-z0-9]|\{{[^{{}}]*\}}|\\[a-z]+))?'*"
_DESIGNATOR = re.compile(
    rf"(?:\\angle|m\s*\\angle|\\triangle|\\max|\\min|\\deg)?\s*\{{?\s*"
    rf"(?:{_NAME}|[A-Z]{{2,4}}|[A-Za-z]{{3,}}|\\overline\s*\{{\s*[A-Z]{{2}}\s*\}}|\|\s*[A-Z]{{1,3}}\s*\|"
    rf"|\[\s*[A-Z]{{3,6}}\s*\]|[A-Z]\s*\^\s*\{{?\s*-1\s*\}}?|{_NAME}\s*\(\s*[A-Z]{{1,6}}\s*\)"
    rf"|{_NAME}\s*\(\s*{_NAME}\s*(?:,\s*{_NAME}\s*)*\)|[A-Z]\s*\([^()]{{1,20}}\)|[a-z]\s*\(\s*-?[0-9]+\s*\)"
    rf"|\(\s*{_NAME}\s*(?:,\s*{_NAME}\s*)+\))\s*\}}?"
)
_NUMBER = r"-?(?:[0-9]+(?:\.[0-9]+)?(?:\s*/\s*[0-9]+)?|\\frac\s*\{[0-9]+\}\s*\{[0-9]+\})"
_FUNCTION = r"[f-hpqF-HPQ](?:_\{?[A-Za-z0-9]\}?)?'{0,3}(?:\s*\^\s*\{\s*-1\s*\}|\s*\^\s*\{\s*\([0-9n]\)\s*\})?"
_CALL = rf"{_FUNCTION}\s*\(\s*(?:{_NUMBER}|{_NAME})(?:\s*,\s*(?:{_NUMBER}|{_NAME}))*\s*\)"
_FURTHER = re.compile(
    rf"(?:{_FUNCTION}\s*\(\s*){{0,3}}{_CALL}(?:\s*\)){{0,3}}"
    r"|\|\s*(?:\\(?:vec|overrightarrow|bar|overline)\s*\{?\s*)?[u-wz](?:_\{?[0-9]\}?)?\s*\}?\s*\|"
    r"|\|\s*\\text\{[a-z]\}\s*\|"
    r"|\\lim(?:\s*_\s*\{[^{}=]{1,20}\})\s*[f-hF-H]\s*\(\s*[a-z]\s*\)"
    r"|\\frac\s*\{\s*(?:\\partial|d|\\text\{d\})\s*(?:\^\s*\{?[2-9]\}?)?\s*[A-Za-z]\s*\}"
    r"\s*\{\s*(?:\\partial|d|\\text\{d\})\s*[a-z]\s*(?:\^\s*\{?[2-9]\}?)?\s*\}"
    r"|d\s*[A-Za-z]\s*/\s*d\s*[a-z]"
)
"""Values of a function, an inverse or a derivative at a number, moduli of what is no unknown, limits, derivatives."""
_DENIES = re.compile(r"(?<![A-Za-z])not(?![A-Za-z])", re.IGNORECASE)
_COMPUTES = re.compile(r"\\(?:frac|sqrt|sin|cos|tan|log|ln|pi|binom|lfloor|lceil|begin|int|sum|lim|prod)(?![a-z])|π")


def top_level(text: str, thousands: bool = False) -> list[Mark]:
    """The separators and relation signs outside of all brackets. With ``thousands`` the commas of well-formed
    thousands groups separate nothing. Raises ``Unreadable`` if the brackets do not balance."""
    joined: frozenset[int] = frozenset()
    if thousands and "," in text:
        joined = frozenset(n for m in _THOUSANDS.finditer(text) for n in range(m.start(), m.end()))
    depth, marks = 0, []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENERS:
            depth += 1
        elif token in _CLOSERS:
            depth -= 1
            if depth < 0:
                raise Unreadable
        elif depth or match.start() in joined:
            continue
        elif token[0] != "\\" or token == "\\\\" or CONJUNCTION.fullmatch(token):
            marks.append((match.start(), match.end(), token))
    if depth:
        raise Unreadable
    return marks


def cut(text: str, marks: list[Mark]) -> list[str]:
    """The pieces of ``text`` between marks."""
    starts = [0] + [end for _, end, _ in marks]
    ends = [start for start, _, _ in marks] + [len(text)]
    return [text[a:b].strip() for a, b in zip(starts, ends, strict=True)]


def designator(text: str) -> str | None:
    """The canonical spelling of a single name (``x``, ``a_n``, ``f(x)``, ``|AB|``, ``(p,q)``, a word), or None."""
    if len(text) > 60 or _DENIES.search(text):
        return None
    if _COMPUTES.search(text) or not _DESIGNATOR.fullmatch(text):
        further = _FURTHER.fullmatch(text)
        if not further or text.count("(") != text.count(")"):
            return None
        return re.sub(r"\s", "", text)
    return re.sub(r"\\text|[\s{}]", "", text)
