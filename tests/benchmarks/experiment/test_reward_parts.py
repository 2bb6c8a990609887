"""Reward parts by ``--set``: a run trains on verdict and parts, and is judged by the verdict alone."""

from __future__ import annotations

import json

import gymnasium as gym
import pytest
import torch

from agents import ReFT
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.training import run
from benchmarks.measuring.durable import read_rows
from registry import UsageError

FORMAT, LENGTH = 0.25, 0.01
PARTS = {
    "env.reward_parts.length-penalty.weight": str(LENGTH),  # in any order
    "env.reward_parts": "format,length-penalty",
    "env.reward_parts.format.weight": str(FORMAT),
}
SHORT = {
    "iterations": 2,
    "problems_per_batch": 4,
    "group_size": 4,
    "env.max_new_tokens": 24,
    "evaluation.problems": 8,
}


def test_the_rollouts_reward_is_accuracy_plus_the_parts_means(tmp_path) -> None:
    torch.set_num_threads(1)
    spec = resolve("reft", settings={**SHORT, **PARTS})
    run(spec, tmp_path)
    rows = [row for row in read_rows(tmp_path / spec.hash / "metrics.jsonl")[0] if "rollout_reward" in row]
    assert len(rows) == 2
    for row in rows:
        readable = 1 - row.get("status/no_answer", 0.0) - row.get("status/malformed", 0.0)
        expected = row["rollout_accuracy"] + FORMAT * readable - LENGTH * row["mean_length"]
        assert row["rollout_reward"] == pytest.approx(expected, abs=1e-6)
    result = json.loads((tmp_path / spec.hash / "result.json").read_text())
    assert result["curve"][-1]["greedy"] == result["right_after"].count("1") / 8, "is_success stays the verifier's"


def test_a_curriculum_learns_from_the_verdicts_alone() -> None:
    """A part may make a group's reward negative; the evidence on a problem stays a count of right and wrong ones."""
    torch.set_num_threads(1)
    fine = ({"id": "length-penalty", "weight": 5.0},)
    env = gym.make_vec("MathReason-v0", num_envs=16, max_new_tokens=24, reward_parts=fine)
    agent = ReFT("tiny", env, problem_sampler="curriculum", problems_per_batch=4, group_size=4, seed=0)
    agent.iterate()
    assert agent.metrics["rollout_reward"] < -1
    evidence = list(agent.problem_sampler.state_dict().values())
    assert len(evidence) == 4 and all(right + wrong == 4 and right in range(5) for right, wrong in evidence)
    assert sum(right for right, _ in evidence) == agent.metrics["rollout_accuracy"] * 16
    agent.iterate()


def test_a_spec_holds_the_parts_whole(tmp_path) -> None:
    spec = resolve("reft", settings=PARTS)
    assert spec.env["reward_parts"] == [
        {"id": "format", "weight": FORMAT, "name": "format_reward"},
        {"id": "length-penalty", "weight": LENGTH, "free_tokens": 0, "name": "length_penalty"},
    ]
    spec.write(tmp_path / "spec.json")
    assert RunSpec.read(tmp_path / "spec.json") == spec
    typed = {"env.reward_parts": [{"id": "format", "weight": FORMAT}, {"id": "length-penalty", "weight": LENGTH}]}
    assert resolve("reft", settings=typed) == spec
    assert len({resolve("reft", settings=some).hash for some in ({}, {"env.reward_parts": "format"}, PARTS)}) == 3


def test_no_parts_are_said_to_be_none() -> None:
    assert resolve("reft").env["reward_parts"] == []
    assert resolve("reft", settings={"env.reward_parts": ""}) == resolve("reft")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"": "formt"}, "did you mean 'format'"),
        ({".format.weight": "1"}, "--set env.reward_parts=format as well"),
        ({"": "length-penalty", ".format.weight": "1"}, "=length-penalty,format as well"),
        ({"": "format", ".format.wieght": "1"}, "did you mean 'weight'"),
        ({"": "format", ".format.weight": "much"}, "not a valid float"),
        ({"": "format", ".format.weight": "inf"}, "finite number"),
    ],
)
def test_wrong_parts_are_refused_before_the_run(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve("reft", settings={f"env.reward_parts{name}": value for name, value in settings.items()})
