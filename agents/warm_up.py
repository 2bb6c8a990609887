"""Warms up any pretrained policy on worked solutions: ReFT's supervised first stage (arXiv 2401.08967, section 3.1).

    python -m agents.warm_up --policy DIR --env MathReason/svamp-v0 --epochs 2 --out runs/warm

A few epochs of cross-entropy on the worked solutions of the training split teach the format that the verifier reads.
The reinforced stage then starts from the folder that this command writes (``--policy runs/warm``). A source without
worked solutions cannot be used. The built-in tiny model has a command of its own, ``python -m agents.train_tiny``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import envs  # noqa: F401 (registers the env ids)
from agents.supervised import descend
from envs.task import Task, TaskSpec
from policies import LayerSubset, Policy
from policies.nested import without
from registry import UnknownField, UsageError, fields_of, parse_value
from registry.command import assignment, command


@dataclass(frozen=True)
class SupervisedWarmup:
    """Hyper-parameters of the warm-up.

    Attributes:
        epochs: passes over the training split.
        batch: demonstrations per optimizer step.
        learning_rate: peak of AdamW, after 10 % of the steps, then falling linearly to zero.
        problems: how many problems of the split, its first ones; 0 for all (an unlimited source needs a number).
        skip: the chance that a step leaves out layers, 1 to a fifth of them, uniformly drawn but for the first and the
            last (stochastic depth, arXiv 1603.09382), so that nested subsets stay usable.
        seed: of the order and of the layers left out.
    """

    epochs: int = 2
    batch: int = 16
    learning_rate: float = 2e-5
    problems: int = 0
    skip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.problems < 0 or not 0 <= self.skip <= 1 or self.learning_rate <= 0:
            raise UsageError(f"{self}: epochs, batch and learning_rate must be positive, problems >= 0, skip in [0, 1]")


def demonstrations(task: Task, count: int) -> list[tuple[Tensor, Tensor]]:
    """(prompt, completion) token ids of the worked solutions as the template has them (``Codec.demonstration``),
    over-long ones left out.

    Raises:
        UsageError: an unlimited source without a count, no worked solution, or one that would not be right: its
            completion ends early, or its answer is not the gold answer.
    """
    size = task.problems.size
    if size is None and not count:
        raise UsageError(f"{task.problems.name} is unlimited: say how many problems with problems=N")
    completions = {}
    for index in range(min(size or count, count or size or 0)):
        problem = task.problem(index)
        if not problem.solution:
            raise UsageError(
                f"problem {index} of {task.problems.name} has no worked solution to learn from; use a source that has"
            )
        completion = task.codec.demonstration(problem.solution, problem.answer)
        if len(completion) <= task.spec.max_new_tokens:
            completions[index] = completion
    if not completions:
        raise UsageError(f"no solution fits max_new_tokens={task.spec.max_new_tokens}: raise it")
    _check_right(task, completions)
    return [(torch.as_tensor(task.prompt(n)), torch.as_tensor(completion)) for n, completion in completions.items()]


def _check_right(task: Task, completions: dict[int, NDArray[np.int64]]) -> None:
    """Raise ``UsageError`` for demonstrations, by index of the problem, that an episode would not end with or that
    would earn nothing."""
    verdicts = {index: task.verdict(completion, index) for index, completion in completions.items()}
    faults = {}
    for index, future in verdicts.items():
        verdict, completion = future.result(), completions[index]
        if verdict.reward < 1:
            faults[index] = f"is {verdict.status} (answer {verdict.extracted!r}, gold {task.problem(index).answer!r})"
        elif not task.codec.ends_once(completion):
            faults[index] = "holds what ends a completion before its end"
    if faults:
        index, fault = next(iter(faults.items()))
        raise UsageError(
            f"{len(faults)} of {len(completions)} worked solutions of {task.problems.name} are no demonstration under "
            f"template {task.spec.template!r}: that of problem {task.problem(index).id} {fault}; mend or leave out "
            f"problems {', '.join(task.problem(n).id for n in list(faults)[:10])}{', ...' if len(faults) > 10 else ''}"
        )


def warm_up(policy: Policy, task: Task, spec: SupervisedWarmup) -> list[float]:
    """Train in place; returns the loss of each step in nats per token."""
    policy.check_length(task.max_length)
    pairs = demonstrations(task, spec.problems)
    per_epoch = -(-len(pairs) // spec.batch)
    steps = spec.epochs * per_epoch
    weights = list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=0.0, fused=True)
    return descend(
        _losses(policy, pairs, per_epoch, spec), weights, [optimizer], steps=steps, rise=steps // 10, last=0.0
    )


def _losses(
    policy: Policy, pairs: list[tuple[Tensor, Tensor]], per_epoch: int, spec: SupervisedWarmup
) -> Iterator[Tensor]:
    """The mean cross-entropy per completion token of each batch; the caller steps before it asks for the next."""
    rng = np.random.default_rng(spec.seed)
    for _ in range(spec.epochs):
        for chosen in np.array_split(rng.permutation(len(pairs)), per_epoch):
            completions = [pairs[i][1] for i in chosen]
            tokens = pad_sequence(completions, batch_first=True)
            mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(c)] for c in completions])
            layers = draw_layers(policy.num_layers, spec.skip, rng)
            yield -policy.logprobs([pairs[i][0] for i in chosen], tokens, mask, layers=layers).sum() / mask.sum()
            policy.refresh()  # a step was taken


def draw_layers(num_layers: int, skip: float, rng: np.random.Generator) -> LayerSubset:
    """All layers, or with the chance ``skip`` all but 1 to a fifth of them, drawn between the first and the last."""
    if rng.random() < skip and num_layers > 4:
        count = int(rng.integers(1, max(2, num_layers // 5 + 1)))
        return without(rng.choice(range(1, num_layers - 1), size=count, replace=False).tolist(), num_layers)
    return tuple(range(num_layers))


@command(interrupted="nothing was written")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (2 on bad input)."""
    parser = argparse.ArgumentParser(prog="python -m agents.warm_up", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--policy", required=True, help="a Hugging Face folder or hub id")
    parser.add_argument("--env", default="MathReason-v0", help="environment id whose training split is learnt from")
    parser.add_argument("--env-set", action="append", default=[], metavar="NAME=VALUE", help="environment arguments")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matrix products")
    parser.add_argument("--threads", type=int, help="CPU threads")
    known = fields_of(SupervisedWarmup)
    for name, field in known.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=field.type, default=field.default)
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    spec = SupervisedWarmup(**{name: getattr(given, name) for name in known})
    policy = Policy.load(given.policy, dtype=given.dtype)
    task = gym.make(given.env, **_env_arguments(given, policy)).unwrapped.task  # type: ignore[attr-defined]
    losses = warm_up(policy, task, spec)
    given.out.mkdir(parents=True, exist_ok=True)
    policy.save(given.out)
    task.codec.save(given.out)
    tenth = max(1, len(losses) // 10)
    print(f"{len(losses)} steps, {np.mean(losses[:tenth]):.3f} -> {np.mean(losses[-tenth:]):.3f} nats per token")
    print(given.out)
    return 0


def _env_arguments(given: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    kinds = fields_of(TaskSpec)
    arguments: dict[str, Any] = {"tokenizer": given.policy, "vocab_size": policy.vocab_size}
    for name, text in (assignment(text, "--env-set") for text in given.env_set):
        if name not in kinds:
            raise UnknownField("--env-set", name, kinds)
        arguments[name] = parse_value(text, kinds[name].type, name)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
