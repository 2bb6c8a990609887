"""Low-rank adapters and gradient checkpointing as arguments of an agent, against full weights and the chain rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import ReFT
from agents.rollout import collect
from policies import Policy
from policies.pretrained.adapters import TARGETS, factors, merged_weight
from registry import UsageError
from tests.oracles.reft_agents import CoinFlips, gradient_of, make, numbers, weights

pytest.importorskip("peft")


def projections(agent: ReFT) -> dict[str, Any]:
    """Every projection of every layer, with or without an adapter, by name."""
    modules = dict(agent.target.model.named_modules())
    return {name: module for name, module in modules.items() if name.split(".")[-1] in TARGETS}


def test_gradients_of_the_factors_are_those_of_the_weights_by_the_chain_rule(folder: str) -> None:
    """W = W0 + 2 B A, so dA = 2 B^T dW, which is 0 at first, and dB = 2 dW A^T."""
    plain, low = make(folder), make(folder, lora_rank=3)
    gradient_of(plain, plain.iterate)
    gradient_of(low, low.iterate)
    assert numbers(low.metrics)["tokens"] == numbers(plain.metrics)["tokens"]
    assert len(projections(plain)) == 7 * 4
    for name, module in projections(plain).items():
        down, up, _ = factors(projections(low)[name])  # type: ignore[misc]
        assert torch.equal(down.grad, torch.zeros_like(down))
        assert up.grad.abs().max() > 0
        torch.testing.assert_close(up.grad, 2 * module.weight.grad @ down.detach().T, rtol=1e-3, atol=1e-6)


def test_full_rank_is_full_training_at_a_fourth_of_the_rate(folder: str) -> None:
    """With A^T A = I a step of gradient descent on B moves W by 2^2 times that on W itself."""
    plain, low = make(folder), make(folder, lora_rank=64)
    for module in projections(low).values():
        down, _, _ = factors(module)  # type: ignore[misc]
        with torch.no_grad():
            down.copy_(torch.eye(*down.shape))
    low.target.refresh()
    before = {name: module.weight.detach().clone() for name, module in projections(plain).items()}
    for agent, rate in ((plain, 4e-2), (low, 1e-2)):
        agent.update.optimizer = agent.optimizer = torch.optim.SGD(agent.target.parameters())
        agent.update.max_grad_norm = float("inf")
        agent.lr_schedule = lambda _, rate=rate: rate
        agent.iterate()
    for name, module in projections(plain).items():
        moved = merged_weight(projections(low)[name]) - before[name]
        assert moved.abs().max() > 1e-6
        torch.testing.assert_close(moved, module.weight.detach() - before[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("arguments", [{}, {"sampler": "uniform", "correction": "token-is", "rollout_dtype": "int8"}])
def test_training_moves_the_factors_alone_and_rollouts_have_them(folder: str, arguments: dict[str, Any]) -> None:
    agent = make(folder, lora_rank=2, **arguments)
    assert all("lora_" in name for name, p in agent.target.model.named_parameters() if p.requires_grad)
    assert sum(p.numel() for p in agent.target.parameters()) == sum(
        2 * sum(module.weight.shape) for module in projections(agent).values()
    )
    before = {name: p.detach().clone() for name, p in agent.target.model.named_parameters()}
    metrics = [agent.iterate() for _ in range(3)]
    for name, parameter in agent.target.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    if not arguments:  # what writes is what is trained
        assert all(abs(each["kl_k1"]) < 1e-4 for each in metrics)


def test_a_saved_agent_is_a_plain_model_with_the_same_logits(folder: str, tmp_path: Path) -> None:
    agent = make(folder, lora_rank=2)
    agent.iterate()
    agent.save(tmp_path / "saved")
    ids = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {name for name, _ in found.named_parameters()} == {
        name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
    }
    merged = dict(found.named_modules())
    for name, module in projections(agent).items():
        assert torch.equal(merged[name].weight, merged_weight(module))
        assert not torch.equal(merged[name].weight, module.weight)
    torch.testing.assert_close(found(ids).logits, agent.target.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert Policy.load(str(tmp_path / "saved"), dtype="float32").adapter_rank == 0


@pytest.mark.parametrize("given", [{}, {"sampler": "uniform", "correction": "retrace", "patch": "heal"}])
def test_a_saved_agent_with_adapters_goes_on_to_the_same_numbers(
    folder: str, tmp_path: Path, given: dict[str, Any]
) -> None:
    given = {**given, "minibatches": 2, "lora_rank": 2, "weight_decay": 0.1}
    straight = make(folder, **given)
    straight.iterate()
    straight.iterate()
    straight.save(tmp_path / "saved")
    del given["lora_rank"]  # the folder knows
    small = {"group_size": 4, "problems_per_batch": 6, "learning_rate": 1e-2, "seed": 3}
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16), **small, **given)
    assert resumed.lora_rank == resumed.target.adapter_rank == 2
    for _ in range(2):
        assert numbers(resumed.iterate()) == numbers(straight.iterate())
    state, expected = resumed.target.model.state_dict(), straight.target.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_adapters_made_by_hand_go_on_as_well(folder: str, tmp_path: Path) -> None:
    policy = Policy.load(folder, dtype="float32")
    policy.add_adapters(rank=3, alpha=30, seed=7)
    small: dict[str, Any] = {"group_size": 4, "problems_per_batch": 6, "seed": 3}
    straight = ReFT(policy, CoinFlips(16), **small)
    straight.iterate()
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16), **small)
    assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))


def test_other_ranks_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lora_rank=-1"):
        make(folder, lora_rank=-1)
    make(folder, lora_rank=2).save(tmp_path / "low")
    make(folder).save(tmp_path / "full")
    for saved, had, rank in (("low", 2, 4), ("low", 2, 0), ("full", 0, 4)):
        with pytest.raises(UsageError, match=f"saved with lora_rank={had}.* lora_rank={rank}: give {had}"):
            ReFT.load(tmp_path / saved, CoinFlips(4), lora_rank=rank)
    policy = Policy.load(folder, dtype="float32")
    policy.add_adapters(rank=2)
    with pytest.raises(UsageError, match="already"):
        ReFT(policy, CoinFlips(4), lora_rank=2)


def test_what_bfloat16_has_trained_does_not_go_on_in_float32(folder: str, tmp_path: Path) -> None:
    make(folder, lora_rank=2, dtype="bfloat16").save(tmp_path / "saved")
    assert ReFT.load(tmp_path / "saved", CoinFlips(4)).target.dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"adapters in bfloat16.*leave dtype out"):
        ReFT.load(tmp_path / "saved", CoinFlips(4), dtype="float32")


def test_equal_seeds_give_equal_adapters_whatever_was_drawn_before(folder: str) -> None:
    first = weights(make(folder, lora_rank=2))
    torch.manual_seed(99)
    assert torch.equal(weights(make(folder, lora_rank=2)), first)
    drawn = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(1), drawn)  # and nothing is drawn from the global generator
    assert not torch.equal(weights(make(folder, lora_rank=2, seed=4)), first)


@pytest.mark.parametrize("given", [{}, {"lora_rank": 2}, {"sampler": "uniform", "consistency": 1.0}])
def test_gradient_checkpointing_changes_no_number(folder: str, given: dict[str, Any]) -> None:
    given = {"minibatches": 2, "epochs": 2, "microbatch_tokens": 120, **given}
    plain, saving = make(folder, **given), make(folder, gradient_checkpointing=True, **given)
    assert saving.target.gradient_checkpointing and not plain.target.gradient_checkpointing
    for _ in range(2):
        assert numbers(saving.iterate()) == numbers(plain.iterate())
    assert torch.equal(weights(saving), weights(plain))


def test_gradient_checkpointing_keeps_a_third_at_most(folder: str) -> None:
    """What the backward of a forward keeps, in numbers, beside the weights themselves."""

    def kept(agent: ReFT) -> int:
        own = {p.data_ptr() for p in agent.target.model.parameters()}
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        prompts = [torch.arange(1, 30)] * 4
        tokens = torch.arange(4 * 40).view(4, 40)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            agent.target.logprobs(prompts, tokens, torch.ones_like(tokens).bool()).sum()
        return sum(sizes.values())

    assert kept(make(folder, gradient_checkpointing=True)) < kept(make(folder)) / 3


def test_gradient_checkpointing_of_transformers_own_layers_is_refused(folder: str) -> None:
    policy = Policy.load(folder, dtype="float32")
    policy.functional = False
    with pytest.raises(UsageError, match="gradient_checkpointing out"):
        ReFT(policy, CoinFlips(4), gradient_checkpointing=True)


def test_in_bfloat16_what_writes_is_what_is_trained(folder: str) -> None:
    """Rollouts multiply by W + B A rounded once, and so does the score: their distance is that of the plain model's,
    not that of a sum of two rounded products, which is as large as what a step changes."""

    def distance(spread: float) -> float:
        policy = Policy.load(folder, dtype="bfloat16")
        policy.add_adapters(rank=8, alpha=16, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        policy.refresh()
        env = CoinFlips(16)
        rollout = collect(policy.behavior(tuple(range(4)), 16, env.task.max_length), env, range(16), 4)
        with torch.no_grad():
            scored = policy.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
        return float((scored - rollout.behavior_logp)[rollout.mask].abs().mean())

    assert 0 < distance(0.05) < 2 * distance(0.0)
