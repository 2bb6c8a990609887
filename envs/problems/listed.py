"""Problems in a list: the gold answer of each can be read, and equal questions are reported."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from envs.problem import Problem, Problems
from registry import UsageError

DIGESTED = 64
"""Problems that tell a source that makes them from others."""


class ListedProblems:
    """A finite source, held in memory. Supports ``len``, indexing and iteration."""

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.name = name
        self.problems = tuple(problems)
        self.size: int | None = len(self.problems)

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)


def list_problems(name: str, problems: list[Problem], places: list[int]) -> ListedProblems:
    """``problems``, whose gold answers are checked, with ids that differ: to those that are shared the rows' numbers in
    the source, ``places``, are added. Warns of equal questions."""
    listed = ListedProblems(name, _with_unique_ids(problems, places))
    repeated = len(listed) - len({question_key(problem) for problem in listed})
    if repeated:
        warnings.warn(f"{repeated} of {len(listed)} problems of {name} repeat an earlier question", stacklevel=5)
    return listed


def _with_unique_ids(problems: list[Problem], places: list[int]) -> list[Problem]:
    ids = [problem.id for problem in problems]
    while len(counts := Counter(ids)) < len(ids):  # again where an id with its number is another's own
        ids = [f"{id}#{place}" if counts[id] > 1 else id for id, place in zip(ids, places, strict=True)]
    return [one if one.id == id else replace(one, id=id) for one, id in zip(problems, ids, strict=True)]


def problem_digest(problems: Problems) -> str:
    """12 hex digits of what is asked and what is right, in order; of a source that makes its problems as they are asked
    for, of the first ones."""
    digest, made = hashlib.sha256(), not isinstance(problems, ListedProblems)
    size = DIGESTED if problems.size is None else problems.size
    for index in range(min(size, DIGESTED) if made else size):
        problem = problems[index]
        digest.update(f"{problem.question}\0{problem.answer}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


def question_key(problem: Problem) -> str:
    """What makes two questions the same: their words and numbers, whatever the case and spacing."""
    return " ".join(problem.question.split()).casefold()


def overlap(first: Problems, second: Problems) -> list[tuple[int, int]]:
    """Index pairs of equal questions in two finite sources."""
    places = {question_key(first[index]): index for index in range(_size(first))}
    keys = ((question_key(second[index]), index) for index in range(_size(second)))
    return [(places[key], index) for key, index in keys if key in places]


def duplicates(problems: Problems) -> list[tuple[int, int]]:
    """Index pairs (first occurrence, repetition) of equal questions in a finite source."""
    places: dict[str, int] = {}
    pairs = []
    for index in range(_size(problems)):
        first = places.setdefault(question_key(problems[index]), index)
        if first != index:
            pairs.append((first, index))
    return pairs


def _size(problems: Problems) -> int:
    if problems.size is None:
        raise UsageError(f"{problems.name} is unlimited, so it cannot be searched for repeated questions")
    return problems.size
