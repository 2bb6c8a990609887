"""The nouns of the environment: a problem, a verdict on a completion, and a source of problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Problem:
    """One math problem.

    Attributes:
        question: the text put into the template.
        answer: the gold answer, bare (no ``$``, no ``\\boxed``), as verdicts compare it.
        source: where it comes from, such as ``arithmetic/train`` or ``svamp/test``.
        id: unique within its source.
        solution: a worked solution if the source has one (supervised warm-up trains on it), else ``""``.
        scorer: who judges an answer that is not ``answer`` itself, as JSON for a worker process; ``""`` for comparison.
        theme: what the question is about, where the source says so (``bus``, ``garden``), else ``""``.
    """

    question: str
    answer: str
    source: str
    id: str
    solution: str = ""
    scorer: str = ""
    theme: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the verifier found.

    Attributes:
        reward: 1.0 if the extracted answer equals the gold answer, else 0.0.
        extracted: the one candidate that was compared, ``""`` if there was none.
        status: one word of ``STATUSES``.
    """

    reward: float
    extracted: str
    status: str


STATUSES = ("right", "wrong", "no_answer", "malformed", "timeout", "unsupported")


class Problems(Protocol):
    """A source of problems with random access. ``size`` is None for an unlimited (generated) source, whose every
    index from 0 is a problem."""

    name: str
    size: int | None

    def __getitem__(self, index: int) -> Problem: ...
