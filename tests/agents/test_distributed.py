"""Data parallelism: two real gloo processes give the single process's numbers up to the order of sums."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.distributed import Ranks, join
from benchmarks.experiment import follows
from policies import Policy
from registry import UsageError
from tests.oracles.reft_agents import make, numbers, weights

Found = tuple[dict[str, Any], np.ndarray]


def in_processes(size: int, act: Callable[[], Found], out: Path) -> list[Found | str]:
    """What ``act`` gives, or its error, in each of ``size`` forked processes that are one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                metrics, tensor = act()
                np.save(out / f"{rank}.npy", tensor)
                (out / f"{rank}.json").write_text(json.dumps(metrics))
            except BaseException as error:
                (out / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    errors = {int(path.stem): path.read_text() for path in out.glob("*.txt")}
    return [
        errors[rank]
        if rank in errors
        else (json.loads((out / f"{rank}.json").read_text()), np.load(out / f"{rank}.npy"))
        for rank in range(size)
    ]


def trained(folder: str, iterations: int = 2, **arguments: Any) -> Found:
    """Metrics of all iterations and the weights after them."""
    torch.set_num_threads(1)
    agent = make(folder, slots=8, **arguments)
    # Adam's first steps turn rounding of a near-zero gradient into a whole step; a large epsilon does not.
    agent.optimizer.param_groups[0]["eps"] = 1e-2
    found = {}
    for n in range(iterations):
        found |= {f"{n} {name}": value for name, value in numbers(agent.iterate()).items()}
    return {**found, "timesteps": agent.num_timesteps}, weights(agent).numpy()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sampler": "uniform", "correction": "self-normalised"},  # sees the whole batch
        {"sampler": "fixed", "correction": "token-is*ppo-clip", "minibatches": 2, "epochs": 2},
        {"sampler": "fixed", "correction": "defensive", "minibatches": 2, "target_written": 2},
        {"sampler": "fixed", "correction": "sequence-is", "problem_sampler": "curriculum", "problems_per_batch": 3},
        {"sampler": "lowest-kl", "patch": "heal"},  # measured before the first rollout, patched from the second on
        {"sampler": {"id": "budget", "budget": 5.0}, "patch": {"id": "absorb", "every": 1}, "correction": "retrace"},
        {"problems_per_batch": 1, "group_size": 8, "aggregation": "sequence-mean"},  # one process has no group
        {"lora_rank": 4, "gradient_checkpointing": True, "minibatches": 2},
    ],
    ids=["reft", "batch-scope", "epochs", "defensive", "ragged", "heal", "budget-absorb", "one-group", "adapters"],
)
def test_two_processes_give_the_numbers_of_one(folder: str, tmp_path: Path, arguments: dict[str, Any]) -> None:
    metrics, after = trained(folder, **arguments)
    assert any(metrics[f"{n} grad_norm"] > 1e-3 for n in range(2))
    assert ("1 patch/residual" in metrics) == ("patch" in arguments)
    both = in_processes(2, lambda: trained(folder, **arguments), tmp_path)
    for found in both:
        assert not isinstance(found, str), found
        assert found[0].keys() == metrics.keys()
        for name, value in metrics.items():
            assert found[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(found[1], after, rtol=1e-4, atol=1e-5)
    assert np.array_equal(both[0][1], both[1][1])  # the processes themselves cannot drift apart


def test_parts_are_whole_contiguous_and_balanced() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 8):
        ranks = [Ranks(rank, size) for rank in range(size)]
        cost = torch.from_numpy(rng.integers(1, 50, size=40))
        index = torch.arange(100, 140)
        parts = [one.part(index, cost) for one in ranks]
        assert torch.equal(torch.cat(parts), index)
        assert max(int(cost[part - 100].sum()) for part in parts) <= int(cost.sum()) / size + 50
        shares = [list(range(7))[one.share(7)] for one in ranks]
        assert [n for share in shares for n in share] == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_callback_that_stops_one_process_stops_all(folder: str, tmp_path: Path) -> None:
    from stable_baselines3.common.callbacks import BaseCallback

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.model.ranks.leader or self.n_calls < 3

    def act() -> Found:
        agent = make(folder).learn(10_000, callback=Stop())
        return {"iteration": agent.iteration}, weights(agent).numpy()

    for found in in_processes(2, act, tmp_path):
        assert not isinstance(found, str) and found[0] == {"iteration": 0}


def test_processes_must_have_the_same_weights_and_seed(folder: str, tmp_path: Path) -> None:
    def act() -> Found:
        return trained(folder, seed=int(os.environ["RANK"]))

    for found in in_processes(2, act, tmp_path):
        assert isinstance(found, str) and found.startswith("UsageError") and "different seeds" in found


@pytest.mark.parametrize("rank", [0, 2])
def test_frozen_weights_must_be_the_same_as_well(folder: str, tmp_path: Path, rank: int) -> None:
    def act() -> Found:
        policy = Policy.load(folder, dtype="float32")
        with torch.no_grad():
            policy.model.model.norm.weight += int(os.environ["RANK"])
        policy.refresh()
        return trained(policy, lora_rank=rank)  # type: ignore[arg-type]

    for found in in_processes(2, act, tmp_path):
        assert isinstance(found, str) and found.startswith("UsageError") and "different weights" in found


def test_a_process_that_dies_ends_the_others_with_an_error(folder: str, tmp_path: Path) -> None:
    def act() -> Found:
        agent = make(folder)
        agent.iterate()
        if agent.ranks.rank == 1:
            raise ValueError("out of luck")
        agent.iterate()
        return {}, np.zeros(0)

    first, second = in_processes(2, act, tmp_path)
    assert isinstance(first, str) and first.startswith("UsageError: another process of this run has ended")
    assert second == "ValueError: out of luck"


def test_a_run_of_two_processes_goes_on_to_the_numbers_of_one(tmp_path: Path) -> None:
    """Evaluations, checkpoints and rows included; interrupted in both processes on the way."""
    from benchmarks.experiment.training import Training
    from benchmarks.measuring.durable import read_rows
    from tests.oracles.small_world import small

    spec = small()

    def rows_of(run: Path) -> list[dict[str, Any]]:
        return read_rows(run / "metrics.jsonl")[0]

    def act(rows: int) -> Found:
        torch.set_num_threads(1)
        training = iter(Training(spec, tmp_path / "two"))
        for _, _ in zip(range(rows), training, strict=False):
            pass
        training.close()
        return {}, np.zeros(0)

    for rows in (5, 99):
        out = tmp_path / f"out{rows}"
        out.mkdir()
        assert not [found for found in in_processes(2, lambda rows=rows: act(rows), out) if isinstance(found, str)]
    torch.set_num_threads(1)
    list(Training(spec, tmp_path / "one"))
    two = rows_of(tmp_path / "two")
    for row, expected in zip(two, rows_of(tmp_path / "one"), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float) and "time" not in name and "second" not in name:
                assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert row.get("evaluation", {}).get("right") == expected.get("evaluation", {}).get("right")
    assert {"result.json", "model"} <= set(os.listdir(tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["processes"] == 2


def test_a_cluster_s_variables_of_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    for alone in ("", "1", " 1"):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert join() == Ranks() and not follows()
    for wrong, needle in (("4", "not RANK"), ("four", "no whole number"), ("-2", "no whole number")):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(UsageError, match=needle):
            join()
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "3"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="RANK=3 is not below WORLD_SIZE=2"):
        join()
