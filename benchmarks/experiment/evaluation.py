"""Accuracy on held-out problems, question by question."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.distributed import ALONE, Ranks
from agents.rollout import Rollout, collect
from benchmarks.experiment.spec import EvaluationSpec
from envs.problems import has_one_split, source_of
from envs.task import Task
from envs.vector import MathReasonVector
from policies import Policy
from registry import UsageError, fields_of

SLOTS = 256
SAMPLED_TEMPERATURE = 1.0
SHOWN = 6  # completions kept as text


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

    def shown(self, accuracy: Accuracy) -> list[dict[str, str]]:
        """The first questions with their completions and verdicts, as text."""
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
                }
            )
        return shown


class Evaluator:
    """What a run measures: the held-out split of its own problems, and further sets beside it."""

    def __init__(self, task: Task, spec: EvaluationSpec, ranks: Ranks = ALONE, slots: int = SLOTS) -> None:
        self.spec = spec
        own = {"subset", "limit"}  # options that are of the problems trained on alone
        if spec.split != task.spec.split and not has_one_split(task.spec.problems):
            own.add("omit")  # it numbers the rows of a split
        options = {name: value for name, value in task.spec.problem_options.items() if name not in own}
        chosen = dict(options) if spec.source is None else _options(options, spec, spec.source)
        if spec.subset is not None:
            chosen["subset"] = spec.subset
        source = spec.source or task.spec.problems
        self.own = HeldOut(task, spec.problems, ranks, slots, problems=source, split=spec.split, problem_options=chosen)
        self.further = {
            name: HeldOut(
                task,
                spec.problems,
                ranks,
                slots,
                problems=name,
                split="test",
                problem_options=_options(options, spec, name),
            )
            for name in spec.sets
        }
        _refuse_overlap(task, self.own)

    def glance(self, policy: Policy) -> dict[str, Any]:
        """Greedy accuracy, for the learning curve."""
        return _greedy(self.own(policy))

    def measure(self, policy: Policy, seed: int) -> dict[str, Any]:
        """Greedy and sampled accuracy, the further sets (greedy), and some completions. The same seed before and
        after training: the two differ by the weights alone."""
        greedy = self.own(policy)
        drawn = self.own(policy, self.spec.samples, SAMPLED_TEMPERATURE, seed)
        return {
            **_greedy(greedy),
            "sampled": drawn.mean,
            "sampled_right": drawn.right.sum(1).tolist(),
            "sets": {name: _greedy(held_out(policy)) for name, held_out in self.further.items()},
            "shown": self.own.shown(greedy),
        }


def _options(options: dict[str, Any], spec: EvaluationSpec, source: str) -> dict[str, Any]:
    """The options of another set: its own, and the one that it shares with the training set, where it has it."""
    shared = {"data_dir"} & set(options) & set(fields_of(type(source_of(source))))
    return {**{name: options[name] for name in shared}, **spec.problem_options.get(source, {})}


def _refuse_overlap(task: Task, held_out: HeldOut) -> None:
    """A file without splits would be tested on what it is trained on."""
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


def _greedy(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "greedy": accuracy.mean,
        "statuses": dict(sorted(accuracy.statuses.items())),
        "right": accuracy.bits,
        "mean_length": float(accuracy.lengths.mean()),
    }
