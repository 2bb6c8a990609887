"""The ReFT loop against oracles: published losses by autograd, slot and micro-batch invariance, resuming."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import agents  # noqa: F401 (registers)
from agents import ReFT, collect
from agents.corrections import Correction, ZeroWeights
from agents.monitoring.watch import StaleData
from agents.rollout import GroupMixture, Rollout
from envs.vector import MathReasonVector
from policies import Policy
from registry import UsageError, advantages, corrections
from registry import agents as agent_registry
from tests.oracles.reft_agents import CoinFlips, gradient_of, make, numbers, weights, write_batch

LAYERS = 4


def rollout_of(agent: ReFT, layers: tuple[int, ...], problems: int = 6, group: int = 4) -> Rollout:
    length = agent.observation_space["input_ids"].shape[0]
    mu = agent.target.behavior(layers, agent.env.num_envs, length, seed=1)
    return collect(mu, agent.envs, list(range(problems)), group)


@dataclass(frozen=True)
class Drops(Correction):
    """Gives all completions, or those without a reward, no weight."""

    everything: bool
    scope = "token"

    def __call__(self, logp: torch.Tensor, rollout: Rollout, advantage: torch.Tensor) -> torch.Tensor:
        kept = (advantage > 0) & (not self.everything)
        return kept[:, None].expand(logp.shape).float()


def test_reft_is_the_on_policy_baseline(folder: str) -> None:
    agent = make(folder)
    metrics = agent.iterate()
    assert metrics["skip_ratio"] == 0
    assert abs(metrics["kl_k1"]) < 1e-4
    assert metrics["ess_sequence"] > 1 - 1e-4
    assert metrics["grad_norm"] > 0


def test_update_gradient_is_reinforce_with_group_advantages(folder: str) -> None:
    agent = make(folder, advantage="dr-grpo", aggregation="sequence-mean")
    rollout = rollout_of(agent, tuple(range(LAYERS)))
    advantage = agent.advantage(rollout.reward, rollout.group)
    assert 0 < (advantage != 0).sum() < len(rollout) or (advantage != 0).all()
    found = gradient_of(agent, lambda: agent.update(rollout, advantage, np.random.default_rng(0)))

    model = LlamaForCausalLM.from_pretrained(folder)
    loss = torch.zeros(())
    for i in range(len(rollout)):
        length = int(rollout.mask[i].sum())
        ids = torch.cat([rollout.prompts[i], rollout.tokens[i, :length]])[None]
        logits = model(ids).logits[0, len(rollout.prompts[i]) - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, rollout.tokens[i, :length, None])[:, 0]
        loss = loss - advantage[i] * logp.mean() / len(rollout)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_base_variant_gradient_is_the_clipped_loss_with_importance_ratio(folder: str) -> None:
    """token-is*ppo-clip: mu-to-old ratio detached, times PPO's clipped surrogate (arXiv 1707.06347, eq. 7)."""
    agent = make(folder, correction="token-is*ppo-clip", advantage="dr-grpo", aggregation="token-mean")
    rollout = rollout_of(agent, (0, 2, 3))
    advantage = agent.advantage(rollout.reward, rollout.group)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        now = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
        old = now + 0.3 * torch.randn(now.shape, generator=generator) * rollout.mask
    rollout = replace(rollout, old_logp=old)

    def act() -> None:
        agent.update._step(rollout, advantage, None, None)

    found = gradient_of(agent, act)
    agent.optimizer.zero_grad()
    logp = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    r = (logp - old).exp()
    clip = agent.correction.factors[1]
    low, high = clip.eps_low, clip.eps_high
    surrogate = torch.minimum(r * advantage[:, None], r.clamp(1 - low, 1 + high) * advantage[:, None])
    ratio = (old - rollout.behavior_logp).exp()
    loss = -(ratio * surrogate * rollout.mask).sum() / rollout.mask.sum()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("correction", ["none", "sequence-is", "self-normalised", "token-is*ppo-clip", "defensive"])
