"""Completions that the token budget cut off, left out of the loss: DAPO's overlong filtering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents import ReFT, Rollout
from envs.vector import MathReasonVector
from tests.oracles.reft_agents import gradient_of, write_batch


def make(folder: str, **arguments: Any) -> ReFT:
    """Of a world where a random model often stops before its budget ends."""
    stops = tuple(range(2, 512, 6))
    envs = MathReasonVector(num_envs=16, max_new_tokens=8, reward="random", copy=False, stop_token_ids=stops)
    return ReFT(folder, envs, group_size=4, problems_per_batch=12, learning_rate=1e-2, seed=3, **arguments)


def cut_off(agent: ReFT, rollout: Rollout) -> torch.Tensor:
    """[B] bool, found by the tokens: no stop token stands at the end."""
    stops = torch.tensor(sorted(agent.envs.unwrapped.task.stop_token_ids))
    last = rollout.tokens.gather(1, rollout.mask.sum(1, keepdim=True) - 1)
    return ~torch.isin(last[:, 0], stops)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "constant"])
def test_the_gradient_is_that_of_a_loss_whose_mask_lacks_them(folder: str, aggregation: str) -> None:
    """TRL's mask_truncated_completions: their mask is 0, in the sum and in the normaliser; advantages are of all."""
    agent = make(folder, aggregation=aggregation, mask_truncated=True)
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    truncated = cut_off(agent, rollout)
    assert torch.equal(rollout.truncated, truncated) and 0 < int(truncated.sum()) < len(rollout)
    advantage = agent.advantage(rollout.reward, rollout.group)
    assert advantage[truncated].any() and advantage[~truncated].any()
    found = gradient_of(agent, lambda: agent.update(rollout, advantage, np.random.default_rng(0)))

    mask = rollout.mask & ~truncated[:, None]
    agent.optimizer.zero_grad()
    logp = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    per_token = -advantage[:, None] * logp * mask
    loss = {
        "token-mean": per_token.sum() / mask.sum(),
        "sequence-mean": (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean(),
        "constant": per_token.sum() / len(mask),
    }[aggregation]
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_micro_batches_change_nothing(folder: str) -> None:
    whole, parts = (make(folder, mask_truncated=True, microbatch_tokens=tokens) for tokens in (None, 120))
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)
    assert whole.metrics["sequences_used"] <= 48 * (1 - whole.metrics["finish/length"])
