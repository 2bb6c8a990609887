"""Accuracy on held-out problems, question by question."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.rollout import collect
from envs.vector import MathReasonVector
from policies import Policy

SLOTS = 256


@dataclass(frozen=True)
class Accuracy:
    """Right or wrong per question and completion.

    Attributes:
        right: [questions, completions] bool.
        lengths: [questions, completions] completion tokens.
        statuses: how often each verdict status came up.
    """

    right: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    statuses: dict[str, int]

    @property
    def mean(self) -> float:
        """Share of right completions (avg@k)."""
        return float(self.right.mean())


class Evaluator:
    """The held-out problems of a run, kept loaded between evaluations."""

    def __init__(self, task: Any, split: str, problems: int) -> None:
        spec = replace(task.spec, split=split)
        self.envs = MathReasonVector(num_envs=min(SLOTS, problems), copy=False, **asdict(spec))
        size = self.envs.task.problems.size
        self.problems = list(range(problems if size is None else min(problems, size)))

    def __call__(self, policy: Policy, samples: int = 1, temperature: float = 0.0, seed: int = 0) -> Accuracy:
        """Greedy accuracy (temperature 0, one sample) or sampled accuracy of the full model."""
        mu = policy.nested(
            tuple(range(policy.num_layers)),
            slots=self.envs.num_envs,
            max_length=self.envs.task.max_length,
            temperature=temperature,
            seed=seed,
        )
        rollout = collect(mu, self.envs, self.problems, samples)
        right = np.array([info["is_success"] for info in rollout.episodes]).reshape(-1, samples)
        statuses: dict[str, int] = {}
        for info in rollout.episodes:
            statuses[info["status"]] = statuses.get(info["status"], 0) + 1
        return Accuracy(right, rollout.mask.sum(1).numpy().reshape(-1, samples), statuses)
