"""Reward parts by ``--set``: a run trains on verdict and parts, and is judged by the verdict alone."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.training import run
from benchmarks.measuring.durable import read_rows
from registry import UsageError

FORMAT, LENGTH = 0.25, 0.01
PARTS = [
    f"env.reward_parts.length-penalty.weight={LENGTH}",  # in any order
    "env.reward_parts=format,length-penalty",
    f"env.reward_parts.format.weight={FORMAT}",
]
SHORT = ["iterations=2", "problems_per_batch=4", "group_size=4", "env.max_new_tokens=24", "evaluation.problems=8"]


def test_the_rollouts_reward_is_accuracy_plus_the_parts_means(tmp_path) -> None:
    torch.set_num_threads(1)
    spec = resolve("reft", settings=[*SHORT, *PARTS])
    run(spec, tmp_path)
    rows = [row for row in read_rows(tmp_path / spec.hash / "metrics.jsonl")[0] if "rollout_reward" in row]
    assert len(rows) == 2
    for row in rows:
        readable = 1 - row.get("status/no_answer", 0.0) - row.get("status/malformed", 0.0)
        expected = row["rollout_accuracy"] + FORMAT * readable - LENGTH * row["mean_length"]
        assert row["rollout_reward"] == pytest.approx(expected, abs=1e-6)
    result = json.loads((tmp_path / spec.hash / "result.json").read_text())
    assert result["curve"][-1]["greedy"] == result["right_after"].count("1") / 8, "is_success stays the verifier's"


def test_a_spec_holds_the_parts_whole(tmp_path) -> None:
    spec = resolve("reft", settings=PARTS)
    assert spec.env["reward_parts"] == [
        {"id": "format", "weight": FORMAT, "name": "format_reward"},
        {"id": "length-penalty", "weight": LENGTH, "free_tokens": 0, "name": "length_penalty"},
    ]
    spec.write(tmp_path / "spec.json")
    assert RunSpec.read(tmp_path / "spec.json") == spec
    assert len({resolve("reft", settings=PARTS[:n]).hash if n != 1 else "" for n in (0, 1, 2, 3)}) == 4


def test_without_parts_a_spec_is_as_it_was_before_there_were_any() -> None:
    assert "reward_parts" not in resolve("reft").env
    assert resolve("reft", settings=["env.reward_parts="]) == resolve("reft")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["env.reward_parts=formt"], "did you mean 'format'"),
        (["env.reward_parts.format.weight=1"], "--set env.reward_parts=format as well"),
        (["env.reward_parts=length-penalty", "env.reward_parts.format.weight=1"], "=length-penalty,format as well"),
        (["env.reward_parts=format", "env.reward_parts.format.wieght=1"], "did you mean 'weight'"),
        (["env.reward_parts=format", "env.reward_parts.format.weight=much"], "not a valid float"),
        (["env.reward_parts=format", "env.reward_parts.format.weight=inf"], "finite number"),
    ],
)
def test_wrong_parts_are_refused_before_the_run(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve("reft", settings=settings)
