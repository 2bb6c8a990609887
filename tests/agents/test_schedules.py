"""Learning-rate schedules against transformers', through both loops, and after a resume; AdamW's own settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from agents import ReFT
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.summary import training_rows
from benchmarks.experiment.training import Training
from registry import UsageError, schedules
from tests.oracles.reft_agents import CoinFlips, make, numbers, weights

SMALL = {"group_size": "2", "problems_per_batch": "2", "evaluation.problems": "4", "evaluation.samples": "1"}


def rates(id: str, total: int, **fields: Any) -> list[float]:
    """By the share of a run of ``total`` iterations."""
    schedule = schedules.make(id, **fields)
    return [schedule(n, n / total, (n + 1) / total) for n in range(total)]


def upstream(make: Callable[..., Any], warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=total)
    factors = []
    for _ in range(total):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("id", "make"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_decays_are_those_of_transformers(id: str, make: Callable[..., Any], warmup: int) -> None:
    """After the warm-up; in it transformers' first step has the rate 0, where this one is a step ahead."""
    expected = upstream(make, warmup, 20)
    expected = [*expected[1 : warmup + 1], *expected[warmup:]]
    assert rates(id, 20, warmup=warmup) == pytest.approx(expected, abs=1e-12)
    assert rates(id, 20, warmup=warmup / 20) == pytest.approx(expected, abs=1e-12)


def test_floor_and_constant() -> None:
    assert rates("constant", 5, warmup=2) == [0.5, 1, 1, 1, 1]
    assert rates("linear", 4, floor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    half = schedules.make("cosine", floor=0.1)(5, 0.5, 0.6)
    assert half == pytest.approx(0.55)
    assert schedules.make("linear")(9, 1.0, 1.0) == 0.0


def test_a_warm_up_in_iterations_of_a_run_that_is_counted_in_tokens() -> None:
    """Iterations of unequal length: the rate is continuous where the warm-up ends, and 0 at the run's end."""
    schedule = schedules.make("linear", warmup=3)
    ends = [0.0, 0.1, 0.15, 0.3, 0.4, 0.7, 1.0]
    found = [schedule(n, begun, ended) for n, (begun, ended) in enumerate(pairwise(ends))]
    assert found[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    share = 3 * 0.4 / 4
    assert found[4] == pytest.approx((1 - 0.4) / (1 - share))
    assert schedule(6, 1.0, 1.0) == 0.0


@pytest.mark.parametrize(
    ("id", "fields"),
    [
        ("constant", {"warmup": -1}),
        ("linear", {"floor": 2}),
        ("cosine", {"iterations": 0}),
        ("linear", {"warmup": math.inf}),
    ],
)
def test_bad_fields(id: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        schedules.make(id, **fields)


def test_a_loop_of_ones_own_says_where_it_ends(folder: str) -> None:
    agent = make(folder, schedule={"id": "linear", "iterations": 4})
    assert [agent.iterate()["learning_rate"] for _ in range(3)] == pytest.approx([1e-2, 7.5e-3, 5e-3])
    for arguments in (
        {"schedule": "cosine"},
        {"schedule": {"id": "constant", "warmup": 0.1}},
        {"learning_rate": lambda left: 1e-2 * left},
    ):
        agent = make(folder, **arguments)
        with pytest.raises(UsageError, match="does not know where the run ends"):
            agent.iterate()
        assert agent.num_timesteps == 0
    agent = make(folder, learning_rate=lambda left: 1e-2 * left, schedule={"id": "constant", "iterations": 2})
    assert [agent.iterate()["learning_rate"] for _ in range(2)] == pytest.approx([1e-2, 5e-3])
    assert make(folder, schedule={"id": "constant", "warmup": 4}).iterate()["learning_rate"] == pytest.approx(2.5e-3)


def test_learn_goes_by_tokens(folder: str) -> None:
    agent = make(folder, schedule="linear")
    seen: list[tuple[int, float]] = []
    iterate = agent.iterate

    def heard(*given: Any) -> dict[str, float]:
        before = agent.num_timesteps
        metrics = iterate(*given)
        seen.append((before, metrics["learning_rate"]))
        return metrics

    agent.iterate = heard  # type: ignore[method-assign]
    agent.learn(500)
    assert len(seen) > 1
    for tokens, rate in seen:
        assert rate == pytest.approx(1e-2 * (1 - tokens / 500))


def test_learn_goes_on_with_the_tokens_that_are_left(folder: str, tmp_path: Path) -> None:
    straight = make(folder, schedule="cosine").learn(1000)
    stopped = make(folder, schedule="cosine")
    stopped.iterate(spent=lambda iterations, tokens: tokens / 1000)
    stopped.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16))
    resumed.learn(1000 - stopped.num_timesteps, reset_num_timesteps=False)
    assert resumed.iteration == straight.iteration > 2
    assert resumed.metrics["learning_rate"] == straight.metrics["learning_rate"] < 1e-2
    assert torch.equal(weights(resumed), weights(straight))


def test_a_saved_agent_goes_on_along_its_schedule(folder: str, tmp_path: Path) -> None:
    given = {"schedule": {"id": "cosine", "warmup": 2, "iterations": 5}, "adam_betas": (0.8, 0.95), "adam_eps": 1e-4}
    straight = make(folder, **given)
    straight.iterate()
    straight.iterate()
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16))
    assert resumed.adam_betas == (0.8, 0.95) and resumed.schedule == straight.schedule
    for _ in range(2):
        assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))
    other = ReFT.load(tmp_path / "saved", CoinFlips(16), adam_betas=(0.9, 0.9), adam_eps=1e-3)
    assert other.optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    assert other.optimizer.param_groups[0]["eps"] == 1e-3


