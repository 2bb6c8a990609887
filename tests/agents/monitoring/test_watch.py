"""Runs that cannot learn: no step that is not finite, a word where there is nothing to learn from."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import SB3PPO, ReFT
from agents.arguments import UnusualLearningRate, check_learning_rate
from agents.monitoring.watch import (
    SILENT,
    NoGradient,
    Watch,
    explain_silence,
    longest_silence,
)
from agents.rollout import Rollout
from agents.update import NotFinite
from envs.vector import MathReasonVector
from registry import UsageError
from tests.oracles.reft_agents import make, weights, write_batch


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("arguments", [{}, {"minibatches": 2}, {"correction": "sequence-is"}])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(folder: str, bad: float, arguments: dict) -> None:
    agent = make(folder, **arguments)
    before = weights(agent)
    agent.target.model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient + bad)
    with pytest.raises(UsageError, match=r"iteration 1: .*weights are those of before"):
        agent.iterate()
    assert torch.equal(weights(agent), before)


def test_ppo_stops_before_such_a_step_too(folder: str) -> None:
    agent = SB3PPO(folder, MathReasonVector(num_envs=4, max_new_tokens=8, reward="random"), n_steps=8, batch_size=16)
    before = weights(agent)
    agent.target.model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UsageError, match="iteration 1"):
        agent.iterate()
    assert torch.equal(weights(agent), before)


def test_weights_that_are_not_finite_are_named_at_the_first_rollout(folder: str) -> None:
    agent = make(folder)
    with torch.no_grad():
        next(agent.target.parameters()).fill_(math.nan)
    agent.target.refresh()
    with pytest.raises(UsageError, match="not a finite number"):
        agent.iterate()


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_rewards_that_are_all_infinite_are_not_taken_for_equal_ones(folder: str, bad: float) -> None:
    agent = make(folder)
    before = weights(agent)
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    infinite = replace(rollout, reward=torch.full_like(rollout.reward, bad))
    with pytest.raises(NotFinite, match="a reward is not a finite number"):
        agent.update(infinite, torch.zeros(len(rollout)), np.random.default_rng(0))
    assert torch.equal(weights(agent), before)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_a_schedule_s_rate_that_is_none_stops_the_run_before_the_step(folder: str, rate: float) -> None:
    agent = make(folder, learning_rate=lambda remaining: 1e-3 if remaining == 1 else rate)
    with pytest.raises(UsageError, match=rf"the schedule of learning_rate gives {rate}"):
        agent.learn(10**6)
    assert agent.iteration == 1 and torch.isfinite(weights(agent)).all()


@pytest.mark.parametrize("what", ["reward", "behavior_logp"])
def test_numbers_of_a_rollout_that_are_not_finite_are_refused(folder: str, what: str) -> None:
    agent = make(folder)
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    getattr(rollout, what)[0] = math.nan
    with pytest.raises(NotFinite):
        agent.update(rollout, agent.advantage(rollout.reward, rollout.group), np.random.default_rng(0))


def test_weights_of_any_size_make_a_step_of_the_clipped_length(folder: str) -> None:
    """The squares of a gradient of 1e25 overflow float32; the step is that of the gradient's direction all the same."""
    steps = []
    for scale in (1.0, 1e25):
        agent = make(folder)

        def constant(
            logp: torch.Tensor, rollout: Rollout, advantage: torch.Tensor, scale: float = scale
        ) -> torch.Tensor:
            return torch.full_like(logp, scale)

        agent.update.correction = constant
        agent.update.max_grad_norm = 1e-3
        metrics = agent.iterate()
        assert math.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 1e-2 * scale
        steps.append(torch.cat([p.grad.flatten() for p in agent.target.parameters()]))
    torch.testing.assert_close(steps[0].norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-9)


def test_a_run_whose_completions_are_all_cut_off_says_so_once(folder: str) -> None:
    agent = ReFT(folder, MathReasonVector(num_envs=8, max_new_tokens=2), group_size=4, problems_per_batch=2)
    with pytest.warns(NoGradient, match="max_new_tokens") as heard:
        agent.learn(2 * 8 * (SILENT + 2))
    assert len([one for one in heard if one.category is NoGradient]) == 1


def test_ppo_says_so_too(folder: str) -> None:
    agent = SB3PPO(folder, MathReasonVector(num_envs=4, max_new_tokens=2), n_steps=8, batch_size=32)
    with pytest.warns(NoGradient, match="max_new_tokens"):
        agent.learn(4 * 8 * SILENT)


SHARES = {"sequences_used": 0.0, "mean_length": 7.0}


@pytest.mark.parametrize(
    ("metrics", "remedy"),
    [
        ({"rollout_accuracy": 0.0, "finish/length": 1.0, "status/no_answer": 1.0}, "max_new_tokens"),
        ({"rollout_accuracy": 0.1, "finish/length": 0.6}, "max_new_tokens"),
        ({"rollout_accuracy": 0.0, "finish/length": 0.1, "status/no_answer": 0.9}, "template"),
        ({"rollout_accuracy": 0.0, "finish/eos": 1.0, "status/wrong": 1.0}, "wrong 100%"),
        ({"rollout_accuracy": 1.0, "finish/eos": 1.0}, "too easy"),
        ({"rollout_accuracy": 0.5, "finish/eos": 1.0}, "group_size"),
    ],
)
def test_the_cause_is_named(metrics: dict[str, float], remedy: str) -> None:
    assert remedy in explain_silence([SHARES | metrics] * SILENT)


def test_the_silence_must_be_unbroken() -> None:
    silent, loud = SHARES | {"rollout_accuracy": 0.0}, {"sequences_used": 4.0, "rollout_accuracy": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = Watch()
        for metrics in [silent, silent, loud] * 3:
            watch(metrics)
    assert len(longest_silence([silent, loud, silent, silent, loud, silent])) == 2
    assert len(longest_silence([loud])) == 0


def test_learning_rates_far_from_what_a_pretrained_model_bears() -> None:
    for rate in (3e-4, 1e-9):
        with pytest.warns(UnusualLearningRate, match="1e-6 to 2e-5"):
            check_learning_rate(rate, 135_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_learning_rate(1e-5, 135_000_000)
        check_learning_rate(1e-3, 1_000_000)
    for rate in (math.nan, math.inf, -1.0):
        with pytest.raises(UsageError, match="learning_rate"):
            check_learning_rate(rate, 0)


def test_a_clip_that_lets_nothing_through_is_refused(folder: str) -> None:
    with pytest.raises(UsageError, match="max_grad_norm"):
        make(folder, max_grad_norm=0.0)
