"""Supervised fine-tuning beside reinforced: it is budgeted and resumed; a report does without its rollouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.comparison.arms import arms
from benchmarks.comparison.differences import Pair, against
from benchmarks.comparison.grid import Grid
from benchmarks.comparison.plan import FinishedRuns
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.training import Training
from benchmarks.report.comparison import Comparison
from benchmarks.report.files import write
from benchmarks.report.words import summary
from benchmarks.run import main

SET = {
    "iterations": 4,
    "checkpoint_every": 2,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "gradient_steps": 2,
    "problems_per_batch": 2,
    "group_size": 2,
    "env.max_new_tokens": 36,
    "evaluation.problems": 6,
    "evaluation.every": 2,
    "evaluation.samples": 2,
}
OWN = {name: value for name, value in SET.items() if name not in ("problems_per_batch", "group_size")}


def trained(spec: RunSpec, folder: Path) -> dict[str, Any]:
    training = Training(spec, folder)
    for _ in training:
        pass
    return training.result


def numbers(folder: Path) -> Any:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in row.items() if not name.startswith("time/") and "second" not in name} for row in rows
    ]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    runs = tmp_path_factory.mktemp("runs")
    grid = Grid(title="Both", agents=("reft", "sft"), set=SET)
    made = arms(grid)
    assert made[1].missed == ("problems_per_batch=2", "group_size=2")
    for arm in made:
        for spec in arm.specs:
            trained(spec, runs / spec.hash)
    return Comparison.read(grid, made, runs, {}, "python -m benchmarks.compare")


def test_a_report_has_an_arm_that_rolls_nothing_out(compared: Comparison, tmp_path: Path) -> None:
    reft, sft = compared.groups[0].lines
    assert reft.tokens_per_second and reft.tokens_per_second > 0
    assert (sft.tokens_per_second, sft.kl, sft.ess, sft.D, sft.skip_ratio) == (None,) * 5
    assert sft.seconds_rollout == sft.seconds_reward == 0 < sft.seconds_update <= sft.seconds
    (pair,) = compared.groups[0].pairs
    assert isinstance(pair, Pair) and pair.speed_up_rollout is None
    assert list(pair.at_equal) == ["iteration", "tokens", "seconds"]
    assert min(one.budget for one in pair.at_equal.values()) > 0
    write(compared, tmp_path)
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| sft"))
    assert row.split("|")[6].strip() == "-"
    assert "rollout tokens a second" not in " ".join(summary(compared))
    stored = json.loads((tmp_path / "results.json").read_text())["groups"][0]
    assert stored["arms"][1]["tokens_per_second"] is None and stored["pairs"][0]["speed_up_rollout"] is None


def test_it_can_be_what_others_are_compared_with(compared: Comparison) -> None:
    reft, sft = compared.groups[0].arms
    pair, other = against(reft, sft), against(sft, reft)
    assert isinstance(pair, Pair) and isinstance(other, Pair) and pair.speed_up_rollout is None
    for axis in pair.at_equal:
        assert pair.at_equal[axis].difference.value == pytest.approx(-other.at_equal[axis].difference.value)


def test_tokens_are_those_trained_on(compared: Comparison) -> None:
    run = compared.groups[0].arms[1].runs[0]
    assert [row["updates"] for row in run.training] == [2] * 4
    assert run.result["tokens"] == run.rows[-1]["timesteps"] == sum(row["tokens"] for row in run.training)
    assert run.result["curve"][-1]["tokens"] == run.result["tokens"]


def test_its_cost_is_known_from_finished_runs(compared: Comparison, tmp_path: Path) -> None:
    spec = resolve("sft", settings=OWN)
    result = trained(spec, tmp_path / spec.hash)
    cost = FinishedRuns(tmp_path)(replace(spec, seed=1))
    assert cost is not None and cost.peak_bytes == result["peak_bytes"]
    assert cost.seconds == pytest.approx(result["seconds"] + result["seconds_evaluation"])
    larger = FinishedRuns(tmp_path)(resolve("sft", settings={**OWN, "batch_size": 12}))  # three times as many shown
    assert larger is not None
    assert larger.seconds == pytest.approx(3 * result["seconds"] + result["seconds_evaluation"])


@pytest.mark.parametrize("changes", [{}, {"problems": 10, "skip": 0.5, "lora_rank": 2}])
def test_interrupted_it_resumes_to_the_same_numbers(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    spec = resolve("sft", settings={**OWN, **changes})
    trained(spec, tmp_path / "whole")
    training = iter(Training(spec, tmp_path / "parts"))
    for _ in range(5):  # the evaluation at the start, two iterations, an evaluation, the third iteration
        next(training)
    training.close()
    assert (tmp_path / "parts" / "checkpoint").is_dir()
    trained(spec, tmp_path / "parts")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_budgets_of_tokens_and_of_seconds_end_it(tmp_path: Path) -> None:
    few = {**OWN, "evaluation.every": 0}
    del few["iterations"]
    result = trained(resolve("sft", settings={**few, "tokens": 400}), tmp_path / "tokens")
    rows = [row for row in numbers(tmp_path / "tokens") if "evaluation" not in row]
    assert rows[-1]["timesteps"] >= 400 > rows[-2]["timesteps"] and result["tokens"] == rows[-1]["timesteps"]
    result = trained(resolve("sft", settings={**few, "seconds": 1e-3}), tmp_path / "seconds")
    assert result["iterations"] == 1


def test_the_command_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--set={name}={value}" for name, value in {**OWN, "iterations": 1, "evaluation.every": 0}.items()]
    assert main(["--agent", "sft", "--runs", str(tmp_path), *given]) == 0
    said = capsys.readouterr()
    assert "held-out accuracy" in said.out and "rollout" not in said.out
    bare = tmp_path / "bare.jsonl"
    bare.write_text("\n".join(json.dumps({"question": f"What is {n} plus 1?", "answer": str(n + 1)}) for n in range(9)))
    wrong = [f"--set=env.problems={bare}", "--set=env.problem_options.subset=:5", "--set=evaluation.subset=5:"]
    assert main(["--agent", "sft", "--runs", str(tmp_path), *given, *wrong]) == 2
    assert "no worked solution to learn from" in capsys.readouterr().err
