"""Tasks of reasoning-gym (optional extra) as problem sets: ``reasoning_gym:<task>``.

Many of its tasks have more than one right answer and bring their own scorer. A completion's candidate is extracted as
always; unless it is the entry's own answer, a worker process then makes the entry again from (task, seed, index) and
asks the scorer, which is third-party code on untrusted text, under the same deadline and memory limit as everything
symbolic. Only a full score is right.
"""

from __future__ import annotations

import json
from typing import Any

from envs.problem import Problem
from envs.verifier.scorers import entries
from registry import UnknownName, UsageError

DEFAULT_SIZE = 1000
TEST_SEED_OFFSET = 1 << 40
"""Entry ``index`` is drawn with seed + index, so the test split starts far from every training seed."""


class ReasoningGym:
    """One task with random access.

    Args:
        task: name of the task.
        split: ``train`` or ``test``: disjoint seeds, not necessarily disjoint contents.
        size: number of problems.
        seed: of the first problem.
        options: the task's own configuration.
    """

    def __init__(self, task: str, split: str, size: int, seed: int, options: dict[str, Any]) -> None:
        if split not in ("train", "test"):
            raise UsageError(f"reasoning_gym has no split {split!r}; choose 'train' or 'test'")
        self.name = f"reasoning_gym:{task}/{split}"
        self.size: int | None = size
        first = seed + (TEST_SEED_OFFSET if split == "test" else 0)
        self._recipe = {"task": task, "size": size, "seed": first, "options": options}
        try:
            self._entries = entries(json.dumps(self._recipe, sort_keys=True))
        except (TypeError, AssertionError, ValueError) as error:
            raise UsageError(f"reasoning_gym task {task!r} refuses its options {options}: {error}") from error

    def __getitem__(self, index: int) -> Problem:
        entry = self._entries[index]
        scorer = json.dumps({**self._recipe, "index": index}, sort_keys=True)
        answer = "" if entry["answer"] is None else str(entry["answer"])  # some tasks have only a scorer
        return Problem(entry["question"].strip(), answer, self.name, str(index), scorer=scorer)


def reasoning_gym_problems(task: str, split: str, options: dict[str, Any]) -> ReasoningGym:
    """The problems of a task; ``size`` and ``seed`` among the options are ours, the others the task's."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        remedy = "pip install 'nested-reft[reasoning-gym]'"
        raise UsageError(f"reasoning_gym:{task} needs the optional extra: {remedy}") from error
    if task not in DATASETS:
        raise UnknownName("reasoning_gym task", task, DATASETS)
    options = dict(options)
    size, seed = options.pop("size", None) or options.pop("limit", DEFAULT_SIZE), options.pop("seed", 0)
    return ReasoningGym(task, split, size, seed, options)
