"""Supervised fine-tuning: its gradient is that of transformers' own loss, and a loaded agent goes on exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from transformers import AutoModelForCausalLM

from agents import SFT
from policies import Policy
from policies.pretrained.load import BUILT_IN
from registry import UsageError


def agent_of(folder: str, **given: Any) -> SFT:
    return SFT(folder, "MathReason-v0", **{"learning_rate": 1e-3, "batch_size": 5, "gradient_steps": 2, **given})


def gradients(agent: SFT, step: int = 0) -> dict[str, torch.Tensor]:
    agent.optimizer.zero_grad(set_to_none=True)
    agent._backward(agent.batches[step])
    return {name: p.grad.clone() for name, p in agent.target.model.named_parameters() if p.grad is not None}


def transformers_loss(model: Any, demonstrations: Any) -> torch.Tensor:
    """The mean cross-entropy per completion token, one sequence at a time, by transformers' own labels."""
    total, count = torch.zeros(()), 0
    for prompt, completion in demonstrations:
        labels = torch.cat((torch.full_like(prompt, -100), completion))[None]
        loss = model(torch.cat((prompt, completion))[None], labels=labels).loss
        total, count = total + loss * len(completion), count + len(completion)
    return total / count


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "time" not in name and "second" not in name}


def assert_equal(first: SFT, second: SFT) -> None:
    one, other = first.target.model.state_dict(), second.target.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    mine, its = first.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"]
    assert all(torch.equal(mine[n][name], its[n][name]) for n in mine for name in mine[n])


