"""Right or wrong on held-out problems, question by question."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.distributed import ALONE, Ranks
from agents.rollout import Rollout, collect
from envs.problems import has_one_split
from envs.task import Task
from envs.vector import MathReasonVector
from policies import Policy
from registry import UsageError

SLOTS = 256
SHOWN = 12  # completions kept as text, of the first questions


@dataclass(frozen=True)
class Accuracy:
    """Right or wrong per question and completion.

    Attributes:
        right: [questions, completions] bool.
        lengths: [questions, completions] completion tokens.
        statuses: how often each verdict status came up.
        rollout: the completions themselves.
    """

    right: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    statuses: dict[str, int]
    rollout: Rollout

    @property
    def mean(self) -> float:
        """Share of right completions (avg@k)."""
        return float(self.right.mean())

    @property
    def bits(self) -> str:
        """Right (1) or wrong (0) per question, in order, of the first completion."""
        return "".join("1" if right else "0" for right in self.right[:, 0])

    def summary(self) -> dict[str, Any]:
        """JSON-able: greedy accuracy, verdicts, every question's outcome and the mean length in tokens."""
        return {
            "greedy": self.mean,
            "statuses": dict(sorted(self.statuses.items())),
            "right": self.bits,
            "mean_length": float(self.lengths.mean()),
        }


class HeldOut:
    """The first problems of a split, kept loaded between evaluations; verdicts are always the true ones. The processes
    of a run share the work, and each knows all answers."""

    def __init__(self, task: Task, count: int, ranks: Ranks = ALONE, slots: int = SLOTS, **changes: Any) -> None:
        spec = replace(task.spec, reward="verified", **changes)
        self.ranks = ranks
        self.envs = MathReasonVector(num_envs=min(slots, -(-count // ranks.size)), copy=False, **asdict(spec))
        self.task: Task = self.envs.task
        size = self.task.problems.size
        self.problems = list(range(count if size is None else min(count, size)))

    def __call__(self, policy: Policy, samples: int = 1, temperature: float = 0.0, seed: int = 0) -> Accuracy:
        """Greedy accuracy (temperature 0, one sample) or sampled accuracy of the full model."""
        mu = policy.behavior(
            tuple(range(policy.num_layers)),
            slots=self.envs.num_envs,
            max_length=self.task.max_length,
            temperature=temperature,
            seed=seed,
        )

        def write(problems: list[int], first_group: int) -> Rollout:
            return collect(mu, self.envs, problems, samples, first_group=first_group)

        rollout = self.ranks.rollout(write, self.problems)
        right = np.array([info["is_success"] for info in rollout.episodes]).reshape(-1, samples)
        statuses: dict[str, int] = {}
        for info in rollout.episodes:
            statuses[info["status"]] = statuses.get(info["status"], 0) + 1
        return Accuracy(right, rollout.mask.sum(1).numpy().reshape(-1, samples), statuses, rollout)

    def shown(self, accuracy: Accuracy) -> list[dict[str, Any]]:
        """The first questions with their completions, as text, why these ended, and the verdicts."""
        rollout, shown = accuracy.rollout, []
        for n, index in enumerate(self.problems[:SHOWN]):
            row = n * accuracy.right.shape[1]
            problem = self.task.problem(index)
            completion = self.task.text(rollout.tokens[row][rollout.mask[row]].numpy())
            info = rollout.episodes[row]
            shown.append(
                {
                    "question": problem.question,
                    "answer": problem.answer,
                    "completion": completion,
                    "extracted": str(info["extracted"]),
                    "status": str(info["status"]),
                    "finish": str(info["finish_reason"]),
                    "tokens": int(info["response_len"]),
                }
            )
        return shown


def shared_options(task: Task, split: str) -> dict[str, Any]:
    """The options of a task's problem source that hold for another of its splits too."""
    own = {"subset", "limit"}  # of the problems trained on alone
    if split != task.spec.split and not has_one_split(task.spec.problems):
        own.add("omit")  # it numbers the rows of a split
    return {name: value for name, value in task.spec.problem_options.items() if name not in own}


def refuse_overlap(task: Task, held_out: HeldOut) -> None:
    """Raise ``UsageError`` where all held-out problems are also trained on (a file without splits); warn of some."""
    if task.problems.size is None:
        return  # generated problems are split by content
    trained = {task.problems[index].question for index in range(task.problems.size)}
    seen = sum(held_out.task.problem(index).question in trained for index in held_out.problems)
    if seen == len(held_out.problems):
        raise UsageError(
            f"all {seen} held-out problems of {held_out.task.problems.name} are also trained on: train on a part "
            "(env.problem_options.subset=:700) and hold out the rest (evaluation.subset=700:), or give another set "
            "(evaluation.source=FILE)"
        )
    if seen:
        warnings.warn(f"{seen} of {len(held_out.problems)} held-out problems are also trained on", stacklevel=3)