def run_rates(tmp_path: Path, stop: int | None = None, **settings: str) -> list[float]:
    given = {**SMALL, **settings}
    spec = resolve("reft", settings=given)
    training = Training(spec, tmp_path / spec.hash)
    for row in training:
        if stop is not None and row["iteration"] == stop and "evaluation" not in row:
            break
    return [row["learning_rate"] for row in training_rows(training.rows)]


def test_a_run_has_its_schedule_from_the_command_line_and_keeps_it_when_resumed(tmp_path: Path) -> None:
    settings = {"schedule": "linear", "schedule.warmup": "2", "iterations": "6", "checkpoint_every": "1"}
    expected = [3e-4 * factor for factor in rates("linear", 6, warmup=2)]
    assert run_rates(tmp_path / "whole", **settings) == pytest.approx(expected)
    run_rates(tmp_path / "cut", stop=3, **settings)
    assert run_rates(tmp_path / "cut", **settings) == pytest.approx(expected)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of runs that no load of the machine slows: 4 ms at each look."""
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: 0.004 * next(ticks), process_time=lambda: 0.0)
    monkeypatch.setattr("benchmarks.experiment.training.time", clock)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("budget", [{"tokens": "300"}, {"seconds": "0.5"}])
def test_every_budget_ends_a_schedule(tmp_path: Path, budget: dict[str, str]) -> None:
    found = run_rates(tmp_path, schedule="linear", **budget)
    assert found[0] == pytest.approx(3e-4, rel=0.01)
    assert all(later < earlier for earlier, later in pairwise(found))
    assert len(found) > 1


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("budget", [{"iterations": "4"}, {"tokens": "300"}, {"seconds": "0.5"}])
def test_a_warm_up_in_shares_learns_from_the_first_iteration_on(tmp_path: Path, budget: dict[str, str]) -> None:
    found = run_rates(tmp_path, **{"schedule.warmup": "0.9", **budget})
    assert 0 < found[0] < 3e-4


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"adam_betas": (0.9, 1.0)}, "adam_betas"), ({"adam_betas": 0.9}, "two numbers"), ({"adam_eps": 0.0}, "adam_eps")],
)
def test_wrong_settings_of_adam(folder: str, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        make(folder, **arguments)


def test_adam_has_the_betas_and_epsilon_of_the_command_line(tmp_path: Path) -> None:
    from benchmarks.experiment.training import make_agent

    agent = make_agent(resolve("reft", settings={**SMALL, "adam_betas": "0.9,0.95", "adam_eps": "1e-6"}))
    assert agent.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert agent.optimizer.param_groups[0]["eps"] == 1e-6
