"""Training of some layers alone: their gradients are those of full training, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agents import SFT, ReFT
from agents.rollout import collect
from policies import Policy
from policies.model.weights import RolloutLinear
from registry import UsageError
from tests.oracles.reft_agents import CoinFlips, gradient_of, make, numbers, weights

CHOSEN = (1, 2)


def gradients(agent: Any) -> dict[str, torch.Tensor]:
    """Of an iteration, by name, of what has one."""
    gradient_of(agent, agent.iterate)
    return {name: p.grad for name, p in agent.target.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"anchor": "kl", "entropy_bonus": 0.1}],
    ids=["plain", "checkpointed", "bfloat16", "anchored"],
)
def test_gradients_are_those_of_full_training(folder: str, arguments: dict[str, Any]) -> None:
    every, some = gradients(make(folder, **arguments)), gradients(make(folder, trained_layers=CHOSEN, **arguments))
    assert some.keys() == {name for name in every if any(f"layers.{n}." in name for n in CHOSEN)}
    assert len(some) == 2 * len([name for name in every if "layers.0." in name])
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, every[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_else_moves_and_rollouts_are_of_what_did(folder: str, rank: int) -> None:
    pytest.importorskip("peft")
    agent = make(folder, trained_layers=CHOSEN, lora_rank=rank, weight_decay=0.1, ema_decay=0.9)
    before = {name: one.detach().clone() for name, one in agent.target.model.named_parameters()}
    for _ in range(2):
        agent.iterate()
    moved = {name for name, one in agent.target.model.named_parameters() if not torch.equal(one, before[name])}
    assert moved == {name for name, one in agent.target.model.named_parameters() if one.requires_grad}
    assert (
        {int(name.split("layers.")[1].split(".")[0]) for name in moved} == set(CHOSEN) == {*agent.target.trained_layers}
    )
    written = collect(agent.behavior(agent.all_layers, 5), agent.envs, [0, 1], 4)
    scored = agent.target.logprobs(written.prompts, written.tokens, written.mask)
    torch.testing.assert_close(scored[written.mask], written.behavior_logp[written.mask], rtol=1e-4, atol=1e-5)


def test_only_the_maps_of_trained_layers_are_copied_again(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make(folder, trained_layers=CHOSEN)
    agent.iterate()
    copied, refresh = [], RolloutLinear.refresh
    monkeypatch.setattr(RolloutLinear, "refresh", lambda self: (copied.append(self), refresh(self))[1])
    agent.target.rollout_weights()
    assert len(copied) == 4 * len(CHOSEN)  # each has four maps of as many inputs
    with torch.no_grad():
        agent.target.model.model.layers[0].mlp.down_proj.weight.mul_(2.0)  # frozen, and set by hand
    agent.target.refresh()
    agent.target.rollout_weights()
    assert len(copied) == 8 * len(CHOSEN) + 1


@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_agent_goes_on_to_the_same_numbers(folder: str, tmp_path: Path, rank: int) -> None:
    pytest.importorskip("peft")
    straight = make(folder, trained_layers=[2], lora_rank=rank)
    straight.iterate()
    straight.save(tmp_path / "saved")
    small: dict[str, Any] = {"group_size": 4, "problems_per_batch": 6, "learning_rate": 1e-2, "seed": 3}
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16), **small)  # the folder knows which layers
    assert resumed.target.trained_layers == (2,) and resumed.target.adapter_rank == rank
    assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))
    for other in ([1], [1, 2], None):
        with pytest.raises(UsageError, match=r"saved with the layers \[2\] trained"):
            ReFT.load(tmp_path / "saved", CoinFlips(16), **small, trained_layers=other)


def test_layers_frozen_by_hand_stay_so(folder: str, tmp_path: Path) -> None:
    policy = Policy.load(folder, dtype="float32")
    policy.train_only([3])
    small: dict[str, Any] = {"group_size": 4, "problems_per_batch": 6, "seed": 3}
    ReFT(policy, CoinFlips(16), **small).save(tmp_path / "saved")
    assert ReFT.load(tmp_path / "saved", CoinFlips(16), **small).target.trained_layers == (3,)


def test_demonstrations_train_them_as_well(folder: str) -> None:
    agent = SFT(folder, "MathReason-v0", trained_layers=[0], batch_size=2, gradient_steps=1, slots=1)
    before = weights(agent)
    agent.iterate()
    assert not torch.equal(weights(agent), before)
    assert agent.target.trained_layers == (0,)


@pytest.mark.parametrize("wrong", [[], [4], [-1], [1, 1], [0.5], "1", 1, [True, False, 1]])
def test_other_layers_than_the_models_are_refused(folder: str, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"trained_layers=.* 0 to 3, such as \[2\]"):
        make(folder, trained_layers=wrong)
