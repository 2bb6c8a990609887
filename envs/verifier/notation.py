"""One notation for what LaTeX, unicode and plain text write in many ways.

``normalise`` rewrites a candidate so that the readers see operators as single characters (``≤ ∪ ∞ π · ×``), words
as ``\\text{...}``, fractions as ``\\frac`` and spacing as blanks. The maps are targeted: a compatibility normalisation
such as NFKC would turn 4² into 42.
"""

from __future__ import annotations

import re
import unicodedata

from envs.verifier.fonts import without_fonts
from envs.verifier.symbols import (
    CHARACTERS,
    COMMANDS,
    SILENT,
    SPACES,
    SUBSCRIPTS,
    SUPERSCRIPTS,
)

_GROUPS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:\s?\{\s*\\?,\s*\}|,\\!\s*|\\[,;:!]\s*|~)[0-9]{3})+(?![0-9])")
_SEPARATOR = re.compile(r"\{\s*\\?,\s*\}|,\\!\s*|\\[,;:!]\s*|~")
_COMMAND = re.compile(r"\\(?:(?P<name>[A-Za-z]+)\*?(?P<blank> *)|(?P<row>\\(?:\[[^\]]*\])?)|(?P<mark>.))", re.DOTALL)
_PLAIN = re.compile(r"[-+0-9A-Za-z.,/ ]*")
_SUPER_RUN = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_SUB_RUN = re.compile(r"[₀₁₂₃₄₅₆₇₈₉]+")
_STACKED = re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹]+)/([₀₁₂₃₄₅₆₇₈₉]+)")
_REPEATING = re.compile("(?<=[.0-9])(?:[0-9][\u0304\u0305])+|(?<=[.0-9])[0-9]\u0307")
_NO_DELIMITER = re.compile(r"\\(?:left|right)\s*\.")
_CUP = re.compile(r"(?<=[)\]])\s*(?:U|\x01\s*U\s*\x02)\s*(?=(?:\\left)?\s*[(\[][^()\[\]]*,)")
"""A letter between two intervals."""
_ROOT = re.compile(r"([√∛∜])([0-9]+)")
_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}
_COLOUR = re.compile(r"\\(?:(?:text)?color|[hv]space\*?)\s*\{[^{}]*\}")
_STACK = re.compile(r"\{([^{}]*)\\(over|choose)(?![a-z])([^{}]*)\}")
_DEGREE = re.compile(r"\^\s*(?:\{\s*(?:°|\x01o\x02)\s*\}|°|\x01o\x02)")
_DOUBLED = re.compile(r" {2,}")
_TRAILING = ".,;: "
_ASCII_OPERATORS = (
    (":=", "="),
    ("<=", "≤"),
    (">=", "≥"),
    ("=<", "≤"),
    ("!=", "≠"),
    ("==", "≡"),
    ("**", "^"),
    ("+-", "±"),
    ("*", "·"),
)


def normalise(text: str) -> str:
    """``text`` in the one notation, trimmed of delimiters, emphasis and trailing punctuation."""
    text = text.strip().replace("...", "…")
    if _PLAIN.fullmatch(text):
        return _trim(text)
    if not text.isascii():
        text = _REPEATING.sub(_overlined, "".join(map(_ascii_digit, text)))
    text = _ROOT.sub(lambda m: f"\\sqrt{_INDEX[m[1]]}{{{m[2]}}}", text).replace("√", "\\sqrt ").translate(CHARACTERS)
    text = _STACKED.sub(lambda m: f"\\frac{{{_digits(m[1])}}}{{{_digits(m[2])}}}", text)
    text = _SUPER_RUN.sub(lambda m: "^{" + "".join(SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _SUB_RUN.sub(lambda m: "_{" + "".join(SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = _STACK.sub(
        lambda m: f"\\{'frac' if m[2] == 'over' else 'binom'}{{{m[1]}}}{{{m[3]}}}",
        _COLOUR.sub("", _unwrap_emphasis(text)),
    )
    text = _GROUPS.sub(lambda m: _SEPARATOR.sub("", m[0]), text).replace("{,}", ",").replace("{:}", ":")
    text = _NO_DELIMITER.sub("", without_fonts(text))
    if "U" in text:
        text = _CUP.sub("∪", text)
    text = _COMMAND.sub(_command, text.replace("~", " "))
    for ascii_form, operator in _ASCII_OPERATORS:
        text = text.replace(ascii_form, operator)
    text = _DEGREE.sub("°", text).replace("\\{ \\}", "∅").replace("\\{\\}", "∅").replace("$,$", ", ").replace("$", "")
    return _trim(_unwrap_emphasis(_DOUBLED.sub(" ", text)))  # once more: \_0_ is _0_ by now


def _ascii_digit(character: str) -> str:
    """A decimal digit of any script as 0 to 9; superscripts, fractions and circled numerals are none."""
    return str(unicodedata.decimal(character)) if character.isdecimal() else character


def _overlined(match: re.Match[str]) -> str:
    """Digits with a combining line or dot above each, as the period of a decimal."""
    return f"\\overline{{{re.sub('[^0-9]', '', match[0])}}}"


def _digits(raised: str) -> str:
    return "".join({**SUPERSCRIPTS, **SUBSCRIPTS}[character] for character in raised)


def _unwrap_emphasis(text: str) -> str:
    while True:
        bare = text.rstrip(_TRAILING + "$").lstrip("$ ")  # **42**. and $_x_$ are emphasis, too
        if len(bare) < 3 or bare[0] != bare[-1] or bare[0] not in "*_`\"'":
            return text
        text = bare[1:-1].strip()


def _command(match: re.Match[str]) -> str:
    if match["row"]:
        return "\\\\"
    name = match["name"]
    if name is None:
        mark = match["mark"]
        if mark in "{}":
            return f"\\{mark}"
        if mark == "|":
            return "|"
        return {"$": "", "%": "%", "!": "", "&": "&", "#": "#", "_": "_"}.get(mark, " ")
    if name in SILENT:
        return ""
    if name in SPACES:
        return " "
    known = COMMANDS.get(name)
    if known is None:
        return f"\\{name}{match['blank'] and ' '}"
    return known + (match["blank"] and " ")


def _trim(text: str) -> str:
    text = text.replace("\x01", "\\text{").replace("\x02", "}").strip()
    return text.rstrip(_TRAILING).strip()
