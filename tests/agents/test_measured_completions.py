"""What an update measures of its rollout: every completion, at the policy before its first step, at no cost to what is
learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import NormalizeReward

from agents import ReFT
from agents.batches.refill import left_out
from agents.rollout import Rollout
from tests.oracles.reft_agents import SKIP, CoinFlips, make, weights, write_batch


def one_rollout(agent: ReFT) -> tuple[Rollout, torch.Tensor]:
    """A nested rollout, of which every second group has no signal."""
    rollout, _ = write_batch(agent, np.random.default_rng(7))
    advantage = agent.advantage(rollout.reward, rollout.group)
    advantage[rollout.group % 2 == 0] = 0.0
    assert 0 < (advantage != 0).sum() < len(rollout) - 8
    return rollout, advantage


def update(agent: ReFT, share: float) -> dict[str, float]:
    return agent.update(*one_rollout(agent), np.random.default_rng(0), share=share)


def expected(agent: ReFT) -> dict[str, float]:
    """KL, D and overlap of all completions by the policy as it is, sequence by sequence."""
    rollout, _ = one_rollout(agent)
    sums, tokens = [], []
    for n in range(len(rollout)):
        length = int(rollout.mask[n].sum())
        with torch.no_grad():
            ids = torch.cat([rollout.prompts[n], rollout.tokens[n, :length]])[None]
            scores = agent.target.model(ids).logits[0, -length - 1 : -1].double().log_softmax(-1)
        log_ratio = scores.gather(1, rollout.tokens[n, :length, None])[:, 0] - rollout.behavior_logp[n, :length]
        sums.append(float(log_ratio.sum()))
        tokens += log_ratio.tolist()
    return {"kl_k1": -np.mean(tokens), "D": -np.mean(sums), "tv": np.mean(np.maximum(0, 1 - np.exp(tokens)))}


@pytest.mark.parametrize(
    "arguments",
    [
        {"correction": "token-is"},
        {"correction": "token-is", "microbatch_tokens": 60},
        {"correction": "token-is*ppo-clip", "minibatches": 2, "epochs": 2},
        {"correction": "self-normalised"},
        {"correction": "self-normalised", "minibatches": 3},
    ],
    ids=["one step", "micro-batches", "several steps", "wide", "wide, several steps"],
)
def test_all_completions_are_measured_at_the_policy_of_the_rollout(folder: str, arguments: dict[str, Any]) -> None:
    """A learning rate that moves log pi far shows where a later policy is measured; a wide scope needs no share, since
    it scores all completions anyway."""
    agent = make(folder, sampler=SKIP, learning_rate=0.1, **arguments)
    wanted, before = expected(agent), weights(agent)
    found = update(agent, share=0.0 if arguments["correction"] == "self-normalised" else 1.0)
    assert (weights(agent) - before).abs().max() > 0.05
    assert found["sequences"] == 24 and found["sequences_used"] < 16
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("steps", [{}, {"minibatches": 2, "epochs": 2}])
def test_what_is_measured_moves_no_weight(folder: str, steps: dict[str, int]) -> None:
    found = []
    for share in (0.0, 0.5, 1.0):
        agent = make(folder, sampler=SKIP, correction="token-is*ppo-clip", **steps)
        metrics = update(agent, share)
        found.append((metrics["sequences"], weights(agent), {k: v for k, v in metrics.items() if "weight" in k}))
    (few, first, learnt), *others = found
    for count, after, learnt_too in others:
        assert count > few
        assert torch.equal(after, first) and learnt_too == learnt


def test_figures_of_a_share_lie_on_both_sides_of_those_of_all(folder: str) -> None:
    agent = make(folder, sampler=SKIP, learning_rate=0.0)
    rollout, advantage = one_rollout(agent)
    drawn = [agent.update(rollout, advantage, np.random.default_rng([seed, 0]), share=0.25)["D"] for seed in range(40)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert error > 0
    assert abs(np.mean(drawn) - expected(agent)["D"]) < 4 * error


def test_only_off_policy_rollouts_are_measured_beyond_those_used(folder: str) -> None:
    for given, more in (({}, False), ({"sampler": SKIP}, True), ({"rollout_dtype": "int8"}, True)):
        agent = make(folder, problems_per_batch=12, group_size=3, **given)
        found = agent.iterate()
        assert found["sequences_used"] < 36
        assert (found["sequences"] != found["sequences_used"]) == more, given


def test_a_rollout_without_any_signal_is_measured(folder: str) -> None:
    agent = make(folder, sampler=SKIP)
    agent.advantage = lambda reward, group: torch.zeros_like(reward)
    found = agent.iterate()
    assert found["sequences_used"] == 0 and found["sequences"] == 2 and found["D"] > 0
    assert "weight_mean" not in found


@pytest.mark.parametrize(
    "given",
    [
        {"rollout_dtype": "int8"},
        {"sampler": SKIP, "rollout_dtype": "int8", "correction": "defensive", "target_written": 2},
        {"sampler": SKIP, "dtype": "bfloat16"},
    ],
    ids=["bytes", "nested bytes beside the target", "bfloat16"],
)
def test_the_noise_of_the_behaviour_in_use_is_that_of_its_own_score(folder: str, given: dict[str, Any]) -> None:
    """Its model scores what it wrote; a gap planted in the engine's log-probabilities is seen whole."""
    agent, planted = make(folder, **given), make(folder, **given)
    write = planted.rollout

    def shifted(*args: Any) -> Rollout:
        rollout = write(*args)
        return replace(rollout, behavior_logp=rollout.behavior_logp - 0.75)

    planted.rollout = shifted  # type: ignore[method-assign]
    found, seen = agent.iterate(), planted.iterate()
    assert 0 < found["behavior_noise_kl"] < found["behavior_noise_mean"] <= found["behavior_noise_max"] < 0.2
    assert seen["behavior_noise_mean"] == pytest.approx(0.75, abs=0.2)
    assert seen["noise_mean"] == found["noise_mean"]


