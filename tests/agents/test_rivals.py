"""Rewards that an agent makes, by hand and by brute force; the agents of ``agents.rivals`` by their papers' losses."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import ReFT, rivals
from agents.batches.weight_copy import WeightCopy
from agents.monitoring.watch import StaleData
from agents.objective.rewards import EntropyRank, ReasoningGain
from agents.rollout import Rollout
from envs.vector import MathReasonVector
from registry import UsageError, rewards
from registry import agents as agent_registry
from tests.agents.batches.test_refill import seen_by_update
from tests.oracles.reft_agents import gradient_of, make, numbers, weights

RIVALS = [name for name in agent_registry if agent_registry.get(name).__module__ == rivals.__name__]
every_rival = pytest.mark.parametrize("name", RIVALS)


def room(reward: str = "random", slots: int = 8, limit: int = 6) -> MathReasonVector:
    options = {"limit": limit}
    return MathReasonVector(num_envs=slots, max_new_tokens=40, reward=reward, problem_options=options, copy=False)


def rival(name: str, policy: str, **arguments: Any) -> ReFT:
    given = {"group_size": 4, "problems_per_batch": 4, "learning_rate": 1e-3, "seed": 3, **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleData)
        return agent_registry.make(name, policy, room(), **given)


@every_rival
def test_it_is_declared_in_under_20_lines_and_says_its_source(name: str) -> None:
    cls = agent_registry.get(name)
    code = inspect.getsource(cls).replace(f'"""{cls.__doc__}"""', "")
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    assert "arXiv 2" in cls.__doc__
    assert "__init__" not in vars(cls), "a recipe, no code of its own"


@every_rival
def test_it_trains_and_goes_on_to_the_same_numbers(folder: str, tmp_path: Path, name: str) -> None:
    straight = rival(name, folder, sampler="uniform")
    for _ in range(2):
        straight.iterate()
    straight.save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleData)
        resumed = ReFT.load(tmp_path / "saved", room())
    start = weights(straight).clone()
    for _ in range(2):
        assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight)) and not torch.equal(weights(straight), start)


@every_rival
def test_micro_batches_change_nothing(folder: str, name: str) -> None:
    given = {"sampler": "uniform", "epochs": 1}
    whole, parts = (rival(name, folder, microbatch_tokens=tokens, **given) for tokens in (None, 120))
    for agent in (whole, parts):
        agent.optimizer.param_groups[0]["eps"] = 1e-2
        agent.iterate()
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    assert first.abs().max() > 1e-5
    scale = float(first.abs().max())
    torch.testing.assert_close(second, first, rtol=5e-3, atol=1e-4 * scale)


def in_last_batch(agent: ReFT, iterations: int) -> tuple[Rollout, torch.Tensor, WeightCopy]:
    """The last of some batches, the gradient of its first step, and the weights that it is of."""
    for _ in range(iterations - 1):
        agent.iterate()
    start, seen = WeightCopy(agent.target), []
    gradient = gradient_of(agent, lambda: seen.extend(seen_by_update(agent)[0]))
    return seen[0], gradient, start


def test_reval_is_the_squared_error_over_fresh_and_stored_completions(folder: str) -> None:
    """d = sum log pi / ref - r / beta less its group's mean; the gradient of beta d^2 / 2, averaged, by autograd."""
    agent = rival("reval", folder)
    reference = WeightCopy(agent.target)
    batch, gradient, start = in_last_batch(agent, 3)
    assert batch.kinds["stored"].any() and batch.kinds["fresh"].any()
    with reference.in_place(), torch.no_grad():
        ref = agent.target.logprobs(batch.prompts, batch.tokens, batch.mask)
    with start.in_place():
        agent.optimizer.zero_grad()
        logp = agent.target.logprobs(batch.prompts, batch.tokens, batch.mask)
        error = ((logp - ref) * batch.mask).sum(1) - batch.reward / 0.02
        for group in batch.group.unique():
            rows = batch.group == group
            error = torch.where(rows, error - error[rows].mean().detach(), error)
        (0.02 * error.square() / 2).mean().backward()
        expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-3 * float(expected.abs().max()))


def test_upft_is_supervised_learning_of_first_tokens(folder: str) -> None:
    agent = rival("upft", folder, correction={"id": "first-tokens", "tokens": 5, "whole": 2}, epochs=1)
    batch, gradient, start = in_last_batch(agent, 2)
    with start.in_place():
        agent.optimizer.zero_grad()
        logp = agent.target.logprobs(batch.prompts, batch.tokens, batch.mask)
        counts = (torch.arange(logp.shape[1]) < 5) | (batch.group % 2 == 0)[:, None]
        (-(logp * counts * batch.mask).sum() / batch.mask.sum()).backward()
        expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_remix_composes_its_three_parts(folder: str) -> None:
    agent = rival("remix", folder, batch={"id": "replay", "share": 1.0, "window": 1, "until": 3})
    fresh = [agent.iterate()["tokens"] > 0 for _ in range(5)]
    assert fresh == [True, False, True, True, True], "on-policy once it is born again"
    assert agent.metrics["updates"] == 2 and agent.metrics["kl_reference"] > 0


