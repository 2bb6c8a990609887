"""The tokens of a mathematical expression in LaTeX or plain notation."""

from __future__ import annotations

import re

MAX_TOKENS = 400

_TOKEN = re.compile(
    r"\s+|(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(?P<text>\\text\{[^{}]*\})|(?P<command>\\[A-Za-z]+|\\[{}])|(?P<word>[A-Za-z]+)|(?P<mark>[^\s])"
)
_PLAIN_FUNCTIONS = re.compile(
    r"(sqrt|cbrt|sinh|cosh|tanh|arcsin|arccos|arctan|asin|acos|atan|sin|cos|tan|cot|sec|csc|log|ln|exp|abs|pi|infinity|inf)"
)
_CONSTANTS = {"pi": "π", "infinity": "∞", "inf": "∞"}


class NotAnExpression(Exception):
    """The text is outside of the grammar."""


def tokens(text: str) -> list[str]:
    """Numbers, commands with their backslash, single letters and marks; words in a text font as ``\\\\text:words``."""
    result: list[str] = []
    for match in _TOKEN.finditer(text):
        if match["word"]:
            result.extend(_split_word(match["word"]))
        elif match["text"]:
            content = match["text"][6:-1].strip()
            result.append(content if len(content) == 1 else "\\text:" + content)
        elif not match[0].isspace():
            result.append(match[0].replace(",", "") if match["number"] else match[0])
        if len(result) > MAX_TOKENS:
            raise NotAnExpression("too long")
    return result


def _split_word(word: str) -> list[str]:
    pieces: list[str] = []
    for piece in _PLAIN_FUNCTIONS.split(word):
        if _PLAIN_FUNCTIONS.fullmatch(piece):
            pieces.append(_CONSTANTS.get(piece, "\\" + piece.replace("arc", "a")))
        else:
            pieces.extend(piece)
    return pieces
