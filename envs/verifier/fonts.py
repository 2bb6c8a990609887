"""Font commands: words stay words, ``\\text{...}``, and mathematics set in a font is that mathematics."""

from __future__ import annotations

import re

from envs.verifier.extract import closing_brace
from envs.verifier.symbols import FUNCTION_WORDS, UNIT_FUNCTIONS
from envs.verifier.units import is_symbol

_WORDY = (
    "text|textbf|textit|textrm|textnormal|textsf|texttt|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathnormal|"
    "boldsymbol|bm|operatorname|emph|underline|textup|textsc|mathop|unit|ensuremath"
)
_WORDS = re.compile(rf"\\(?:{_WORDY})\*?\s*\{{([^{{}}]*)\}}")
_OPEN = re.compile(rf"\\(?:{_WORDY})\*?\s*\{{")
_GROUP = re.compile(r"\{[^{}]*\}")
_SUM = re.compile(r"(?!^)[-+]")
_DOLLAR = re.compile(r"(?<!\\)\$")
_PURE_WORDS = re.compile(r"[A-Za-z .,;:'()\-]*")
_POWER = r"\^\s*(?:\{\s*(-?[1-9])\s*\}|([1-9]))"
_UNITS = re.compile(rf"[A-Za-z](?:[A-Za-z/·\s~]|{_POWER}|\\[,;:! ]|\\cdot(?![A-Za-z]))*")
_SYMBOL = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_UNIT = re.compile(rf"(\\cdot)|([A-Za-z]+)|{_POWER}")


def without_fonts(text: str) -> str:
    """``text`` with words between ``\\x01`` and ``\\x02``, and without any other font command."""
    for _ in range(3):
        replaced = _WORDS.sub(_words, text)
        if replaced == text:
            break
        text = replaced
    return _without_nested(text) if _OPEN.search(text) else text


def _without_nested(text: str) -> str:
    """The fonts about what has braces itself, from the innermost on."""
    for match in reversed(list(_OPEN.finditer(text))):
        end = closing_brace(text, match.end() - 1)
        if end > 0:
            before, content, after = text[: match.start()], text[match.end() : end], text[end + 1 :]
            whole = not before.strip(" $") and not after.strip(" $.")
            text = before + (_in_math(content) if whole else _grouped(before, _in_math(content))) + after
    return text


def _grouped(before: str, content: str) -> str:
    """``content`` in braces where it would fall apart without them: as an index, or as a sum beside a factor."""
    flat = content
    while (inner := _GROUP.sub("", flat)) != flat:
        flat = inner
    return f"{{{content}}}" if before.rstrip()[-1:] in ("^", "_") or _SUM.search(flat) else content


def _in_math(content: str) -> str:
    """What a font holds, its words between marks: all of it is mathematics, or what stands between dollars."""
    parts = _DOLLAR.split(content)
    if len(parts) % 2 and len(parts) > 1:
        parts[::2] = [_marked(part) for part in parts[::2]]
        return "".join(parts)
    return _unit(content) or content


def _words(match: re.Match[str]) -> str:
    content, before = match[1], match.string[: match.start()]
    bare = content.strip()
    if bare in FUNCTION_WORDS and not (bare in UNIT_FUNCTIONS and _counts(match)):
        return f"\\{bare} "
    if "\x02" in content:  # a font in a font
        flat = content.replace("\x01", "").replace("\x02", "")
        return f"\x01{flat}\x02" if _PURE_WORDS.fullmatch(flat) else content
    marked = _in_math(content) if "$" in content or "^" in content else _marked(content)
    return f"{{{marked}}}" if before.rstrip()[-1:] in ("^", "_") and re.search(r"[-+]", marked) else marked


def _marked(content: str) -> str:
    """Words stay words; a number or a symbol set in a text font is that number or symbol."""
    bare = content.strip()
    if not bare or bare.strip("$\\ .,") == "":
        return ", " if "," in bare else " "
    if re.search(r"[A-Za-z]{2}", bare) and re.fullmatch(r"[^\\$^_=<>+]*", bare):
        return f"\x01{content}\x02"
    return f"\x01{content}\x02" if bare.strip("() ").isalpha() else content


def _unit(content: str) -> str:
    """A unit with powers, ``m\\,s^{-1}``, symbol by symbol; empty for anything else."""
    bare = content.strip()
    if "^" not in bare or not _UNITS.fullmatch(bare):
        return ""
    symbols = _SYMBOL.findall(bare)
    alone = len(symbols) == 1 and len(symbols[0]) == 1 and symbols != ["m"]
    if alone or not all(map(is_symbol, symbols)):
        return ""

    def marked(match: re.Match[str]) -> str:
        return match[1] or (f"\x01{match[2]}\x02" if match[2] else f"^{{{match[3] or match[4]}}}")

    return _UNIT.sub(marked, content)


def _counts(match: re.Match[str]) -> bool:
    """Whether words stand after a number and before no argument: 30 min is no minimum."""
    before, after = match.string[: match.start()].rstrip(" ~\\,;:\x02"), match.string[match.end() :].lstrip(" ~")
    return before[-1:] in {*"0123456789.)}/·π"} and not re.match(r"[A-Za-z0-9({\[\\^_\x01]", after)
