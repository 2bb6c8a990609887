"""Small agents, their weights and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import agents  # noqa: F401 (registers)
from agents import ReFT, Rollout
from envs.vector import MathReasonVector


class CoinFlips(MathReasonVector):
    """The control arm's rewards: a random model gets both rewards, so that groups carry a gradient."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs=num_envs, max_new_tokens=8, reward="random", copy=False)


def make(folder: str, slots: int = 16, **arguments: Any) -> ReFT:
    given = {"group_size": 4, "problems_per_batch": 6, "learning_rate": 1e-2, "seed": 3, **arguments}
    return ReFT(folder, CoinFlips(slots), **given)


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith("time/") and "per_second" not in k}


def weights(agent: ReFT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.target.parameters()])


def gradient_of(agent: ReFT, act: Callable[[], Any]) -> torch.Tensor:
    """The gradient that the agent's own update accumulates, its optimizer held still."""
    agent.optimizer.step = lambda *a, **k: None  # type: ignore[method-assign]
    agent.update.max_grad_norm = float("inf")
    act()
    return torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])


SKIP = {"id": "fixed", "layers": [1, 2]}


def write_batch(agent: ReFT, rng: np.random.Generator) -> tuple[Rollout, list[int]]:
    """A rollout as an iteration writes it, and its problems; nothing is learnt from it."""
    problems = agent._draw_problems(rng)
    seed = int(rng.integers(2**31))
    return agent.rollout(problems, agent.nesting.draw(agent.target, rng, agent.iteration), seed), problems
