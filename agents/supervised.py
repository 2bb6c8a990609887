"""What supervised training is made of: demonstrations, the order in which steps see them, the clipped step.

``agents.sft`` trains any policy so, ``agents.train_tiny`` the built-in model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from envs.task import UNLIMITED, Task
from policies import LayerSubset
from policies.nested import without
from registry import UsageError

MOST_TRIED = 1000  # problems of an unlimited source that a step looks at for solutions that fit


class Demonstration(NamedTuple):
    """Token ids, int64, of a prompt [P] and of a completion [T] that is right and ends."""

    prompt: Tensor
    completion: Tensor


class Batch(NamedTuple):
    """What one optimizer step learns from, and the layers that it goes through."""

    demonstrations: list[Demonstration]
    layers: LayerSubset


def clipped_step(
    parameters: Sequence[nn.Parameter], optimizers: Iterable[Optimizer], number: int, loss: float, max_norm: float = 1.0
) -> float:
    """Clip the gradients of ``parameters`` together, step ``optimizers`` and drop the gradients; returns the norm of
    before. ``number`` and ``loss`` are what the error says.

    Raises:
        UsageError: the gradient is not finite; nothing was changed.
    """
    norm = float(clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(norm):
        raise UsageError(
            f"supervised step {number}: loss {loss:g}, gradient norm {norm:g}. No step was taken with it: the weights "
            "are those of before. Lower the learning rate or take float32, and start again or go on from the last "
            "checkpoint"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def demonstrations(task: Task, count: int) -> list[Demonstration]:
    """The worked solutions of the first ``count`` problems (0: all) as the template has them
    (``Codec.demonstration``), over-long ones left out.

    Raises:
        UsageError: an unlimited source without a count, no worked solution, or one that would not be right: its
            completion ends early, or its answer is not the gold answer.
    """
    size = task.problems.size
    if size is None and not count:
        raise UsageError(f"{task.problems.name} is unlimited: say how many problems with problems=N")
    return demonstrations_of(task, range(min(size or count, count or size or 0)))


def demonstrations_of(task: Task, indices: Iterable[int]) -> list[Demonstration]:
    """As ``demonstrations``, of the problems at ``indices``."""
    return _checked(task, _fitting(task, indices))


def _fitting(task: Task, indices: Iterable[int]) -> dict[int, NDArray[np.int64]]:
    """Completions of the problems at ``indices``, by index, over-long ones left out."""
    completions = {}
    for index in indices:
        problem = task.problem(index)
        if not problem.solution:
            raise UsageError(
                f"problem {index} of {task.problems.name} has no worked solution to learn from; use a source that has"
            )
        completion = task.codec.demonstration(problem.solution, problem.answer)
        if len(completion) <= task.spec.max_new_tokens:
            completions[index] = completion
    return completions


def _checked(task: Task, completions: dict[int, NDArray[np.int64]]) -> list[Demonstration]:
    """Demonstrations of ``completions`` by index. Raises UsageError for none, or for one that would not be right."""
    if not completions:
        raise UsageError(f"no solution fits max_new_tokens={task.spec.max_new_tokens}: raise it")
    _check_right(task, completions)
    return [
        Demonstration(torch.as_tensor(task.prompt(n)), torch.as_tensor(completion))
        for n, completion in completions.items()
    ]


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


class Batches:
    """The batch of each step by its number, so that a run that goes on sees what it would have seen.

    Of a known number of problems each epoch is one pass in random order. Of an unlimited source, where no number is
    given, every step has fresh problems, as many as fit of ``MOST_TRIED``.

    Args:
        task: whose worked solutions are shown.
        problems: how many, the first of the split; 0 for all.
        size: demonstrations a step.
        num_layers: L.
        skip: the chance that a step leaves layers out (``draw_layers``).
        seed: of order, fresh problems and layers.
        across: whether a step that the end of an epoch would leave with fewer than ``size`` goes on into the next; else
            the steps of an epoch are of nearly equal size.
    """

    def __init__(
        self, task: Task, problems: int, size: int, num_layers: int, skip: float, seed: int, across: bool = False
    ) -> None:
        self.task = task
        self.size = size
        self.num_layers = num_layers
        self.skip = skip
        self.seed = seed
        self.across = across
        endless = task.problems.size is None and not problems
        self.known = [] if endless else demonstrations(task, problems)
        if endless:
            self._fresh(0)  # a source without worked solutions is refused before anything is trained
        self._order, self._next = self._epochs(), 0

    @property
    def per_epoch(self) -> int | None:
        """Steps of one pass; None where problems never repeat."""
        return -(-len(self.known) // self.size) if self.known else None

    def __getitem__(self, step: int) -> Batch:
        if not self.known:
            return self._fresh(step)
        if step < self._next:
            self._order, self._next = self._epochs(), 0
        for chosen, layers in self._order:
            self._next += 1
            if self._next > step:
                return Batch([self.known[i] for i in chosen], layers)
        raise AssertionError("epochs do not end")

    def _epochs(self) -> Iterator[tuple[NDArray[np.int64], LayerSubset]]:
        """Positions in ``known`` and layers, step by step, without end."""
        rng = np.random.default_rng(self.seed)
        size, rest = min(self.size, len(self.known)), np.zeros(0, dtype=np.int64)
        while True:
            order = rng.permutation(len(self.known))
            if self.across:
                whole = np.concatenate([rest, order])
                *steps, rest = np.split(whole, range(size, len(whole) + 1, size))
            else:
                steps = np.array_split(order, self.per_epoch or 1)
            for chosen in steps:
                yield chosen, draw_layers(self.num_layers, self.skip, rng)

    def _fresh(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        fitting: dict[int, NDArray[np.int64]] = {}
        for _ in range(0, max(self.size, MOST_TRIED), self.size):
            fitting |= _fitting(self.task, rng.integers(UNLIMITED, size=self.size).tolist())
            if len(fitting) >= self.size:
                break
        chosen = _checked(self.task, dict(islice(fitting.items(), self.size)))
        return Batch(chosen, draw_layers(self.num_layers, self.skip, rng))


def draw_layers(num_layers: int, skip: float, rng: np.random.Generator) -> LayerSubset:
    """All layers, or with the chance ``skip`` all but 1 to a fifth of them, uniformly drawn but for the first and the
    last: stochastic depth (arXiv 1603.09382), so that nested subsets stay usable."""
    if rng.random() < skip and num_layers > 4:
        count = int(rng.integers(1, max(2, num_layers // 5 + 1)))
        return without(rng.choice(range(1, num_layers - 1), size=count, replace=False).tolist(), num_layers)
    return tuple(range(num_layers))
