"""Worked solutions in the loss: CHORD's objective by autograd, its schedule, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import ReFT
from agents.batches.experts import Expert
from agents.batches.weight_copy import WeightCopy
from envs.vector import MathReasonVector
from registry import UsageError
from tests.agents.batches.test_refill import seen_by_update
from tests.agents.test_distributed import in_processes
from tests.oracles.reft_agents import gradient_of, numbers, weights

CHORD = {"id": "expert", "weight": 0.3, "solutions": 6}
NESTED = {"sampler": "fixed", "correction": "token-is"}


def room(slots: int = 8, reward: str = "random") -> MathReasonVector:
    """Completions long enough for worked solutions."""
    return MathReasonVector(num_envs=slots, max_new_tokens=40, reward=reward, copy=False)


def make(folder: str, slots: int = 8, **arguments: Any) -> ReFT:
    given = {"group_size": 4, "problems_per_batch": 4, "learning_rate": 1e-3, "seed": 3, **arguments}
    return ReFT(folder, room(slots), **given)


@pytest.mark.parametrize("arguments", [{}, {**NESTED, "minibatches": 2}], ids=["reft", "nested"])
def test_a_weight_of_zero_is_the_plain_agent_to_the_bit(folder: str, arguments: dict[str, Any]) -> None:
    plain, agent = make(folder, **arguments), make(folder, batch={"id": "expert", "weight": 0.0}, **arguments)
    for _ in range(2):
        assert numbers(agent.iterate()) == numbers(plain.iterate())
    assert torch.equal(weights(agent), weights(plain))


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("tokens", ["phi", "one"])
@pytest.mark.parametrize("microbatch", [None, 120])
def test_gradient_is_that_of_the_mixed_loss(folder: str, tokens: str, aggregation: str, microbatch: int | None) -> None:
    """(1 - m) L + m L_expert by autograd: phi = p (1 - p) is held fixed, as in the paper's equation of CHORD-phi."""
    model = "tiny" if tokens == "phi" else folder  # a random one is so unsure that p (1 - p) is p
    agent = make(
        model, batch={**CHORD, "tokens": tokens}, aggregation=aggregation, microbatch_tokens=microbatch, **NESTED
    )
    agent.iterate()
    start = WeightCopy(agent.target)
    seen: list[Any] = []
    gradient = gradient_of(agent, lambda: seen.extend(seen_by_update(agent)[0]))
    (rollout,), solutions = seen, agent.experts.solutions
    assert solutions is not None and len(solutions) == 6

    def mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if aggregation == "token-mean":
            return values[mask].sum() / mask.sum()
        return ((values * mask).sum(1) / mask.sum(1)).mean()

    with start.in_place():
        agent.optimizer.zero_grad()
        advantage = agent.advantage(rollout.reward, rollout.group)
        logp = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
        ratio = torch.where(rollout.mask, logp - rollout.behavior_logp, 0.0).exp()
        own = mean(ratio * advantage[:, None], rollout.mask)
        theirs = agent.target.logprobs(solutions.prompts, solutions.tokens, solutions.mask)
        p = theirs.detach().exp()
        phi = p * (1 - p) if tokens == "phi" else torch.ones_like(p)
        (-(0.7 * own + 0.3 * mean(phi * theirs, solutions.mask))).backward()
        expected = torch.cat([q.grad.flatten() for q in agent.target.parameters() if q.grad is not None])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=2e-5)


def test_solutions_are_shared_out_and_count_as_no_tokens(folder: str) -> None:
    agent, plain = make(folder, batch=CHORD, minibatches=2), make(folder, minibatches=2)
    assert agent.iterate()["tokens"] == plain.iterate()["tokens"] == agent.num_timesteps
    task, solutions = room().task, agent.experts.solutions
    assert solutions is not None
    texts = [task.text(row[mask].numpy()) for row, mask in zip(solutions.tokens, solutions.mask, strict=True)]
    assert len(set(texts)) == 6 and all(texts)
    parts = [agent.experts.part(n, 2) for n in range(4)]
    assert [len(part) for part in parts if part is not None] == [3, 3, 3, 3]
    assert parts[0] is not None and parts[2] is not None and torch.equal(parts[0].tokens, parts[2].tokens)


def test_it_learns_from_solutions_where_no_completion_has_an_advantage(folder: str) -> None:
    def agent_of(**arguments: Any) -> ReFT:
        envs = room(reward="verified")
        return ReFT(folder, envs, group_size=2, problems_per_batch=2, learning_rate=3e-3, seed=3, **arguments)

    plain, agent = agent_of(), agent_of(batch={**CHORD, "tokens": "one"})
    before = weights(agent).clone()
    assert plain.iterate()["sequences_used"] == 0 and torch.equal(weights(plain), before)
    metrics = agent.iterate()
    assert metrics["sequences_used"] == 0 and metrics["grad_norm"] > 0 and metrics["expert_weight"] == 0.3
    solutions = agent.experts.solutions
    assert solutions is not None
    with torch.no_grad():
        first, now = (
            policy.logprobs(solutions.prompts, solutions.tokens, solutions.mask)[solutions.mask].mean()
            for policy in (plain.target, agent.target)
        )
    assert now > first


def test_weight_rises_and_falls_as_declared() -> None:
    chord = Expert(weight=0.8, valley=0.2, warmup=4, decay=10)
    assert [chord.weight_at(n) for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert chord.weight_at(4) == pytest.approx(0.8)
    assert chord.weight_at(9) == pytest.approx(0.5), "halfway of a cosine"
    assert chord.weight_at(14) == chord.weight_at(100) == pytest.approx(0.2)
    assert Expert(weight=0.3).weight_at(7) == 0.3


@pytest.mark.parametrize("weight", [{}, {"warmup": 2, "decay": 2}], ids=["constant", "schedule"])
def test_it_resumes_and_is_the_same_in_two_processes(folder: str, tmp_path: Path, weight: dict[str, int]) -> None:
    arguments = {"batch": {**CHORD, **weight}, "minibatches": 2, **NESTED}

    def trained() -> tuple[dict[str, Any], np.ndarray]:
        torch.set_num_threads(1)
        agent = make(folder, **arguments)
        agent.optimizer.param_groups[0]["eps"] = 1e-2
        found = {f"{n} {name}": v for n in range(2) for name, v in numbers(agent.iterate()).items()}
        return found, weights(agent).numpy()

    metrics, after = trained()
    for result in in_processes(2, trained, tmp_path):
        assert not isinstance(result, str), result
        for name, value in metrics.items():
            assert result[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(result[1], after, rtol=1e-4, atol=1e-5)

    straight = make(folder, **arguments)
    straight.iterate()
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", room())
    for _ in range(2):
        assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"weight": 1.0}, "weight=1.0"),
        ({"valley": -0.1}, "valley=-0.1"),
        ({"decay": -1}, "decay=-1"),
        ({"solutions": 0}, "solutions=0"),
        ({"tokens": "p"}, "tokens='p'"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Expert(**fields)


def test_problems_without_worked_solutions_are_refused_before_anything_is_trained(folder: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    envs = MathReasonVector(num_envs=2, max_new_tokens=40, problems=str(bare), copy=False)
    with pytest.raises(UsageError, match="no worked solution"):
        ReFT(folder, envs, batch="expert")