@pytest.mark.parametrize("model", ["random", "tiny"])
def test_the_gradient_is_that_of_transformers_own_loss(folder: str, model: str) -> None:
    name = folder if model == "random" else "tiny"
    agent = agent_of(name)
    reference = AutoModelForCausalLM.from_pretrained(BUILT_IN.get(name, Path(name)), dtype=torch.float32)
    loss = transformers_loss(reference, agent.batches[0].demonstrations)
    loss.backward()
    assert agent._backward(agent.batches[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
    ours = {name: p.grad for name, p in agent.target.model.named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_of_a_pretrained_model_is_that_of_transformers_own_loss() -> None:
    name = os.environ.get("NESTED_REFT_PRETRAINED")
    if name is None:
        pytest.skip("no pretrained model: set NESTED_REFT_PRETRAINED to a folder")
    reference = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    arguments = {"tokenizer": name, "vocab_size": reference.config.vocab_size, "max_new_tokens": 100}
    venv = gym.make_vec("MathReason-v0", num_envs=1, **arguments)
    agent = SFT(name, venv, 1e-5, batch_size=3, microbatch_tokens=200)
    loss = transformers_loss(reference, agent.batches[0].demonstrations)
    loss.backward()
    assert agent._backward(agent.batches[0]) == pytest.approx(float(loss.detach()), rel=1e-4)
    for (name, ours), theirs in zip(agent.target.model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm(), name


def test_micro_batches_bound_memory_and_change_no_gradient(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(agent_of(folder, microbatch_tokens=10**6))
    for bound in (1, 120, 200):
        agent = agent_of(folder, microbatch_tokens=bound)
        sizes: list[int] = []
        logprobs = Policy.logprobs

        def seen(self: Policy, prompts: Any, tokens: Any, mask: Any, sizes=sizes, real=logprobs, **kwargs: Any) -> Any:
            sizes.append(int(mask.sum()) + sum(map(len, prompts)))
            return real(self, prompts, tokens, mask, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Policy, "logprobs", seen)
            parts = gradients(agent)
        alone = max(len(one.prompt) + len(one.completion) for one in agent.batches[0].demonstrations)
        assert len(sizes) > 1 and max(sizes) <= max(bound, alone)
        assert parts.keys() == whole.keys()
        for name, gradient in parts.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_layers_left_out_get_no_gradient(folder: str) -> None:
    agent = SFT("tiny", batch_size=3, skip=1.0, seed=2)
    batch = agent.batches[0]
    gone = set(range(12)) - set(batch.layers)
    assert gone
    touched = {int(name.split(".")[2]) for name in gradients(agent) if ".layers." in name}
    assert touched == set(batch.layers)


def test_checkpointed_gradients_are_the_same_numbers(folder: str) -> None:
    plain, again = gradients(agent_of(folder)), gradients(agent_of(folder, gradient_checkpointing=True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_bfloat16_is_float32_up_to_rounding(folder: str) -> None:
    exact, rounded = gradients(agent_of(folder)), gradients(agent_of(folder, dtype="bfloat16"))
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    one, other = (torch.cat([g.flatten() for g in each.values()]) for each in (exact, rounded))
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_low_rank_adapters_alone_are_trained(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    agent = agent_of(folder, lora_rank=2, learning_rate=1e-2)
    before = {name: value.clone() for name, value in agent.target.model.state_dict().items()}
    first = agent.iterate()["loss"]
    for _ in range(4):
        last = agent.iterate()["loss"]
    after = agent.target.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora" in name for name in changed)
    assert changed == {name for name in before if "lora" in name}
    assert last < first
    agent.save(tmp_path / "agent")
    loaded = SFT.load(tmp_path / "agent")
    assert numbers(loaded.iterate()) == numbers(agent.iterate())


@pytest.mark.parametrize(
    "changes", [{}, {"problems": 12, "skip": 0.5, "weight_decay": 0.1, "schedule": {"id": "linear", "iterations": 9}}]
)
def test_a_loaded_agent_goes_on_to_the_same_numbers(folder: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    agent = agent_of(folder, **changes)
    agent.iterate()
    agent.save(tmp_path / "agent")
    loaded = SFT.load(tmp_path / "agent")
    assert (loaded.iteration, loaded.step, loaded.num_timesteps) == (1, 2, agent.num_timesteps)
    for _ in range(2):
        assert numbers(loaded.iterate()) == numbers(agent.iterate())
    assert_equal(loaded, agent)


def test_an_iteration_is_its_steps(folder: str) -> None:
    """However the steps are cut into iterations."""
    together, apart = agent_of(folder, gradient_steps=4), agent_of(folder, gradient_steps=1)
    metrics = together.iterate()
    steps = [apart.iterate() for _ in range(4)]
    assert_equal(together, apart)
    assert together.step == apart.step == 4 and together.num_timesteps == apart.num_timesteps
    assert metrics["loss"] == pytest.approx(np.mean([one["loss"] for one in steps]))
    assert metrics["tokens"] == sum(one["tokens"] for one in steps)


def test_the_rate_goes_by_the_schedule_of_the_run(folder: str) -> None:
    agent = agent_of(folder, schedule={"id": "linear", "warmup": 2})
    with pytest.raises(UsageError, match="does not know where the run ends"):
        agent.iterate()
    rates = [agent.iterate(spent=lambda iterations, tokens: iterations / 6)["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    other = agent_of(folder, schedule={"id": "linear"})
    other.learn(10**4)  # tokens
    assert 0 < other.metrics["learning_rate"] < 1e-3 * (1 - (other.num_timesteps - other.metrics["tokens"] - 1) / 10**4)


def test_learn_is_iterate_until_a_callback_stops(folder: str) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 2

    one, other = agent_of(folder), agent_of(folder)
    one.learn(10**9, callback=Stop())
    for _ in range(2):
        other.iterate()
    assert one.iteration == 2
    assert_equal(one, other)
    one.learn(1)
    assert one.iteration == 3


def test_a_policy_given_with_a_temperature_is_trained_at_one(folder: str) -> None:
    policy = Policy.load(folder, dtype="float32")
    policy.temperature = 0.5
    plain, hot = gradients(agent_of(folder)), gradients(agent_of(policy))  # type: ignore[arg-type]
    assert all(torch.equal(plain[name], hot[name]) for name in plain)


def test_impossible_arguments_are_refused(folder: str, tmp_path: Path) -> None:
    for wrong in (
        {"batch_size": 0},
        {"gradient_steps": 0},
        {"schedule": {"id": "linear", "warmup": -1.0}},
        {"problems": -1},
        {"skip": 1.5},
        {"max_grad_norm": 0.0},
        {"lora_rank": -1},
        {"microbatch_tokens": 0},
        {"learning_rate": -1.0},
        {"dtype": "float8"},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            agent_of(folder, **wrong)
    with pytest.raises(UsageError, match=r"supervised step 1: loss nan.*float32"):
        broken = agent_of(folder)
        with torch.no_grad():
            next(broken.target.model.parameters()).fill_(float("nan"))
        broken.iterate()