def test_rewards_of_reft() -> None:
    agent = ReFT("tiny", room("verified"), reward="partial", group_size=4, problems_per_batch=6, seed=1)
    rollout = agent.rollout(list(range(6)), agent.all_layers, 0)
    found = agent.reward(rollout, agent.envs.unwrapped.task, agent.update)
    statuses = [(info["is_success"], info["status"] in ("no_answer", "malformed")) for info in rollout.episodes]
    assert {(True, False), (False, False)} <= set(statuses)
    for value, (right, unreadable) in zip(found.tolist(), statuses, strict=True):
        assert value == pytest.approx(1.0 if right else 0.0 if unreadable else 0.1)


def test_reasoning_gain_is_what_the_model_gives_to_the_right_answer() -> None:
    """Each completion by itself, its text cut by hand."""
    agent = ReFT("tiny", room("verified"), group_size=4, problems_per_batch=3, seed=1)
    rollout = agent.rollout([0, 1, 2], agent.all_layers, 0)
    task = agent.envs.unwrapped.task
    found = ReasoningGain(0.3)(rollout, task, agent.update)

    def mean(prompt: torch.Tensor, before: str, answer: str) -> torch.Tensor:
        first, last = (task.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, answer))
        first = first[: 40 - len(last)]  # what the budget of tokens holds
        tokens = torch.tensor([[*first, *last]])
        with torch.no_grad():
            logp = agent.target.logprobs([prompt], tokens, torch.ones_like(tokens, dtype=torch.bool))
        return logp[0, len(first) :].mean()

    gains = set()
    for i, info in enumerate(rollout.episodes):
        text = task.text(rollout.tokens[i][rollout.mask[i]].numpy())
        gold = task.problem(info["problem_index"]).answer
        before = text.rpartition("#### ")[0] + "####" if info["extracted"] else text + " ####"
        prompt = rollout.prompts[i]
        gain = torch.tanh(mean(prompt, before, f" {gold}") - mean(prompt, " ####", f" {gold}"))
        torch.testing.assert_close(found[i], rollout.reward[i] + 0.3 * gain, rtol=1e-3, atol=1e-3)
        gains.add(round(float(gain), 3))
        assert text.strip().startswith("####") <= (abs(float(gain)) < 1e-4), "an answer without reasoning gains nothing"
    assert len(gains) > 2
    assert torch.equal(ReasoningGain(0.0)(rollout, task, agent.update), rollout.reward)


def test_truncated_answers_are_ranked_by_their_entropies(folder: str) -> None:
    """By counting, pair by pair."""
    agent = make(folder, reward={"id": "entropy-rank", "best": 0.5, "top": 0.3})
    rollout = agent.rollout(list(range(6)), agent.all_layers, 0)
    found = agent.reward(rollout, agent.envs.unwrapped.task, agent.update)
    with torch.no_grad():
        _, entropy = agent.target.logprobs_and_entropies(rollout.prompts, rollout.tokens, rollout.mask)
    ranked = 0
    for i in range(len(rollout)):
        cut = [info["finish_reason"] == "length" for info in rollout.episodes]
        rivals_of = [
            j for j in range(len(rollout)) if rollout.group[j] == rollout.group[i] and cut[j] and rollout.reward[j] == 0
        ]
        expected = float(rollout.reward[i])
        if i in rivals_of and len(rivals_of) > 1:
            values = {j: sorted(entropy[j][rollout.mask[j]].tolist(), reverse=True) for j in rivals_of}
            mean = {j: sum(v) / len(v) for j, v in values.items()}
            peak = {j: sum(v[: -(-3 * len(v) // 10)]) / -(-3 * len(v) // 10) for j, v in values.items()}
            rank = sum(peak[j] > peak[i] and mean[j] < mean[i] for j in rivals_of)
            expected += 0.5 * (1 - rank / (len(rivals_of) - 1))
            ranked += rank
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)
    assert ranked > 0


def test_one_that_is_cut_off_alone_earns_nothing() -> None:
    entropy, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert EntropyRank().ranked(entropy, mask, torch.tensor([0])).tolist() == [0.0]


def test_the_rewards_of_the_environment_are_reported_as_they_were(folder: str) -> None:
    plain, agent = make(folder), make(folder, reward="partial")
    first, second = plain.iterate(), agent.iterate()
    assert first["rollout_reward"] == second["rollout_reward"]
    assert torch.equal(weights(make(folder, reward={"id": "partial", "weight": 0.0})), weights(make(folder)))


@pytest.mark.parametrize(
    ("id", "fields", "word"),
    [
        ("partial", {"weight": float("nan")}, "weight=nan"),
        ("entropy-rank", {"top": 0.0}, "top=0.0"),
        ("reasoning-gain", {"weight": float("inf")}, "weight=inf"),
    ],
)
def test_wrong_fields(id: str, fields: dict[str, float], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        rewards.make(id, **fields)


def test_stored_rollouts_keep_the_environments_reward(folder: str) -> None:
    agent = rival("r3", folder, reward="partial")
    for _ in range(2):
        agent.iterate()
    (kept, *_) = agent.batching.kept.values()
    assert set(kept.reward.tolist()) <= {0.0, 1.0}
    assert replace(kept, reward=kept.reward) is not kept