def test_the_noise_of_the_full_model_is_said_once(folder: str) -> None:
    found = make(folder).iterate()
    assert found["noise_kl"] < 1e-8 and not [name for name in found if name.startswith("behavior_")]


def test_measuring_the_noise_counts_in_no_wrapper(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"group_size": 4, "problems_per_batch": 6, "learning_rate": 1e-2, "seed": 3}
    measured, without = (ReFT(folder, NormalizeReward(CoinFlips(16)), **given) for _ in range(2))
    monkeypatch.setattr(without, "_noise", lambda *_: {})
    for noise in (True, False):
        found, expected = measured.iterate(), without.iterate()
        assert ("noise_kl" in found) is noise and "noise_kl" not in expected
        assert found["rollout_reward"] == expected["rollout_reward"]
    assert measured.envs.return_rms.count == without.envs.return_rms.count
    assert torch.equal(weights(measured), weights(without))


def test_completions_that_are_not_learnt_from_are_measured_with_the_others(folder: str) -> None:
    """As refill leaves them: the figures are those of the whole rollout, and the weights those of the batch alone."""
    agent, alone = (make(folder, sampler=SKIP, correction="token-is") for _ in range(2))
    rollout, advantage = one_rollout(agent)
    wanted = expected(agent)
    batch = rollout.select((rollout.group % 2 == 1).nonzero()[:, 0])
    beside = left_out(rollout, batch)
    assert beside is not None and len(beside) == len(batch) == 12 and left_out(batch, batch) is None
    own = advantage[rollout.group % 2 == 1]
    found = agent.update(batch, own, np.random.default_rng(0), share=1.0, beside=beside)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert found["sequences"] == 24 and found["mean_length"] == float(rollout.mask.sum()) / 24
    few = alone.update(batch, own, np.random.default_rng(0))
    assert few["sequences"] < 24 and torch.equal(weights(alone), weights(agent))


def test_an_agent_with_refill_measures_what_it_wrote(folder: str) -> None:
    agent = make(folder, sampler=SKIP, group_size=2, refill_tokens=10_000)
    found = agent.iterate()
    assert found["refill_groups"] > 0 and found["sequences_used"] == 12
    assert found["sequences"] != 12 and found["mean_length"] * (12 + 2 * found["refill_groups"]) == found["tokens"]
