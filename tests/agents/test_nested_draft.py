"""``nested-draft`` in the ReFT loop: an agent's numbers are those without it."""

from __future__ import annotations

import pytest
import torch

from agents import ReFT
from envs.vector import MathReasonVector
from policies.engine.decoder import CachedDecoder
from registry import UsageError
from tests.oracles.reft_agents import numbers, weights


def room() -> MathReasonVector:
    return MathReasonVector(num_envs=8, max_new_tokens=40, reward="random", problem_options={"limit": 6}, copy=False)


@pytest.mark.parametrize("batch", ["fresh", "reuse"])
def test_with_layers_that_draft_training_is_what_it_is_without(batch: str) -> None:
    given = {"group_size": 2, "problems_per_batch": 5, "learning_rate": 1e-3, "seed": 3, "batch": batch}
    plain = ReFT("tiny", room(), **given)
    drafted = ReFT("tiny", room(), **given, sampler={"id": "nested-draft", "rows": 5, "tokens": 3})
    accepted = 0
    for _ in range(3):
        expected, found = (numbers(agent.iterate()) for agent in (plain, drafted))
        passes, plain_passes = found.pop("target_tokens"), expected.pop("target_tokens")
        assert {k: v for k, v in found.items() if "draft/" not in k} == {
            k: v for k, v in expected.items() if "draft/" not in k
        }
        accepted += found["draft/accepted"]
        assert passes > plain_passes
        assert found["draft/accepted"] < found["draft/proposed"]
    assert accepted > 30
    assert torch.equal(weights(plain), weights(drafted))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sampler": "even"},
        {"batch": "reuse"},
        {"batch": "reuse", "sampler": "even"},
        {"sampler": {"id": "nested-draft", "tokens": 3}},
    ],
    ids=str,
)
def test_target_tokens_are_the_passes_that_were_computed(arguments: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every decoder, each by the share of the layers that it has."""
    computed: list[float] = []
    extend, hidden = CachedDecoder.extend, CachedDecoder.hidden

    def extended(self, ids, first, last, start, slots):
        computed.append(int((last - first + 1).sum()) * len(self.model.layers) / 12)
        return extend(self, ids, first, last, start, slots)

    def stepped(self, *given):
        rows = hidden(self, *given)
        computed.append(len(rows) * len(self.model.layers) / 12)
        return rows

    monkeypatch.setattr(CachedDecoder, "extend", extended)
    monkeypatch.setattr(CachedDecoder, "hidden", stepped)
    agent = ReFT("tiny", room(), group_size=4, problems_per_batch=3, learning_rate=1e-3, seed=3, **arguments)
    monkeypatch.setattr(agent, "_noise", lambda *_: {})
    for _ in range(3):
        computed.clear()
        assert agent.iterate()["target_tokens"] == pytest.approx(sum(computed))


def test_a_drafter_that_drafts_nothing_is_refused() -> None:
    for fields in ({"tokens": 0}, {"rows": 0}, {"draft_ratio": 1.0}):
        with pytest.raises(UsageError):
            ReFT("tiny", room(), sampler={"id": "nested-draft", **fields})
