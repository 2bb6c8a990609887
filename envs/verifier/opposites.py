"""Of two opposites the other one: 7 a.m. is not 7 p.m., and 5 km north not 5 km south, though units are dropped."""

from __future__ import annotations

import re

_OPPOSITES = (
    "north south|east west|left right|up down|above below|before after|early late|earlier later|increase decrease"
    "|increased decreased|gain loss|profit loss|older younger|taller shorter|higher lower|faster slower|clockwise"
    " counterclockwise|even odd"
)
_PAIRS = tuple(frozenset(pair.split()) for pair in _OPPOSITES.split("|"))
_HALF_OF_DAY = re.compile(r"(?<=[0-9])\s*(?:\\text\{)?\s*([ap])\.?\s?m\b", re.IGNORECASE)


def opposed(gold: str, answer: str) -> bool:
    """Whether both sides say in words which of two opposites they mean, and not the same: 7 a.m. and 7 p.m., 5 km north
    and 5 km south. Units are dropped else."""
    halves = [match[1].lower() for match in map(_HALF_OF_DAY.search, (gold, answer)) if match]
    if len(set(halves)) > 1:
        return True
    said = [frozenset(re.findall(r"(?<!\\\\)\b[a-z]{2,}", text.lower())) for text in (gold, answer)]
    return any(len(pair & said[0]) == len(pair & said[1]) == 1 and pair & said[0] != pair & said[1] for pair in _PAIRS)
