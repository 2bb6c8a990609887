"""Which differences a comparison will tell apart, before it runs: by how finished runs of the same shape differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring.statistics import Components
from benchmarks.measuring.table import Table

POINTS = (3, 2, 1)
MOST_SEEDS = 100
MORE_QUESTIONS = (1, 2, 4)  # times as many as planned
UNKNOWN = (
    "resolution: unknown, since no two finished arms of these shapes have two seeds and their questions in common; a "
    "comparison of two seeds tells it"
)


@dataclass(frozen=True)
class Answers:
    """What a finished run got right at its end: 0 or 1 for each question."""

    agent: str
    seed: int
    right: str


def components_of(finished: Iterable[Answers]) -> Components | None:
    """Variances of paired differences between arms, over all pairs of arms with two seeds or more in common; None
    without such a pair."""
    by_arm: dict[str, dict[int, str]] = {}
    for run in finished:
        by_arm.setdefault(run.agent, {})[run.seed] = run.right
    arms = list(by_arm.values())
    pairs = [(one, other) for n, one in enumerate(arms) for other in arms[n + 1 :]]
    measured = [parts for one, other in pairs if (parts := _components(one, other)) is not None]
    return Components(*np.mean(measured, axis=0).tolist()) if measured else None


def _components(one: dict[int, str], other: dict[int, str]) -> Components | None:
    seeds = sorted(seed for seed in set(one) & set(other) if len(one[seed]) == len(other[seed]))
    if len(seeds) < 2:
        return None
    ours, theirs = (
        np.array([[bit == "1" for bit in arm[seed]] for seed in seeds], dtype=float) for arm in (one, other)
    )
    return Components.of(ours - theirs)


def seeds_needed(components: Components, questions: int, points: float) -> int | None:
    """The fewest seeds whose interval is at most +- ``points`` wide; None where ``MOST_SEEDS`` are not enough."""
    enough = (n for n in range(2, MOST_SEEDS + 1) if 100 * components.half_width(n, questions) <= points)
    return next(enough, None)


def resolution(components: Components, seeds: int, questions: int) -> tuple[str, Table]:
    """What the planned seeds and questions will tell apart, and what it takes to tell less apart."""
    if seeds < 2:
        said = "one seed tells nothing of how runs differ"
    else:
        half = 100 * components.half_width(seeds, questions)
        said = f"{seeds} seeds of {questions} questions tell an arm from another to about +-{half:.1f} points"
    heads = ["to +- points", *(f"seeds of {more * questions} questions" for more in MORE_QUESTIONS)]
    rows = [[str(points), *_needed(components, questions, points)] for points in POINTS]
    return f"{said} (95 %, from how finished runs differ); needed:", Table(heads, rows, left=())


def _needed(components: Components, questions: int, points: float) -> Sequence[str]:
    counts = (seeds_needed(components, more * questions, points) for more in MORE_QUESTIONS)
    return [f"over {MOST_SEEDS}" if count is None else str(count) for count in counts]
