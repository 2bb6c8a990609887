"""Multiple choice: which letter a text chooses, alone or with what the choice says."""

from __future__ import annotations

import re

_ALONE = r"\(?(?:\\text\{{\s*\(?)?([{0}])\)?\s*\}}?\)?"
_WITH = r"(?:\\text\{{\s*)?\(?(?:\\text\{{\s*)?\(?([{0}])\}}?\s*[{1}]\}}?(?P<what>.*[0-9A-Za-z].*)"
_UPPER, _LOWER = re.compile(_ALONE.format("A-J")), re.compile(_ALONE.format("a-h"))
_CHOSEN = re.compile(_WITH.format("A-J", ").:"), re.DOTALL)
_CHOSEN_LOWER = re.compile(rf"(?=\(|\\text\{{\s*\(){_WITH.format('a-j', ')')}", re.DOTALL)
_ROMAN = r"(?:I{1,3}|IV|VI{0,3})"
_ROMAN_LIST = re.compile(
    rf"(?:only |neither |both |all of )?{_ROMAN}(?:(?:,| and| or| nor|, and|, or) {_ROMAN})+(?: only)?"
    rf"|{_ROMAN} only|only {_ROMAN}"
)
_OTHER = re.compile(
    r"(?<![A-Za-z])(?:A(?! [a-z]{3})|[B-J])(?![A-Za-z'])|\b(?:or|and|not|nor|but|also|too|maybe|perhaps|both)\b"
    r"|\([a-j]\)|[,;/&]\s*\(?[a-j](?![A-Za-z])"
)
_FONT = re.compile(r"\\text\{([^{}]*)\}")


def bare_choice(text: str) -> str:
    """The letter that is all of a text, ``B`` for ``(B)`` and ``\\text{(B)}``; empty if it is none."""
    match = _UPPER.fullmatch(text)
    return match[1] if match else ""


def stated_choice(text: str) -> tuple[str, str] | None:
    """The letter of a choice and what it says, ``(B) 12``; None for anything else, a second choice included."""
    match = _CHOSEN.fullmatch(text)
    if match is None or _names_another(match[1], match["what"]):
        return None
    return match[1], match["what"].strip()


def chosen_letter(text: str, any_case: bool = False) -> str:
    """The one letter that a text chooses, alone or with what the choice says; empty if there is none.

    Args:
        any_case: whether ``b`` and ``(b)`` choose B, too.
    """
    stated = stated_choice(text)
    letter = bare_choice(text) or (stated[0] if stated else "")
    if letter or not any_case:
        return letter
    lower, chosen = _LOWER.fullmatch(text), _CHOSEN_LOWER.fullmatch(text)
    if lower:
        return lower[1].upper()
    return chosen[1].upper() if chosen and not _names_another(chosen[1], chosen["what"]) else ""


def _names_another(letter: str, what: str) -> bool:
    """Whether ``what`` follows a letter as a second choice, or as a hedge. An article, I and II are none."""
    said = " ".join(_FONT.sub(r" \1 ", what).split())
    if _ROMAN_LIST.fullmatch(said):
        return False
    alone = said.strip("()[]{}.,:; ")
    return _OTHER.search(said) is not None or (_LOWER.fullmatch(alone) is not None and alone.upper() != letter)