def test_microbatches_bound_memory_and_nothing_else(folder: str, correction: str) -> None:
    whole = make(folder, sampler="fixed", correction=correction)
    parts = make(folder, sampler="fixed", correction=correction, microbatch_tokens=120)
    # Gradients, not weights: Adam's first step turns rounding of a near-zero gradient into a whole step.
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16_384])
@pytest.mark.parametrize(("dropped", "said"), [("some", 0), ("all", 2)])
def test_zero_weights_are_said_of_a_minibatch(folder: str, tokens: int, dropped: str, said: int) -> None:
    """Once a step where nothing is left; not where a mask drops the only completions of a micro-batch."""
    agent = make(folder, correction=Drops(dropped == "all"), minibatches=2, microbatch_tokens=tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = agent.iterate()
    assert sum(issubclass(one.category, ZeroWeights) for one in caught) == said
    assert metrics["weight_zero"] == 1.0 if said else 0 < metrics["weight_zero"] < 1


@pytest.mark.parametrize("correction", ["none", "self-normalised"])
@pytest.mark.parametrize("silent", [0, 2, 6])
def test_steps_without_a_gradient_are_not_counted(folder: str, correction: str, silent: int) -> None:
    agent = make(folder, correction=correction, minibatches=6)
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(6)
    advantage[rollout.group < silent] = 0.0
    steps: list[float] = []
    agent.optimizer.register_step_post_hook(lambda *_: steps.append(1.0))
    metrics = agent.update(rollout, advantage, np.random.default_rng(0))
    assert metrics["updates"] == len(steps) == 6 - silent
    assert (metrics["grad_norm"] > 0) is (silent < 6)


def test_slots_change_nothing(folder: str) -> None:
    few, many = make(folder, slots=5), make(folder, slots=24)
    first, second = (gradient_of(agent, agent.iterate) for agent in (few, many))
    for name in ("tokens", "rollout_reward", "finish/length"):
        assert few.metrics[name] == many.metrics[name]
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)


def test_equal_seeds_deal_equal_problems_whatever_the_agent(folder: str) -> None:
    def dealt(**arguments: Any) -> list[int]:
        agent = make(folder, **arguments)
        rollout, problems = write_batch(agent, np.random.default_rng([3, 0]))
        assert [info["problem_index"] for info in rollout.episodes][::4] == problems
        return problems

    assert dealt() == dealt(sampler="uniform", correction="retrace") == dealt(sampler="fixed")


@pytest.mark.parametrize(
    "id", ["reft", "nested-reft/uniform/retrace", "nested-reft/uniform/defensive", "nested-reft/softmax/retrace"]
)
def test_a_saved_agent_goes_on_to_the_same_numbers(folder: str, tmp_path: Path, id: str) -> None:
    component, fixed = agent_registry.resolve(id)
    given = {**fixed, "problem_sampler": "curriculum", "minibatches": 2}
    straight = make(folder, **given)
    straight.iterate()
    straight.save(tmp_path / "saved")
    assert not [p.name for p in (tmp_path / "saved").iterdir() if p.suffix in (".pkl", ".pt", ".pth", ".bin", ".zip")]
    resumed = component.load(
        tmp_path / "saved", CoinFlips(16), group_size=4, problems_per_batch=6, learning_rate=1e-2, seed=3, **given
    )
    assert resumed.num_timesteps == straight.num_timesteps
    assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))
    LlamaForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_sampler_that_needs_scores_gets_them_once_and_pairs_with_the_others(folder: str) -> None:
    agent, other = make(folder, sampler={"id": "lowest-kl", "ratio": 0.25}), make(folder)
    first, second = agent.iterate(), agent.iterate()
    assert first["time/prepare"] > 0
    assert "time/prepare" not in second
    assert first["skip_ratio"] == second["skip_ratio"] == 0.25
    assert first["layers_kept"] == 3
    other.iterate()
    assert write_batch(agent, np.random.default_rng(1))[1] == write_batch(other, np.random.default_rng(1))[1]
    with pytest.raises(UsageError, match="largest possible"):
        make(folder, sampler={"id": "lowest-kl", "ratio": 0.95})


def test_a_policy_without_some_halves_is_trained_and_counted_by_weight(folder: str) -> None:
    agent = make(folder, sampler={"id": "attention-only", "ratio": 0.5}, correction="truncated-is")
    metrics = agent.iterate()
    a = agent.target.architecture
    assert metrics["skip_ratio"] == pytest.approx(0.5 * a.attention_share)
    assert metrics["layers_kept"] == pytest.approx(LAYERS - 2 * a.attention_share)
    assert metrics["kl_k3"] > 0


def test_defensive_groups_hold_both_writers(folder: str) -> None:
    agent = make(folder, sampler="fixed", correction="defensive", target_written=2)
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    assert rollout.by_target is not None
    assert rollout.by_target.view(-1, 4).tolist() == [[True, True, False, False]] * 6
    with torch.no_grad():
        nested = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask, layers=agent.layers)
    torch.testing.assert_close(rollout.behavior_logp * rollout.mask, nested, rtol=1e-3, atol=1e-4)
    # The weight is bounded by n / n_0 as long as pi is pi_old (the balance heuristic's bound).
    with torch.no_grad():
        full = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    weight = corrections.make("defensive")(full, replace(rollout, old_logp=full), torch.ones(len(rollout)))
    assert float(weight.max()) <= 2.0 + 1e-4


