"""Patches in the ReFT loop: when they are fitted, what is scored, and that a killed run goes on to the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agents import ReFT
from policies import PatchedSubset, Policy
from policies.nested import layers_of
from policies.skipping.divergence import Length, states, write
from registry import UsageError
from tests.oracles.policy_checkpoints import random_model
from tests.oracles.reft_agents import SKIP, CoinFlips, make, numbers, weights, write_batch


def fitted(agent: ReFT, iterations: int) -> list[bool]:
    return ["patch/residual" in agent.iterate() for _ in range(iterations)]


def test_a_subset_in_use_is_fitted_again_now_and_then(folder: str) -> None:
    agent = make(folder, sampler=SKIP, patch={"id": "absorb", "every": 3})
    assert fitted(agent, 6) == [False, True, False, False, True, False]
    assert agent.metrics["skip_ratio"] == 0.5
    assert agent.nesting.patcher.fitted is not None
    assert agent.nesting.patcher.fitted.layers == (0, 3)


@pytest.mark.parametrize("patch", ["absorb", "heal"])
def test_patches_that_the_layers_do_not_take_are_refused_before_training(patch: str) -> None:
    gemma = Policy(random_model("gemma3", vocab_size=512))
    with pytest.raises(UsageError, match="Gemma norms"):
        make(gemma, sampler=SKIP, patch=patch)
    with pytest.warns(UserWarning, match="falling back"):
        slow = Policy(random_model(hidden_act="relu", vocab_size=512))
    for arguments in ({"patch": patch}, {"rollout_dtype": "int8"}):
        with pytest.raises(UsageError, match="transformers' own layers"):
            make(slow, sampler=SKIP, **arguments)
    assert make(slow, sampler=SKIP).iterate()["skip_ratio"] == 0.5


def test_the_first_rollout_skips_nothing(folder: str) -> None:
    agent = make(folder, sampler=SKIP, patch="absorb")
    assert agent.iterate()["skip_ratio"] == 0
    assert abs(agent.metrics["kl_k1"]) < 1e-4
    assert agent.iterate()["skip_ratio"] == 0.5
    assert 0 < agent.metrics["patch/residual"] < 1
    assert agent.metrics["time/patch"] < agent.metrics["time/rollout"]


def test_another_subset_is_fitted_anew(folder: str) -> None:
    agent = make(folder, sampler={"id": "uniform", "ratio": 0.25, "border": 0}, patch="heal")
    seen = set()
    for iteration in range(6):
        metrics = agent.iterate()
        new = agent.nesting.patcher.fitted is not None and iteration - agent.nesting.patcher.fitted_at == 0
        assert ("patch/residual" in metrics) == new
        if agent.nesting.patcher.fitted is not None:
            assert agent.nesting.patcher.fitted.layers == agent.layers
        seen.add(agent.layers)
    assert len(seen) > 2


@pytest.mark.parametrize("correction", ["token-is", "defensive"])
def test_log_probabilities_are_those_of_the_patched_policy(folder: str, correction: str) -> None:
    agent = make(folder, sampler=SKIP, patch={"id": "heal", "every": 50}, correction=correction)
    agent.iterate()
    rollout, _ = write_batch(agent, np.random.default_rng(1))
    nested = agent.nesting.patcher.fitted
    with torch.no_grad():
        scored, plain = (
            agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask, layers=layers)
            for layers in (nested, (0, 3))
        )
    torch.testing.assert_close(scored[rollout.mask], rollout.behavior_logp[rollout.mask], atol=1e-4, rtol=1e-4)
    assert (plain - scored).abs().max() > 0.1


@pytest.mark.parametrize("id", ["absorb", "heal"])
def test_a_saved_agent_goes_on_to_the_same_numbers(folder: str, tmp_path: Path, id: str) -> None:
    given = {"sampler": SKIP, "patch": {"id": id, "every": 2}, "correction": "retrace"}
    straight = make(folder, **given)
    for _ in range(2):
        straight.iterate()
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(
        tmp_path / "saved", CoinFlips(16), group_size=4, problems_per_batch=6, learning_rate=1e-2, seed=3, **given
    )
    assert isinstance(resumed.nesting.patcher.fitted, PatchedSubset)
    for _ in range(2):  # the first uses the saved patches, the second fits to saved tokens, anchored at them
        assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))
    assert layers_of(resumed.nesting.patcher.fitted) == resumed.layers


def test_an_agent_saved_before_its_first_rollout_loads(folder: str, tmp_path: Path) -> None:
    make(folder, sampler=SKIP, patch="absorb").save(tmp_path / "saved")
    agent = ReFT.load(tmp_path / "saved", CoinFlips(16), sampler=SKIP, patch="absorb")
    assert agent.nesting.patcher.text is None


def test_tokens_are_bounded_and_groups_share_their_prompt(folder: str) -> None:
    agent = make(folder, sampler=SKIP, patch={"id": "absorb", "tokens": 150})
    agent.iterate()
    text = agent.nesting.patcher.text
    assert text is not None
    used = int(text.mask.sum()) + sum(len(p) for p in {id(p): p for p in text.prompts}.values())
    assert 0 < used <= 150
    assert len({id(prompt) for prompt in text.prompts}) < len(text.prompts)


def test_a_long_text_measured_first_leaves_updates_differentiable() -> None:
    policy = Policy(random_model(max_position_embeddings=1024))
    text = write(policy, (0, 1, 2, 3), [torch.arange(300) % 101], Length(2))
    policy._tables = None
    states(policy, text, (0, 2))
    policy.logprobs(text.prompts, text.tokens, text.mask).sum().backward()
    assert policy.model.model.layers[1].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("sampler", ["full", "nested-draft"])
def test_a_patch_where_nothing_is_skipped_is_said_to_have_no_effect(folder: str, sampler: str) -> None:
    with pytest.warns(UserWarning, match="patch=.*no effect.*every layer"):
        make(folder, sampler=sampler, patch="heal")
