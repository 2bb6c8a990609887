"""Completions with their verdicts, a line of JSON each, written as they come; a kill loses none that is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from benchmarks.measuring.durable import json_text, storage_errors

GREEDY, SAMPLED = "greedy", "sampled"
Place = tuple[int, int]
"""A problem's number in its set, and which of its completions."""


@dataclass(frozen=True)
class Answer:
    """One completion.

    Attributes:
        kind: ``greedy`` or ``sampled``.
        problem: its number in the set, from 0.
        id: the problem's own name.
        sample: which of the problem's completions of that kind it is, from 0.
        right: whether the verifier says so.
        status: of the verdict, a word of ``envs.problem.STATUSES``.
        extracted: the answer that was judged.
        tokens: of the completion; None where a server does not tell.
        finish: ``eos``, ``stop`` or ``length``, or what a server says.
        completion: its text.
    """

    kind: str
    problem: int
    id: str
    sample: int
    right: bool
    status: str
    extracted: str
    tokens: int | None
    finish: str
    completion: str

    @property
    def place(self) -> tuple[str, int, int]:
        """What it answers."""
        return self.kind, self.problem, self.sample


Keep = Callable[[Answer], None]


class Answers:
    """Those of one problem set, in a file; in memory without their texts.

    Args:
        path: of the JSON lines; what a kill left half-written is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, int, int], Answer] = {}
        self._whole = 0  # bytes of whole lines
        for line in path.open("rb") if path.is_file() else ():
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError):
                break
            self._whole += len(line)
            self._remember(answer)
        self._file: TextIO | None = None

    def _remember(self, answer: Answer) -> None:
        self._known[answer.place] = replace(answer, completion="")

    @contextmanager
    def open(self) -> Iterator[Answers]:
        """With the file open for further answers."""
        with storage_errors(self.path.parent, "--out"):
            self._file = self.path.open("a", encoding="utf-8")
            self._file.truncate(self._whole)
        with self._file:
            yield self
        self._file = None

    def add(self, answer: Answer) -> None:
        """Keep an answer."""
        assert self._file is not None
        with storage_errors(self.path.parent, "--out"):
            self._file.write(json_text(asdict(answer)) + "\n")
            self._file.flush()
        self._remember(answer)

    def __len__(self) -> int:
        return len(self._known)

    def missing(self, kind: str, problems: int, samples: int) -> list[Place]:
        """(problem, sample) of every answer that is not there."""
        every = ((problem, sample) for problem in range(problems) for sample in range(samples))
        return [place for place in every if (kind, *place) not in self._known]

    def of(self, kind: str) -> list[Answer]:
        """Those of a kind, by problem and sample."""
        return sorted((one for one in self._known.values() if one.kind == kind), key=lambda one: one.place)
