"""Refill of groups without signal: which groups the update sees, what is counted, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import ReFT
from agents.batches.refill import batch_of, has_signal
from agents.rollout import Rollout
from envs.vector import MathReasonVector
from registry import UsageError
from tests.agents.test_distributed import in_processes
from tests.oracles.reft_agents import gradient_of, make, numbers, weights, write_batch


def pairs(folder: str, slots: int = 16, **arguments: Any) -> ReFT:
    """Groups of two coins: half of them have no signal."""
    given = {"group_size": 2, "problems_per_batch": 8, "learning_rate": 1e-2, "seed": 3, **arguments}
    envs = MathReasonVector(num_envs=slots, max_new_tokens=8, reward="random", copy=False)
    return ReFT(folder, envs, **given)


def seen_by_update(agent: ReFT) -> tuple[list[Rollout], dict[str, float]]:
    seen: list[Rollout] = []
    update = agent.update

    class Heard:
        def __getattr__(self, name: str) -> Any:
            return getattr(update, name)

        def __call__(self, rollout: Rollout, *given: Any) -> dict[str, float]:
            seen.append(rollout)
            return update(rollout, *given)

    agent.update = Heard()  # type: ignore[assignment]
    return seen, agent.iterate()


def test_all_groups_of_the_update_have_signal_and_all_tokens_count(folder: str) -> None:
    plain = pairs(folder)
    first = plain.iterate()
    assert 0 < first["groups_with_signal"] < 1
    agent = pairs(folder, refill_tokens=10_000)
    rounds: list[Rollout] = []
    rollout = agent.rollout
    agent.rollout = lambda *given, **named: rounds.append(rollout(*given, **named)) or rounds[-1]  # type: ignore
    (batch,), metrics = seen_by_update(agent)
    assert len(batch) == 16 and bool(has_signal(batch, 2).all())
    assert metrics["sequences_used"] == 16
    assert metrics["refill_groups"] > 0
    assert metrics["tokens"] == agent.num_timesteps == first["tokens"] + metrics["refill_tokens"]
    written = 8 + metrics["refill_groups"]
    assert metrics["groups_with_signal"] * written == pytest.approx(8)
    assert len(agent.ep_info_buffer) == 2 * written
    plain_again = pairs(folder)
    first_round, _ = write_batch(plain_again, np.random.default_rng([3, 0]))
    assert torch.equal(rounds[0].tokens, first_round.tokens), "the first round is the batch without refill"
    numbers_of_groups = [number for one in rounds for number in one.group.tolist()]
    assert numbers_of_groups == [n // 2 for n in range(2 * int(written))], "every group has random numbers of its own"


def test_the_update_is_that_of_the_groups_with_signal(folder: str) -> None:
    agent, other = pairs(folder, refill_tokens=10_000), pairs(folder)
    (batch,), _ = seen_by_update(agent)
    advantage = other.advantage(batch.reward, batch.group)
    other.update(batch, advantage, np.random.default_rng([3, 0]))
    torch.testing.assert_close(weights(agent), weights(other), rtol=1e-4, atol=1e-5)


def test_a_budget_ends_it_after_the_round_that_uses_it_up(folder: str) -> None:
    agent = pairs(folder, refill_tokens=1)
    (batch,), metrics = seen_by_update(agent)
    signal = int(has_signal(batch, 2).sum())
    first = pairs(folder).iterate()
    lacking = round(8 * (1 - first["groups_with_signal"]))
    assert metrics["refill_groups"] == lacking, "one round"
    assert len(batch) == 16 and signal < 8, "silent groups fill the batch up"


def test_parts_of_the_reward_are_no_signal(folder: str) -> None:
    """DAPO's eq. 11 counts right completions: lengths that are punished differently do not make a group worth more."""
    part = {"id": "length-penalty", "weight": 0.01}
    stops = tuple(range(2, 512, 6))
    task = {"max_new_tokens": 8, "reward": "random", "stop_token_ids": stops, "reward_parts": (part,)}
    envs = MathReasonVector(num_envs=16, copy=False, **task)
    given = {"group_size": 2, "problems_per_batch": 8, "seed": 3, "refill_tokens": 10_000}
    (batch,), metrics = seen_by_update(ReFT(folder, envs, **given))
    assert metrics["refill_groups"] > 0 and metrics["groups_with_signal"] > 0.9, "lengths differ nearly everywhere"
    verdicts = torch.tensor([info["verdict_reward"] for info in batch.episodes]).view(-1, 2)
    assert bool((verdicts.sum(1) == 1).all())


def test_batch_keeps_signal_and_order() -> None:
    reward = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0], [0, 0], [0, 1]]).float().flatten()
    count = len(reward)
    rollout = Rollout(
        prompts=(torch.zeros(1, dtype=torch.long),) * count,
        tokens=torch.arange(count)[:, None],
        mask=torch.ones(count, 1, dtype=torch.bool),
        behavior_logp=torch.zeros(count, 1),
        reward=reward,
        group=torch.arange(count) // 2,
        episodes=({},) * count,
    )
    assert batch_of(rollout, 2, 3).group.tolist() == [1, 1, 3, 3, 5, 5]
    assert batch_of(rollout, 2, 4).group.tolist() == [0, 0, 1, 1, 3, 3, 5, 5]
    assert batch_of(rollout, 2, 2).group.tolist() == [1, 1, 3, 3]
    assert batch_of(rollout, 2, 6) is rollout


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sampler": "uniform", "correction": "self-normalised", "problem_sampler": "curriculum"},
        {"sampler": "fixed", "correction": "defensive", "target_written": 1},
        {"anchor": {"id": "kl", "beta": 0.1, "estimator": "k1", "place": "reward"}},
    ],
    ids=["reft", "curriculum", "defensive", "anchor"],
)
def test_it_resumes_and_is_the_same_in_two_processes(folder: str, tmp_path: Path, arguments: dict[str, Any]) -> None:
    def trained(slots: int = 8) -> tuple[dict[str, Any], np.ndarray]:
        torch.set_num_threads(1)
        agent = pairs(folder, slots, refill_tokens=300, **arguments)
        agent.optimizer.param_groups[0]["eps"] = 1e-2  # Adam's first steps turn rounding into whole steps
        found = {f"{n} {name}": v for n in range(2) for name, v in numbers(agent.iterate()).items()}
        return {**found, "timesteps": agent.num_timesteps}, weights(agent).numpy()

    metrics, after = trained()
    assert metrics["0 refill_groups"] > 0
    for found in [*in_processes(2, trained, tmp_path), trained(slots=5)]:
        assert not isinstance(found, str), found
        for name, value in metrics.items():
            assert found[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(found[1], after, rtol=1e-4, atol=1e-5)

    straight = pairs(folder, refill_tokens=300, **arguments)
    straight.iterate()
    straight.save(tmp_path / "saved")
    envs = MathReasonVector(num_envs=16, max_new_tokens=8, reward="random", copy=False)
    resumed = ReFT.load(tmp_path / "saved", envs)
    assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))


def test_micro_batches_change_nothing(folder: str) -> None:
    whole, parts = (pairs(folder, refill_tokens=500, microbatch_tokens=tokens) for tokens in (None, 120))
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)


def test_wrong_budgets(folder: str) -> None:
    with pytest.raises(UsageError, match="refill_tokens=-1"):
        make(folder, refill_tokens=-1)
    with pytest.raises(UsageError, match="one completion is no signal"):
        make(folder, refill_tokens=10, group_size=1, advantage="reinforce")
