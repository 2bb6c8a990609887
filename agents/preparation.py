"""What a skip sampler needs before the first rollout: a check of its settings, and scores measured on the target."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from policies import Length, Probe

if TYPE_CHECKING:
    from agents.reft import ReFT

PROBLEMS = 16  # and the tokens per completion that scores are measured on
TOKENS = 32


def check_sampler(sampler: Any, num_layers: int) -> None:
    """Raise ``UsageError`` for settings that cannot work with ``num_layers``, such as a ratio too high."""
    if hasattr(sampler, "check"):
        sampler.check(num_layers)
    else:
        sampler.sample(num_layers, np.random.default_rng(0))


def prepare_sampler(agent: ReFT) -> dict[str, float]:
    """Let the agent's sampler measure its scores on a few training problems; returns what that cost.

    The problems are drawn apart from the iterations' own, so that agents with and without scores stay paired."""
    began = time.perf_counter()
    task, seed = agent.envs.unwrapped.task, agent.seed or 0
    chosen = np.random.default_rng([seed, 0, 1]).integers(task.problems.size or 2**16, size=PROBLEMS)
    prompts = [torch.from_numpy(np.asarray(task.prompt(int(problem)))) for problem in chosen]
    longest = task.spec.max_new_tokens
    length = Length(min(longest, TOKENS), tuple(task.stop_token_ids))
    agent.sampler.prepare(Probe(agent.target, prompts, length, agent.temperature, seed, longest))
    # Every process measures the same; equal to the last bit they must be made, or they would skip different layers.
    agent.sampler.load_state_dict(json.loads(agent.ranks.agree_on(json.dumps(agent.sampler.state_dict()))))
    return {"time/prepare": time.perf_counter() - began}
