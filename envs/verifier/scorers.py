"""Scorers of third parties, called in the worker process: a task's own judge of a candidate."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

_PYTHON = re.compile(r"__|\.\s*[A-Za-z_]|\b(?:import|lambda|exec|eval|open|getattr|globals|compile|input|print)\b")


@lru_cache(maxsize=32)
def entries(recipe: str) -> Any:
    """The data set that a recipe (JSON) describes."""
    import reasoning_gym

    parts = json.loads(recipe)
    return reasoning_gym.create_dataset(parts["task"], size=parts["size"], seed=parts["seed"], **parts["options"])


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
