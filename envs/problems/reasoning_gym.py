"""Tasks of reasoning-gym (optional extra) as problem sets: ``reasoning_gym:<task>``.

Many of its tasks have more than one right answer and bring their own scorer. A completion's candidate is extracted as
always; unless it is the entry's own answer, a worker process then makes the entry again from (task, seed, index) and
asks the scorer, which is third-party code on untrusted text, under the same deadline and memory limit as everything
symbolic. Only a full score is right.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from envs.problem import Problem
from envs.problems.sources import check_limit
from envs.verifier.scorers import entries
from registry import UnknownName, UsageError, check_number

DEFAULT_SIZE = 1000
TEST_SEED_OFFSET = 1 << 40
"""Entry ``index`` is drawn with seed + index, so the test split starts far from every training seed."""


class ReasoningGym:
    """One task with random access. Supports ``len``, indexing and iteration, as every finite source does.

    Args:
        task: name of the task.
        split: ``train`` or ``test``: disjoint seeds, not necessarily disjoint contents.
        size: number of problems.
        seed: of the first problem.
        options: the task's own configuration.
    """

    def __init__(self, task: str, split: str, size: int, seed: int, options: Mapping[str, Any]) -> None:
        if split not in ("train", "test"):
            raise UsageError(f"reasoning_gym has no split {split!r}; choose 'train' or 'test'")
        self.name = f"reasoning_gym:{task}/{split}"
        self.size: int | None = size
        self._indices = range(size)
        first = seed + (TEST_SEED_OFFSET if split == "test" else 0)
        self._recipe = {"task": task, "size": size, "seed": first, "options": dict(options)}
        try:
            self._entries = entries(json.dumps(self._recipe, sort_keys=True))
        except (TypeError, AssertionError, ValueError) as error:
            raise UsageError(f"reasoning_gym task {task!r} refuses its options {dict(options)}: {error}") from error

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Problem]:
        return map(self.__getitem__, self._indices)

    def __getitem__(self, index: int) -> Problem:
        index = self._indices[operator.index(index)]  # the library's own sequences have no end
        entry = self._entries[index]
        scorer = json.dumps({**self._recipe, "index": index}, sort_keys=True)
        answer = "" if entry["answer"] is None else str(entry["answer"])  # some tasks have only a scorer
        return Problem(entry["question"].strip(), answer, self.name, str(index), scorer=scorer)


@dataclass(frozen=True, kw_only=True)
class ReasoningGymSource:
    """A task of reasoning-gym (optional extra), whose own scorer judges its answers.

    Attributes:
        task: name of the task.
        size: how many problems it has; None for ``limit``, or else 1000.
        seed: of the first problem.
        limit: at most this many problems.
        options: the task's own configuration.
    """

    task: str
    size: int | None = None
    seed: int = 0
    limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limit(self.limit)
        check_limit(self.size, "size")
        check_number(self.seed, int, "seed")

    def load(self, split: str) -> ReasoningGym:
        """The problems of a split. Raises ``UsageError``: no such task, or options that it refuses."""
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            remedy = "pip install 'nested-reft[reasoning-gym]'"
            raise UsageError(f"reasoning_gym:{self.task} needs the optional extra: {remedy}") from error
        if self.task not in DATASETS:
            raise UnknownName("reasoning_gym task", self.task, DATASETS)
        size = self.size or self.limit or DEFAULT_SIZE
        return ReasoningGym(self.task, split, int(min(size, self.limit or size)), int(self.seed), self.options)
