"""The exponential moving average of the weights: its closed form, what it leaves alone, evaluation and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agents import ReFT
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.summary import evaluation_rows, training_rows
from benchmarks.experiment.training import AVERAGED, Training
from policies import Policy
from registry import UsageError
from tests.oracles.reft_agents import CoinFlips, make, numbers, weights


@pytest.mark.parametrize("arguments", [{}, {"lora_rank": 4}], ids=["weights", "adapters"])
def test_it_is_the_sum_over_steps_and_changes_no_training(folder: str, arguments: dict[str, Any]) -> None:
    plain, agent = make(folder, minibatches=2, **arguments), make(folder, minibatches=2, ema_decay=0.9, **arguments)
    expected = weights(agent).clone()
    step = agent.optimizer.step
    seen = []

    def heard() -> None:
        step()
        seen.append(weights(agent).clone())

    agent.optimizer.step = heard  # type: ignore[method-assign]
    for _ in range(2):
        assert numbers(agent.iterate()) == numbers(plain.iterate())
    assert torch.equal(weights(agent), weights(plain)) and len(seen) == 4
    for one in seen:
        expected = 0.9 * expected + 0.1 * one
    with agent.averaged():
        torch.testing.assert_close(weights(agent), expected)
    assert torch.equal(weights(agent), weights(plain))
    agent.iterate()


def test_it_survives_saving(folder: str, tmp_path: Path) -> None:
    straight = make(folder, ema_decay=0.5)
    straight.iterate()
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16))
    for agent in (straight, resumed):
        agent.iterate()
    with straight.averaged(), resumed.averaged():
        assert torch.equal(weights(resumed), weights(straight))


def test_it_is_not_saved_in_place_of_the_weights(folder: str, tmp_path: Path) -> None:
    agent = make(folder, ema_decay=0.5)
    agent.iterate()
    with agent.averaged():
        with pytest.raises(UsageError, match="average is in place"):
            agent.save(tmp_path / "saved")
        agent.target.save(tmp_path / "model")
        averaged = weights(agent).clone()
    assert torch.equal(torch.cat([p.flatten() for p in Policy.load(tmp_path / "model").parameters()]), averaged)
    agent.save(tmp_path / "saved")
    assert numbers(ReFT.load(tmp_path / "saved", CoinFlips(16)).iterate()) == numbers(agent.iterate())


def train(folder: Path, stop: int | None = None, **settings: str) -> Training:
    given = {"group_size": "2", "problems_per_batch": "2", "iterations": "3", "evaluation.problems": "8"}
    given |= {"evaluation.samples": "2", "evaluation.every": "1", "checkpoint_every": "1", "learning_rate": "3e-3"}
    spec = resolve("reft", settings={**given, **settings})
    training = Training(spec, folder / spec.hash)
    for row in training:
        if stop is not None and row["iteration"] == stop and "evaluation" in row:
            break
    return training


def evaluations(training: Training) -> list[Any]:
    return [row["evaluation"] for row in evaluation_rows(training.rows)]


def test_a_run_measures_the_average_and_saves_it(tmp_path: Path) -> None:
    """A decay of nearly 1 keeps the start, so that every evaluation is that of before training."""
    plain = train(tmp_path / "plain")
    still = train(tmp_path / "still", ema_decay="0.99999999")
    assert [numbers(row) for row in training_rows(still.rows)] == [numbers(row) for row in training_rows(plain.rows)]
    start = evaluations(still)[0]
    assert evaluations(still)[-1]["sampled_right"] == start["sampled_right"]
    assert evaluations(still)[-1]["mean_length"] == start["mean_length"]
    assert evaluations(plain)[-1] != evaluations(plain)[0]
    averaged, trained = (
        Policy.load(str(still.folder / AVERAGED), dtype="float32"),
        Policy.load(str(still.folder / "model"), dtype="float32"),
    )
    begun = Policy.load("tiny")
    for mine, first, last in zip(averaged.parameters(), begun.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(mine, first, rtol=0, atol=1e-6)
        assert not torch.equal(last, first)
    assert (still.folder / AVERAGED / "tokenizer.json").is_file() == (
        still.folder / "model" / "tokenizer.json"
    ).is_file()
    assert not (plain.folder / AVERAGED).exists()


def test_a_killed_run_goes_on_with_its_average(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", ema_decay="0.5")
    train(tmp_path / "cut", stop=2, ema_decay="0.5")
    resumed = train(tmp_path / "cut", ema_decay="0.5")
    assert len(evaluations(resumed)) == 4
    assert evaluations(resumed) == evaluations(whole)


def test_a_decay_outside_of_its_range_is_refused(folder: str) -> None:
    with pytest.raises(UsageError, match="ema_decay=1"):
        make(folder, ema_decay=1.0)
