"""Whole iterations on a CUDA device give the CPU's numbers: what is drawn, what is measured, and the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import ReFT
from envs.vector import MathReasonVector
from tests.oracles.reft_agents import numbers, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ARMS: dict[str, dict[str, Any]] = {
    "reft": {},
    "nested": {"sampler": "uniform", "correction": "truncated-is"},
    "half layers": {"sampler": "attention-only", "correction": "retrace"},
    "heal": {"sampler": "even", "patch": "heal", "correction": "truncated-is"},
    "bytes": {"rollout_dtype": "int8", "correction": "truncated-is"},
    "defensive": {"sampler": "uniform", "correction": "truncated-is", "target_written": 1},
    "several steps": {"correction": "ppo-clip", "epochs": 2, "minibatches": 2},
    "sequence": {"sampler": "uniform", "correction": "gspo"},
    "consistency": {"sampler": "uniform", "correction": "truncated-is", "consistency": 0.5},
    "anchor": {"anchor": {"id": "kl", "beta": 0.1}},
    "entropy": {"entropy_bonus": 0.01},
    "replay": {"batch": {"id": "replay", "share": 0.5}, "correction": "truncated-is"},
    "reuse": {"batch": "reuse"},
    "drafts": {"sampler": "nested-draft"},
    "LoRA": {"lora_rank": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "micro-batches": {"microbatch_tokens": 200},
    "refill": {"refill_tokens": 4_000},
}


def iterate(device: str, iterations: int = 2, **arguments: Any) -> tuple[ReFT, list[dict[str, float]]]:
    env = MathReasonVector(num_envs=16, max_new_tokens=24, reward="random", problem_options={"limit": 6}, copy=False)
    given = {"group_size": 4, "problems_per_batch": 6, "learning_rate": 1e-4, "seed": 3, "dtype": "float32"}
    agent = ReFT("tiny", env, device=device, **given | arguments)
    return agent, [agent.iterate() for _ in range(iterations)]


@pytest.mark.parametrize("arm", ARMS)
def test_an_iteration_is_that_of_the_cpu(arm: str) -> None:
    """The first iteration's tokens are the same, and its numbers agree to the order of sums. Bytes are rounded apart by
    that, so that a token may differ, and all after it."""
    expected, (first, _) = iterate("cpu", **ARMS[arm])
    agent, (ours, second) = iterate("cuda", **ARMS[arm])
    near = 0.2 if arm == "bytes" else 2e-3
    for name in ("tokens", "rollout_reward", "grad_norm", "entropy", "sequences_used"):
        assert ours[name] == pytest.approx(first[name], rel=near, abs=1e-5), name
    assert all(not isinstance(value, float) or not math.isinf(value) for value in second.values())
    moved = weights(agent).cpu() - weights(expected)
    assert moved.abs().max() <= 4.1 * 1e-4  # two steps of Adam either way


def test_bfloat16_learns_what_float32_does() -> None:
    """Products in half precision: log mu is what the same weights score, and the step has the same direction."""
    _, (single, _) = iterate("cuda")
    agent, (half, _) = iterate("cuda", dtype="bfloat16")
    assert half["noise_kl"] < 1e-3
    assert half["grad_norm"] == pytest.approx(single["grad_norm"], rel=0.5)
    assert agent.target.dtype == torch.bfloat16


def test_a_checkpoint_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    straight, _ = iterate("cuda", sampler="uniform", correction="truncated-is")
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", straight.env, device="cuda")
    again, there = numbers(straight.iterate()), numbers(resumed.iterate())
    assert again.keys() == there.keys()
    assert again["tokens"] == there["tokens"] and again["rollout_reward"] == there["rollout_reward"]
