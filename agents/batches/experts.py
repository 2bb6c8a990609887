"""Worked solutions beside a batch's own completions: supervised and reinforced learning in one loss (CHORD, "On-Policy
RL Meets Off-Policy Experts", arXiv 2508.11408)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.batches.sources import Fresh, factors_of
from agents.rollout import Rollout
from agents.supervised import Batches
from envs.task import Task
from registry import UsageError, batches

TOKEN_WEIGHTS = ("phi", "one")


@batches.register("expert")
@dataclass(frozen=True)
class Expert(Fresh):
    """Every group is fresh; beside them the loss is of worked solutions, ``(1 - m) L - m sum coef * W * log pi`` over
    their tokens, with an advantage of 1 and ``W = p (1 - p)``, p = pi(y_t) detached (CHORD, arXiv 2508.11408).

    m, the paper's mu, is ``weight``, with CHORD-phi's token weights; or it rises from 0 to ``weight`` in ``warmup``
    iterations and falls by a cosine to ``valley`` in the ``decay`` after them, with token weights of 1 (CHORD-mu).
    Solutions are those of training problems in random order, ``solutions`` an iteration, shared out to its optimizer
    steps. They are not rolled out, so that they count neither as timesteps nor as tokens.

    Use: where worked solutions exist and rewards are rare at first.

    Attributes:
        weight: m at its peak, in [0, 1).
        valley: m after the decay.
        warmup: iterations.
        decay: iterations; 0 for a constant.
        tokens: ``phi`` for p (1 - p), which spares tokens that are sure or hopeless, or ``one``.
        solutions: how many an iteration, or all where there are fewer; at least as many as it has optimizer steps in an
            epoch: a step without a solution is of L alone, so that m would be a smaller share of the iteration's loss.
    """

    weight: float = 0.1
    valley: float = 0.0
    warmup: int = 0
    decay: int = 0
    tokens: str = "phi"
    solutions: int = 32

    def __post_init__(self) -> None:
        if not (0 <= self.weight < 1 and 0 <= self.valley <= 1):
            raise UsageError(
                f"expert: weight={self.weight} must be in [0, 1) and valley={self.valley} in [0, 1], shares of the loss"
            )
        if min(self.warmup, self.decay) < 0 or self.solutions < 1:
            raise UsageError(
                f"expert: warmup={self.warmup} and decay={self.decay} must be at least 0 iterations, and "
                f"solutions={self.solutions} at least 1"
            )
        if self.tokens not in TOKEN_WEIGHTS:
            raise UsageError(f"expert: tokens={self.tokens!r} must be one of {', '.join(TOKEN_WEIGHTS)}")

    def weight_at(self, iteration: int) -> float:
        """m of an iteration, counted from 0."""
        if iteration < self.warmup:
            return self.weight * (iteration + 1) / self.warmup
        if not self.decay:
            return self.weight
        spent = min(1.0, (iteration - self.warmup) / self.decay)
        return self.valley + (self.weight - self.valley) * (1 + math.cos(math.pi * spent)) / 2

    def token_weight(self, logp: Tensor) -> Tensor:
        """[B, T] W of log pi [B, T]."""
        p = logp.detach().exp()
        return p * (1 - p) if self.tokens == "phi" else torch.ones_like(p)


class Experts:
    """The worked solutions of an agent's iterations.

    Args:
        source: the agent's batch source, of which, or of whose factors, only ``Expert`` has solutions.
        task: whose problems they are of.
        num_layers: L of the target.
        seed: of their order.

    Attributes:
        weight: m of the present iteration; 0 where there are none.
        solutions: [B] of the present iteration, or None.

    Raises:
        UsageError: a source without worked solutions, or with one that would not be right.
    """

    def __init__(self, source: Any, task: Task, num_layers: int, seed: int) -> None:
        experts = [one for one in factors_of(source) if isinstance(one, Expert) and (one.weight or one.valley)]
        self.source = experts[0] if experts else None
        self.order = None
        if self.source:
            self.order = Batches(task, 0, self.source.solutions, num_layers, 0.0, seed, across=True)
        self.weight = 0.0
        self.solutions: Rollout | None = None

    def draw(self, iteration: int) -> None:
        """Take the solutions and the weight of an iteration, counted from 0."""
        if self.source is None or self.order is None:
            return
        self.weight = self.source.weight_at(iteration)
        pairs = self.order[iteration].demonstrations
        tokens = torch.nn.utils.rnn.pad_sequence([completion for _, completion in pairs], batch_first=True)
        length = torch.tensor([len(completion) for _, completion in pairs])
        self.solutions = Rollout(
            prompts=tuple(prompt for prompt, _ in pairs),
            tokens=tokens,
            mask=torch.arange(tokens.shape[1]) < length[:, None],
            behavior_logp=torch.zeros(tokens.shape),
            reward=torch.ones(len(pairs)),
            group=torch.arange(len(pairs)),
        )

    def part(self, step: int, steps: int) -> Rollout | None:
        """The solutions of one of an epoch's optimizer steps; None where there are none."""
        if self.solutions is None or not self.weight:
            return None
        index = torch.arange(len(self.solutions)).tensor_split(steps)[step % steps]
        return self.solutions.select(index) if len(index) else None
