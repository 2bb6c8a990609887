"""Problem samplers: uniform draws, and a curriculum that finds problems of middling difficulty."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import agents  # noqa: F401 (registers)
from agents.monitoring.metrics import success_rates
from agents.rollout import Rollout
from registry import UsageError, problem_samplers


def test_uniform_draws_without_replacement_while_it_can() -> None:
    sampler = problem_samplers.make("uniform")
    rng = np.random.default_rng(0)
    assert sorted(sampler.sample(10, 10, rng)) == list(range(10))
    assert len(sampler.sample(12, 10, rng)) == 12
    assert sampler.sample(5, None, rng).max() > 10_000


def simulate(sampler, rates: np.ndarray, batches: int, seed: int) -> np.ndarray:
    """Problems drawn in the last quarter of ``batches`` batches of 16, against known success rates."""
    rng = np.random.default_rng(seed)
    late = []
    for n in range(batches):
        chosen = sampler.sample(16, len(rates), rng)
        sampler.observe(chosen.tolist(), rng.binomial(8, rates[chosen]) / 8, 8)
        if n >= batches * 3 // 4:
            late.append(chosen)
    return np.concatenate(late)


def test_curriculum_wastes_fewer_groups_than_uniform() -> None:
    rates = np.concatenate([np.zeros(100), np.ones(100), np.full(56, 0.5)])

    def wasted(chosen: np.ndarray) -> float:
        return float(np.mean(rates[chosen] ** 8 + (1 - rates[chosen]) ** 8))

    adaptive = wasted(simulate(problem_samplers.make("curriculum", discount=1.0), rates, 120, 1))
    uniform = wasted(simulate(problem_samplers.make("uniform"), rates, 120, 1))
    assert adaptive < 0.3 < 0.7 < uniform


def test_curriculum_follows_a_target_that_moves() -> None:
    sampler = problem_samplers.make("curriculum", pool=4, explore=0.0, discount=0.5)
    for _ in range(20):
        sampler.observe([0], np.array([0.0]), 8)
    for _ in range(6):
        sampler.observe([0], np.array([0.5]), 8)
    right, wrong = sampler.state_dict()["0"]
    assert 0.45 < right / (right + wrong) <= 0.5


def test_curriculum_of_a_finite_source_reaches_all_of_it() -> None:
    sampler, rng = problem_samplers.make("curriculum", explore=0.0), np.random.default_rng(0)
    drawn = np.concatenate([sampler.sample(64, 7_473, rng) for _ in range(20)])
    assert drawn.max() > 7_000 and drawn.min() < 500
    assert max(sampler.sample(64, None, rng).max() for _ in range(20)) < sampler.pool


def test_a_curriculum_hears_of_successes_whatever_a_wrapper_makes_of_rewards() -> None:
    right = [True, False, True, True]
    for reward in ([1.0, 0.0, 1.0, 1.0], [-99.0, -100.0, -99.0, -99.0], [5.0, 4.0, 5.0, 5.0]):
        column = torch.zeros(4, 1, dtype=torch.int64)
        rollout = Rollout(
            prompts=(column[0],) * 4,
            tokens=column,
            mask=column == 0,
            behavior_logp=column.float(),
            reward=torch.tensor(reward),
            group=torch.tensor([0, 0, 1, 1]),
            episodes=tuple({"is_success": one} for one in right),
        )
        assert success_rates(rollout, 2).tolist() == [0.5, 1.0]


def test_curriculum_state_survives_json() -> None:
    one, two = problem_samplers.make("curriculum"), problem_samplers.make("curriculum")
    one.observe([3, 9], np.array([0.25, 1.0]), 8)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    draws = [s.sample(32, 64, np.random.default_rng(5)).tolist() for s in (one, two)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize("size", [None, 6])
def test_curriculum_goes_on_with_fewer_candidates(size: int | None) -> None:
    learned = problem_samplers.make("curriculum", pool=100)
    learned.observe([3, 70], np.array([0.0, 1.0]), 8)
    smaller = problem_samplers.make("curriculum", pool=6)
    smaller.load_state_dict(learned.state_dict())
    assert set(smaller.sample(50, size, np.random.default_rng(0)).tolist()) == set(range(6))
    assert smaller.state_dict() == learned.state_dict()


@pytest.mark.parametrize("field", [{"target": 1.0}, {"discount": 0.0}, {"pool": 0}, {"explore": 2.0}])
def test_curriculum_refuses_impossible_fields(field: dict) -> None:
    with pytest.raises(UsageError, match="curriculum"):
        problem_samplers.make("curriculum", **field)
