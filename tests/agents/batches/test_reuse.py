"""``reuse``: an agent's numbers are those without it; what its other rules are is another law, and is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import ReFT
from agents.batches.sources import Reuse
from agents.monitoring.watch import StaleData
from envs.vector import MathReasonVector
from registry import UsageError, batches
from tests.agents.batches.test_batch_contract import DEFENSIVE, NESTED, room
from tests.agents.batches.test_refill import seen_by_update
from tests.oracles.reft_agents import numbers, weights

GIVEN: dict[str, Any] = {"group_size": 2, "problems_per_batch": 5, "learning_rate": 1e-3, "seed": 3}
LENIENT = {"id": "reuse", "lenience": 0.5}


def of_training(agent: ReFT) -> dict[str, float]:
    """An iteration's numbers but for the drafts' own."""
    return {
        k: v
        for k, v in numbers(agent.iterate()).items()
        if not k.startswith("draft/") and k not in ("age", "target_tokens")
    }


def rows(agent: ReFT) -> list[tuple[Any, ...]]:
    (batch,), _ = seen_by_update(agent)
    return [tuple(tokens[kept].tolist()) for tokens, kept in zip(batch.tokens, batch.mask, strict=True)]


@pytest.mark.parametrize(
    "arguments", [{}, NESTED, DEFENSIVE, {"refill_tokens": 200}], ids=["reft", "nested", "defensive", "refilled"]
)
def test_training_with_it_is_training_without_it(arguments: dict[str, Any]) -> None:
    """To the bit, where a store's many tokens at once are as many steps: five iterations over six problems."""
    without, reusing = (ReFT("tiny", room(), **GIVEN, **arguments, batch=batch) for batch in ("fresh", "reuse"))
    accepted = 0.0
    for _ in range(5):
        expected = of_training(without)
        assert of_training(reusing) == expected
        accepted += reusing.metrics["draft/accepted"]
        in_vain = reusing.metrics["target_tokens"] - without.metrics["target_tokens"]
        assert 0 <= in_vain <= reusing.metrics["draft/proposed"] - reusing.metrics["draft/accepted"]
        assert reusing.metrics["draft/share"] == reusing.metrics["draft/accepted"] / reusing.metrics["tokens"]
    assert accepted > 50
    assert torch.equal(weights(reusing), weights(without))


def test_problems_that_never_come_again_have_no_drafts() -> None:
    env = MathReasonVector(num_envs=8, max_new_tokens=40, reward="random", copy=False)
    agent = ReFT("tiny", env, **GIVEN, batch="reuse")
    for _ in range(2):
        agent.iterate()
        assert agent.metrics["draft/proposed"] == 0


def test_by_ratio_an_unchanged_target_writes_the_same_again(folder: str) -> None:
    """Given what is stored nothing is drawn at all, where by ``draw`` everything is."""
    given = {**GIVEN, "learning_rate": 1e-12, "problems_per_batch": 8}
    ratio = ReFT(folder, room(), **given, batch={"id": "reuse", "rule": "ratio", "lenience": 0.01})
    again = ReFT(folder, room(), **given, batch="reuse")
    known: dict[str, set[Any]] = {"ratio": set(), "draw": set()}
    repeated = {"ratio": 0, "draw": 0}
    for n in range(4):
        for name, agent in (("ratio", ratio), ("draw", again)):
            written = rows(agent)
            repeated[name] += sum(row in known[name] for row in written) if n else 0
            known[name] |= set(written)
    assert ratio.metrics["draft/share"] > 0.9 > again.metrics["draft/share"]
    assert repeated["ratio"] > 3 * repeated["draw"]


def test_lenience_goes_into_log_mu_and_a_run_with_it_resumes(tmp_path: Path) -> None:
    straight = ReFT("tiny", room(), **GIVEN, batch=LENIENT, correction="token-is")
    (first,), _ = seen_by_update(straight)
    straight.iterate()
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", room())
    for _ in range(2):
        assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert straight.metrics["draft/accepted"] > 0
    assert straight.metrics["kl_k1"] > 1e-3 and straight.metrics["ess_token"] < 0.9999
    assert first.age is None


def test_a_problems_kth_group_has_the_kth_youngest_as_drafts(folder: str) -> None:
    agent = ReFT(folder, room(), **GIVEN, batch={"id": "reuse", "memory": 2})
    for _ in range(3):
        agent.iterate()
    assert sorted(agent.batching.kept) == [1, 2]  # its bound
    groups = [
        (n, row, int(agent.batching.kept[n].episodes[row]["problem_index"]))
        for n in (2, 1)
        for row in range(0, len(agent.batching.kept[n]), 2)
    ]
    problem = groups[0][2]
    mine = [(n, row) for n, row, which in groups if which == problem]
    drafts = agent.batching.drafts([problem] * (len(mine) + 1), 7, 3).drafts
    assert sorted(drafts) == list(range(14, 14 + 2 * len(mine)))
    for episode, (tokens, mu) in drafts.items():
        n, row = mine[episode // 2 - 7]
        stored = agent.batching.kept[n]
        kept = stored.mask[row + episode % 2]
        assert tokens.tolist() == stored.tokens[row + episode % 2][kept].tolist()
        assert mu.tolist() == stored.behavior_logp[row + episode % 2][kept].tolist()


def test_a_warning_says_where_a_correction_is_needed(folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleData)
        ReFT(folder, room(), **GIVEN, batch="reuse")
        with pytest.raises(StaleData, match="mu"):
            ReFT(folder, room(), **GIVEN, batch=LENIENT)
        with pytest.raises(StaleData, match="mu"):
            ReFT(folder, room(), **GIVEN, batch="reuse*replay")


def test_what_cannot_be_is_refused(folder: str) -> None:
    for fields in ({"rule": "residual"}, {"lenience": -1.0}, {"memory": 0}):
        with pytest.raises(UsageError):
            Reuse(**fields)
    with pytest.raises(UsageError, match="same source"):
        batches.build("reuse*reuse")
    for batch in (LENIENT, {"id": "reuse", "rule": "ratio"}):
        with pytest.raises(UsageError, match="lenience=0"):
            ReFT(folder, room(), **GIVEN, **DEFENSIVE, batch=batch)
