"""The entropy bonus against autograd, and the entropy that every iteration reports."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import ReFT
from registry import UsageError
from tests.agents.test_distributed import in_processes, trained
from tests.oracles.reft_agents import CoinFlips, gradient_of, make, numbers, weights, write_batch


def entropies(agent: ReFT, rollout: object) -> torch.Tensor:
    return agent.target.logprobs_and_entropies(rollout.prompts, rollout.tokens, rollout.mask)[1]  # type: ignore[attr-defined]


def test_update_gradient_is_that_of_the_loss_less_the_mean_entropy(folder: str) -> None:
    agent = make(folder, entropy_bonus=0.3, advantage="dr-grpo")
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    advantage = agent.advantage(rollout.reward, rollout.group)
    assert (advantage == 0).any()
    found = gradient_of(agent, lambda: agent.update(rollout, advantage, np.random.default_rng(0)))
    agent.optimizer.zero_grad()
    logp = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    tokens = rollout.mask.sum()
    loss = -(advantage[:, None] * logp).sum() / tokens
    for row, length in enumerate(rollout.mask.sum(1).tolist()):
        ids = torch.cat([rollout.prompts[row], rollout.tokens[row, :length]])[None]
        logits = agent.target.model(ids).logits[0, len(rollout.prompts[row]) - 1 : -1]
        loss = loss - 0.3 * torch.distributions.Categorical(logits=logits).entropy().sum() / tokens
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_metric_estimates_the_exact_entropy(folder: str) -> None:
    agent = make(folder, problems_per_batch=40)
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    exact = float(entropies(agent, rollout)[rollout.mask].mean().detach())
    spread = float(rollout.behavior_logp[rollout.mask].std()) / int(rollout.mask.sum()) ** 0.5
    assert abs(rollout.entropy - exact) < 4 * spread
    assert agent.iterate()["entropy"] > 0


def test_a_bonus_raises_the_entropy(folder: str) -> None:
    def after(**arguments: float) -> float:
        agent = make(folder, **arguments)
        return [agent.iterate() for _ in range(6)][-1]["entropy"]

    most = math.log(512)  # of the vocabulary
    assert most - after(entropy_bonus=3.0) < 0.75 * (most - after())


def test_it_survives_saving_and_micro_batches_and_processes(folder: str, tmp_path: Path) -> None:
    whole, parts = (make(folder, entropy_bonus=0.3, microbatch_tokens=tokens) for tokens in (None, 120))
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)
    straight = make(folder, entropy_bonus=0.3)
    straight.iterate()
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16))
    assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))
    metrics, after = trained(folder, entropy_bonus=0.3)
    for found in in_processes(2, lambda: trained(folder, entropy_bonus=0.3), tmp_path):
        assert not isinstance(found, str), found
        assert found[0]["1 entropy"] == pytest.approx(metrics["1 entropy"], rel=1e-4)
        np.testing.assert_allclose(found[1], after, rtol=1e-4, atol=1e-5)


def test_a_negative_bonus_is_refused(folder: str) -> None:
    with pytest.raises(UsageError, match="entropy_bonus=-1"):
        make(folder, entropy_bonus=-1.0)
