"""What every batch source of the registry, and some mixtures of them, must do; one that is added there is tested here.

Problems are few, so that they come again, and have worked solutions; rewards are coins, so that groups of two have no
signal half of the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import ReFT
from agents.rollout import Rollout
from envs.vector import MathReasonVector
from registry import batches
from tests.agents.batches.test_refill import seen_by_update
from tests.agents.test_distributed import in_processes
from tests.oracles.reft_agents import gradient_of, numbers, weights

ACTIVE: dict[str, dict[str, Any]] = {  # fields with which a source acts within a few iterations; else its defaults
    "replay": {"share": 0.5, "by": "group", "window": 2},
    "stale": {"iterations": 2},
    "expert": {"weight": 0.3, "solutions": 4},
    "replay*expert": {"share": 1.0, "window": 1, "weight": 0.3, "solutions": 4},
    "replay*stale": {"share": 0.5, "by": "group", "window": 2, "iterations": 2},
    "stale*contrast": {"scale": 0.5},
    "replay*stale*contrast*expert": {"share": 0.4, "by": "group", "solutions": 4},
}
SOURCES = [*batches, *(id for id in ACTIVE if "*" in id)]
NESTED = {"sampler": "uniform", "correction": "token-is", "minibatches": 2}
DEFENSIVE = {"sampler": "fixed", "correction": "defensive", "target_written": 1}
every_source = pytest.mark.parametrize("source", SOURCES)


def room(slots: int = 8) -> MathReasonVector:
    options = {"limit": 6}
    return MathReasonVector(num_envs=slots, max_new_tokens=40, reward="random", problem_options=options, copy=False)


def make(folder: str, source: str, **arguments: Any) -> ReFT:
    batch = {"id": source, **ACTIVE.get(source, {})}
    given = {"group_size": 2, "problems_per_batch": 5, "learning_rate": 1e-2, "seed": 3, **arguments}
    return ReFT(folder, room(), batch=batch, **given)


@every_source
@pytest.mark.parametrize("arguments", [NESTED, DEFENSIVE], ids=["nested", "defensive"])
def test_a_run_cut_in_the_middle_goes_on_to_the_same_numbers(
    folder: str, tmp_path: Path, source: str, arguments: dict[str, Any]
) -> None:
    straight = make(folder, source, **arguments)
    for n in range(3):
        straight.iterate()
        straight.save(tmp_path / str(n))
    expected = [numbers(straight.iterate()) for _ in range(2)]
    for n in (0, 2):
        resumed = ReFT.load(tmp_path / str(n), room())
        for _ in range(2 - n):
            resumed.iterate()
        assert [numbers(resumed.iterate()) for _ in range(2)] == expected
        assert torch.equal(weights(resumed), weights(straight))


@every_source
def test_two_processes_give_the_numbers_of_one(folder: str, tmp_path: Path, source: str) -> None:
    def trained() -> tuple[dict[str, Any], np.ndarray]:
        torch.set_num_threads(1)
        agent = make(folder, source, **NESTED)
        agent.optimizer.param_groups[0]["eps"] = 1e-2
        found = {f"{n} {name}": v for n in range(3) for name, v in numbers(agent.iterate()).items()}
        return found, weights(agent).numpy()

    metrics, after = trained()
    for result in in_processes(2, trained, tmp_path):
        assert not isinstance(result, str), result
        assert result[0].keys() == metrics.keys()
        for name, value in metrics.items():
            assert result[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
        np.testing.assert_allclose(result[1], after, rtol=1e-3, atol=1e-4)


@every_source
def test_micro_batches_change_nothing(folder: str, source: str) -> None:
    arguments = {**NESTED, "minibatches": 1}
    whole, parts = (make(folder, source, microbatch_tokens=tokens, **arguments) for tokens in (None, 120))
    for agent in (whole, parts):
        agent.optimizer.param_groups[0]["eps"] = 1e-2
        agent.iterate(), agent.iterate()
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(second, first, rtol=5e-3, atol=5e-5)


@every_source
@pytest.mark.parametrize("arguments", [NESTED, DEFENSIVE], ids=["nested", "defensive"])
def test_every_row_is_as_it_was_written(folder: str, source: str, arguments: dict[str, Any]) -> None:
    """Tokens and log mu to the bit, with the reward; and nothing is kept for longer than declared."""
    agent = make(folder, source, **arguments)
    written: list[Rollout] = []
    rollout = agent.rollout
    agent.rollout = lambda *given, **named: written.append(rollout(*given, **named)) or written[-1]  # type: ignore
    kinds = set()
    for n in range(4):
        (batch,), metrics = seen_by_update(agent)
        rows = {_row(one, i) for one in written for i in range(len(one))}
        assert {_row(batch, i) for i in range(len(batch))} <= rows
        assert sum(int(members.sum()) for members in batch.kinds.values()) == len(batch)
        kinds |= {name for name, members in batch.kinds.items() if members.any()}
        assert all(n - kept < agent.batch.keeps for kept in agent.batching.kept)
        parted = {name.partition("/")[0] for name in metrics if name.endswith("/D")}
        assert {part for part in parted if not part.startswith("length_")} <= set(batch.kinds)
    assert {"stored"} <= kinds or "replay" not in source
    assert {"borrowed"} <= kinds or "contrast" not in source


def _row(rollout: Rollout, i: int) -> tuple[Any, ...]:
    kept = rollout.mask[i]
    return (
        tuple(rollout.prompts[i].tolist()),
        tuple(rollout.tokens[i][kept].tolist()),
        tuple(rollout.behavior_logp[i][kept].tolist()),
        float(rollout.reward[i]),
    )
