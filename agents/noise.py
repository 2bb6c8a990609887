"""What engine and trainer disagree by on the full model's own tokens: no divergence below it means anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agents.diagnostics import noise_floor
from agents.rollout import Rollout, collect

NOISE_EVERY = 10  # iterations between measurements
NOISE_PROBLEMS = 8


@torch.no_grad()
def measured_noise(agent: Any, problems: Sequence[int]) -> dict[str, float]:
    """``noise_floor`` of a ``ReFT`` agent on the first of ``problems``, one completion each."""
    mu = agent.behavior(agent.all_layers, agent.iteration)

    def write(problems: list[int], first_group: int) -> Rollout:
        return collect(mu, agent.envs, problems, 1, first_group=first_group)

    rollout = agent.ranks.rollout(write, problems[:NOISE_PROBLEMS])
    logp = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask, temperature=agent.temperature)
    return noise_floor(logp.to(rollout.tokens.device), rollout)
