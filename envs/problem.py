"""The nouns of the environment: a problem, a verdict on a completion, and a source of problems.

A problem travels as an ``int``, its index into its source: decks, infos and rollouts carry the index, and the source
gives the text where that is needed. It is called ``index`` beside its source and ``problem_index`` elsewhere.
"""

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
        alternatives: further accepted answers, where a source lists several spellings or roundings; any one is right.
        theme: what the question is about, where the source says so (``bus``, ``garden``), else ``""``.

    >>> Problem(question="How much is 3 * 4?", answer="12", source="mine/train", id="0").answer
    '12'
    """

    question: str
    answer: str
    source: str
    id: str
    solution: str = ""
    scorer: str = ""
    theme: str = ""
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of a completion.

    Attributes:
        reward: 1.0 if the extracted answer equals the gold answer, else 0.0.
        extracted: the one candidate that was compared, ``""`` if there was none.
        status: one word of ``STATUSES``.

    >>> from envs.verifier import verify
    >>> verify("3 * 4 = 12. #### 12", Problem("How much is 3 * 4?", "12", "mine/train", "0"))
    Verdict(reward=1.0, extracted='12', status='right')
    """

    reward: float
    extracted: str
    status: str


PENDING = Verdict(0.0, "", "pending")
"""Stands for a verdict that a worker is still busy with, where it was asked not to wait (a deck with ``defer``)."""

STATUSES = {
    "right": "the answer equals the gold answer",
    "wrong": "the answer can be read and is another",
    "no_answer": "the completion marks no answer",
    "malformed": "the answer cannot be read",
    "timeout": "the comparison took longer than its deadline",
    "unsupported": "the answer is too long, or its comparison cannot be computed",
    PENDING.status: "the verdict comes later",
}
"""Every status of a verdict, and what it says."""


class Problems(Protocol):
    """Problems with random access. ``size`` is None for unlimited (generated) ones, whose every index from 0 is a
    problem."""

    name: str
    size: int | None

    def __getitem__(self, index: int) -> Problem: ...
