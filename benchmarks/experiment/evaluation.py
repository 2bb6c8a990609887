"""What a run measures on held-out problems."""

from __future__ import annotations

from typing import Any

from agents.distributed import ALONE, Ranks
from benchmarks.experiment.held_out import SLOTS, HeldOut, refuse_overlap, shared_options
from benchmarks.experiment.spec import EvaluationSpec
from envs.problems import source_of
from envs.task import Task
from policies import Policy
from registry import fields_of

SAMPLED_TEMPERATURE = 1.0


class Evaluator:
    """What a run measures: the held-out split of its own problems, and further sets beside it."""

    def __init__(self, task: Task, spec: EvaluationSpec, ranks: Ranks = ALONE, slots: int = SLOTS) -> None:
        self.spec = spec
        options = shared_options(task, spec.split)
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
        refuse_overlap(task, self.own)

    def glance(self, policy: Policy) -> dict[str, Any]:
        """Greedy accuracy, for the learning curve, and the first completions."""
        greedy = self.own(policy)
        return {**greedy.summary(), "shown": self.own.shown(greedy)}

    def measure(self, policy: Policy, seed: int) -> dict[str, Any]:
        """Greedy and sampled accuracy, the further sets (greedy), and the first completions. The same seed before and
        after training: the two differ by the weights alone."""
        greedy = self.own(policy)
        drawn = self.own(policy, self.spec.samples, SAMPLED_TEMPERATURE, seed)
        return {
            **greedy.summary(),
            "sampled": drawn.mean,
            "sampled_right": drawn.right.sum(1).tolist(),
            "sets": {name: held_out(policy).summary() for name, held_out in self.further.items()},
            "shown": self.own.shown(greedy),
        }


def _options(options: dict[str, Any], spec: EvaluationSpec, source: str) -> dict[str, Any]:
    """The options of another set: its own, and the one that it shares with the training set, where it has it."""
    shared = {"data_dir"} & set(options) & set(fields_of(type(source_of(source))))
    return {**{name: options[name] for name in shared}, **spec.problem_options.get(source, {})}
