"""Errors that a user can mend. Every command prints them without a traceback and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """Bad input: the message names the value and the remedy."""


class WrongType(UsageError, TypeError):
    """Bad input of another type: a ``TypeError`` to gymnasium's and stable-baselines3's callers."""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names most like ``name``, three at most."""
    return get_close_matches(name, sorted(known), n=3, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known names, or all of them when none is near."""
    known = sorted(known)
    if near := nearest(name, known):
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"known: {', '.join(known) or 'none'}"


class UnknownName(UsageError):
    """No component of this kind has this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}: {did_you_mean(name, known)}")


class UnknownField(UsageError):
    """The component has no hyper-parameter of this name. ``near``: those of its own that are most like it."""

    def __init__(self, owner: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        self.near = nearest(name, known)
        super().__init__(f"{owner} has no field {name!r}: {did_you_mean(name, known)}")