@pytest.mark.parametrize("sampler", ["fixed", "softmax"])
@pytest.mark.parametrize("target_written", [0, 3, 4])
def test_any_number_of_a_group_may_be_by_the_target(folder: str, sampler: str, target_written: int) -> None:
    given = {"correction": "defensive", "problems_per_batch": 10}
    agent = make(folder, sampler=sampler, target_written=target_written, **given)
    for noise in (True, False):
        metrics = agent.iterate()
        assert ("behavior_noise_kl" in metrics) is (noise and target_written < 4)
        assert metrics["grad_norm"] > 0 and ("kl_k1" in metrics) is (target_written < 4)


def test_group_mixture_deals_each_episode_to_one_writer() -> None:
    class Constant:
        def __init__(self, token: int) -> None:
            self.token = token
            self.seen: list[int] = []

        def act(self, obs: Any, start: Any, episode: Any) -> Any:
            self.seen += episode[obs["length"][:, 0] > 0].tolist()
            return np.full(len(start), self.token), np.zeros(len(start), np.float32)

    nested, full = Constant(5), Constant(6)
    envs = MathReasonVector(num_envs=4, max_new_tokens=2)
    rollout = collect(GroupMixture(nested, full, 3, 1), envs, [0, 1], 3)
    assert rollout.tokens[:, 0].tolist() == [6, 5, 5, 6, 5, 5]
    assert set(full.seen) == {0, 3}
    assert set(nested.seen) == {1, 2, 4, 5}


def test_advantages_and_errors_name_the_value() -> None:
    assert set(advantages) >= {"grpo", "dr-grpo", "rloo"}
    for arguments, word in [
        ({"group_size": 0}, "group_size=0"),
        ({"minibatches": 99}, "minibatches=99"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"group_size": "8"}, "group_size='8'"),
        ({"problems_per_batch": 2.5}, r"problems_per_batch=2\.5"),
        ({"epochs": True}, "epochs=True"),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "a"}, "seed='a'"),
        ({"correction": "retrase"}, "retrace"),
        ({"target_written": 99}, "target_written=99"),
        ({"env": 7}, "env=7"),
    ]:
        with pytest.raises(UsageError, match=word):
            ReFT("tiny", **{"env": "MathReason-v0", **arguments})


def test_vocabularies_must_agree(folder: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=2, **shape)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="300 logits"):
        ReFT(str(tmp_path), "MathReason-v0")


def test_a_skip_ratio_that_leaves_no_layer_fails_before_anything_runs(folder: str) -> None:
    with pytest.raises(UsageError, match="largest possible"):
        make(folder, sampler={"id": "uniform", "ratio": 0.95})


def test_the_policy_may_be_an_object(folder: str) -> None:
    policy = Policy.load(folder, dtype="float32")
    assert ReFT(policy, CoinFlips(4), group_size=2, problems_per_batch=2).target is policy


def test_microbatches_keep_groups_whole_where_they_fit(folder: str) -> None:
    agent = make(folder, sampler="fixed")
    sizes, members, lengths = (10, 40, 5, 30), (3, 3, 3, 2), (20, 20, 20, 20, 5, 5, 1, 1, 1, 90, 90)
    prompts = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(members))
    mask = torch.arange(90) < torch.tensor(lengths)[:, None]
    rollout = Rollout(
        prompts=tuple(prompts[g] for g in group),
        tokens=mask.long(),
        mask=mask,
        behavior_logp=torch.zeros(mask.shape),
        reward=torch.zeros(len(mask)),
        group=group,
        episodes=tuple({} for _ in mask),
    )
    agent.update.microbatch_tokens = 100
    runs = agent.update._microbatches(rollout, torch.arange(len(mask)))
    assert [run.tolist() for run in runs] == [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9], [10]]  # 70, 70 + 8, 120, 120 tokens
    agent.update.microbatch_tokens = 60
    runs = agent.update._microbatches(rollout, torch.tensor([0, 1, 2, 6, 7]))
    assert [run.tolist() for run in runs] == [[0, 1], [2, 6, 7]]  # 50, 30 + 7


def test_reft_has_its_clip_where_a_rollout_gives_several_steps(folder: str) -> None:
    """In a first step r = 1, so that nothing tells it from no correction; in later ones it bounds the ratio."""
    weights_of = {}
    for correction in ("none", "ppo-clip"):
        agent = make(folder, correction=correction)
        agent.iterate()
        weights_of[correction] = weights(agent)
    assert torch.equal(weights_of["none"], weights_of["ppo-clip"])
    small = {"group_size": 4, "problems_per_batch": 6, "learning_rate": 1e-2, "seed": 3}
    agent = agent_registry.make("reft", folder, CoinFlips(16), minibatches=3, **small)
    metrics = agent.iterate()
    assert metrics["weight_q01"] < metrics["weight_q50"] or metrics["weight_zero"] > 0
    with pytest.warns(StaleData, match="ppo-clip"):
        make(folder, correction="none", epochs=2)
