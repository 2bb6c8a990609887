"""Tasks of reasoning-gym (optional extra) as problem sets: ``reasoning_gym:<task>``.

Many of its tasks have more than one right answer and bring their own scorer. A completion's candidate is extracted as
always; unless it is the entry's own answer, a worker process then makes the entry again from (task, seed, index) and
asks the scorer, which is third-party code on untrusted text, under the same deadline and memory limit as everything
symbolic. Only a full score is right.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from envs.problem import Problem
from registry import UnknownName, UsageError

DEFAULT_SIZE = 1000
TEST_SEED_OFFSET = 1 << 40
"""Entry ``index`` is drawn with seed + index, so the test split starts far from every training seed."""
_PYTHON = re.compile(r"__|\.\s*[A-Za-z_]|\b(?:import|lambda|exec|eval|open|getattr|globals|compile|input|print)\b")


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


@lru_cache(maxsize=32)
def entries(recipe: str) -> Any:
    """The data set that a recipe (JSON) describes."""
    import reasoning_gym

    made = json.loads(recipe)
    return reasoning_gym.create_dataset(made["task"], size=made["size"], seed=made["seed"], **made["options"])


def score(scorer: str, candidate: str) -> bool:
    """Whether the task's own scorer gives the candidate full marks. Called in a worker process.

    Some scorers hand the answer to an expression evaluator, so text that could be a program is refused.
    """
    if _PYTHON.search(candidate):
        return False
    recipe = json.loads(scorer)
    index = recipe.pop("index")
    data = entries(json.dumps(recipe, sort_keys=True))
    return float(data.score_answer(candidate, data[index])) >= 1.0
