"""stable-baselines3's PPO on a language model: its policy against one plain transformers forward a prefix."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from agents.actor_critic import longest_prefixes
from agents.sb3_ppo import SB3PPO
from benchmarks.experiment.held_out import HeldOut
from policies import Policy
from registry import UsageError
from registry import agents as agent_registry
from tests.oracles.reft_agents import numbers
from tests.oracles.small_world import AGENTS, QUESTIONS, World, make_world, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=9))
def test_longest_prefixes_against_every_pair(rows: list[list[int]]) -> None:
    ids = np.full((len(rows), 6), 9)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
    whole, within = longest_prefixes(ids, np.array([len(row) for row in rows]))
    for row, place in zip(rows, within, strict=True):
        assert rows[whole[place]][: len(row)] == row
    kept = [rows[n] for n in whole]
    assert not any(a is not b and b[: len(a)] == a for a in kept for b in kept)


@pytest.fixture
def batch(world: World) -> dict[str, torch.Tensor]:
    """Prefixes of a few episodes in disorder, and others; padded well beyond the longest."""
    rng = np.random.default_rng(0)
    ids, length = np.ones((9, 32), dtype=np.int64), np.array([12, 5, 1, 12, 9, 9, 3, 17, 16])
    episode = rng.integers(2, 500, (2, 32))
    for n, size in enumerate(length):
        ids[n, :size] = episode[n % 2, :size]
    return {"input_ids": torch.from_numpy(ids), "length": torch.from_numpy(length)[:, None]}


@pytest.mark.parametrize("detached", [True, False])
def test_evaluate_actions_equals_one_plain_forward_a_prefix(
    world: World, batch: dict[str, torch.Tensor], detached: bool
) -> None:
    agent = world.agent("sb3-ppo", detached_critic=detached)
    torch.nn.init.normal_(agent.critic.weight)
    policy, model = agent.policy, agent.target.model
    actions = torch.arange(9) * 7
    value, logp, entropy = policy.evaluate_actions(batch, actions)
    (logp.sum() + 0.3 * entropy.sum() + 0.5 * (value**2).sum()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    policy.zero_grad()
    loss = torch.zeros(())
    for n in range(9):
        ids = batch["input_ids"][n : n + 1, : int(batch["length"][n])]
        out = model(ids, output_hidden_states=True)
        distribution = torch.distributions.Categorical(logits=out.logits[0, -1])
        hidden = out.hidden_states[-1][0, -1]
        expected = agent.critic.weight[0] @ (hidden.detach() if detached else hidden) + agent.critic.bias[0]
        torch.testing.assert_close(value[n, 0], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logp[n], distribution.log_prob(actions[n]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(entropy[n], distribution.entropy(), atol=1e-5, rtol=1e-4)
        loss = loss + distribution.log_prob(actions[n]) + 0.3 * distribution.entropy() + 0.5 * expected**2
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_the_policy_interface_agrees_with_itself(world: World, batch: dict[str, torch.Tensor]) -> None:
    policy = world.agent("sb3-ppo").policy
    torch.nn.init.normal_(policy.value_net.weight)
    value, logp, _ = policy.evaluate_actions(batch, torch.arange(9))
    torch.testing.assert_close(policy.predict_values(batch), value)
    torch.testing.assert_close(policy.get_distribution(batch).log_prob(torch.arange(9)), logp)
    greedy, _, _ = policy(batch, deterministic=True)
    assert torch.equal(greedy, policy.get_distribution(batch).mode())
    assert torch.equal(
        greedy, torch.from_numpy(policy.predict({k: v.numpy() for k, v in batch.items()}, deterministic=True)[0])
    )


def test_rollouts_through_kv_slots_equal_the_plain_forward(world: World) -> None:
    agent = world.agent("sb3-ppo")
    torch.nn.init.normal_(agent.critic.weight)
    for iteration in range(2):  # in the second the weights have moved
        agent.collect_rollouts(agent.env, agent._init_callback(None), agent.rollout_buffer, agent.n_steps)
        buffer = agent.rollout_buffer
        assert buffer.episode_starts[1:].any(), "some slot was reused"
        for data in buffer.get(16):
            assert len(data.actions) == 16
            values, logp, _ = agent.policy.evaluate_actions(data.observations, data.actions.long().flatten())
            torch.testing.assert_close(values.flatten(), data.old_values, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logp, data.old_log_prob, atol=1e-5, rtol=1e-4)
        if iteration == 0:
            before = weights(agent)
            agent.train()
            assert any(not torch.equal(before[key], value) for key, value in weights(agent).items())


def test_one_step_of_ppo_is_on_policy_and_its_rewards_are_the_verdicts(world: World) -> None:
    agent = world.agent("sb3-ppo", n_epochs=1, n_steps=16, batch_size=64)
    metrics = agent.iterate()
    assert abs(metrics["approx_kl"]) < 1e-6 and metrics["clip_fraction"] == 0 and metrics["tokens"] == 64
    rewards = agent.rollout_buffer.rewards
    assert rewards.sum() == metrics["rollout_accuracy"] * metrics["episodes"] > 0
    assert set(np.unique(rewards)) == {0.0, 1.0}  # nothing is bootstrapped where the budget ends an episode


def test_sb3_ppo_raises_the_reward(world: World) -> None:
    agent = SB3PPO(world.model, world.vector(16), learning_rate=1e-3, n_steps=16, batch_size=256, seed=5)
    held_out = HeldOut(agent.envs.unwrapped.task, QUESTIONS)
    assert held_out(agent.target).bits == "10101010"  # what the world was made for
    for _ in range(15):
        agent.iterate()
    assert held_out(agent.target, 16, 1.0).mean > 0.75


def test_the_registry_makes_it_and_bad_numbers_are_usage_errors(world: World) -> None:
    agent = agent_registry.make(
        "sb3-ppo", Policy.load(world.model, dtype="float32"), world.vector(), n_steps=8, batch_size=32
    )
    assert isinstance(agent, SB3PPO) and agent.layers == (0, 1)
    for wrong, needle in (
        ({"n_steps": 4}, "n_steps=4"),
        ({"n_steps": 8, "batch_size": 12}, "batch_size=12"),
        ({"slots": 3}, "slots=3"),
    ):
        with pytest.raises(UsageError, match=needle):
            SB3PPO(world.model, world.vector(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="load it with dtype='float32'"):
        SB3PPO(Policy.load(world.model, dtype="bfloat16"), world.vector(), n_steps=8, batch_size=32)
    with pytest.raises(UsageError, match="vocab_size=512"):
        SB3PPO(world.model, gym.make_vec("MathReason-v0", num_envs=16, vocab_size=600))


def test_it_trains_low_rank_adapters_and_goes_on_to_the_same_numbers(world: World, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    agent = world.agent("sb3-ppo", lora_rank=2)
    before = weights(agent)
    # n_epochs=2: B starts at zero, so A moves from the second step on.
    metrics = [agent.iterate(), agent.iterate()]
    assert all(abs(each["approx_kl"]) < 0.1 for each in metrics)
    moved = {name for name, value in weights(agent).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith("critic.")}
    agent.save(tmp_path / "saved")
    small = {"learning_rate": 1e-3, **AGENTS["sb3-ppo"][1]}
    loaded = SB3PPO.load(tmp_path / "saved", world.vector(), seed=5, **small)
    assert loaded.lora_rank == 2
    for _ in range(2):
        mine, its = agent.iterate(), loaded.iterate()
        assert numbers(mine) == numbers(its)
    assert all(torch.equal(value, weights(agent)[name]) for name, value in weights(loaded).items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not any("lora_" in name for name, _ in plain.named_parameters())
    with pytest.raises(UsageError, match="lora_rank=-1"):
        SB3PPO(world.model, world.vector(), lora_rank=-1)
