"""KL to a reference: published losses by autograd, exact divergences by enumeration, the reference through a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import ReFT
from agents.batches.weight_copy import WeightCopy
from agents.objective.anchors import KL, KLConvex
from agents.rollout import Rollout
from registry import UsageError, anchors
from tests.agents.batches.test_refill import seen_by_update
from tests.agents.test_distributed import in_processes, trained
from tests.oracles.reft_agents import CoinFlips, gradient_of, make, numbers, weights, write_batch

K3 = {"id": "kl", "beta": 0.3}


def moved(folder: str, **arguments: Any) -> ReFT:
    """An agent whose target has left its reference."""
    agent = make(folder, **arguments)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in agent.target.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    agent.target.refresh()
    return agent


def one_step(logits: Tensor, reference: Tensor, writer: Tensor) -> Rollout:
    """A completion of one token for each token of the vocabulary."""
    count = len(logits)
    return Rollout(
        prompts=(torch.zeros(1, dtype=torch.long),) * count,
        tokens=torch.arange(count)[:, None],
        mask=torch.ones(count, 1, dtype=torch.bool),
        behavior_logp=writer.log_softmax(0)[:, None],
        reward=torch.zeros(count),
        group=torch.zeros(count, dtype=torch.long),
        old_logp=logits.log_softmax(0)[:, None],
        reference_logp=reference.log_softmax(0)[:, None],
    )


@pytest.mark.parametrize(
    ("estimator", "corrected", "divergence"),
    [("k2", False, "pi|ref"), ("k3", False, "ref|pi"), ("k1", True, "pi|ref"), ("k3", True, "pi|ref")],
)
def test_the_expected_gradient_is_that_of_the_divergence_named(
    estimator: str, corrected: bool, divergence: str
) -> None:
    """Over all tokens of a vocabulary of 7, weighted by what wrote them; that is pi itself where nothing corrects."""
    generator = torch.Generator().manual_seed(1)
    logits, reference, other = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    writer = other if corrected else logits
    rollout = one_step(logits, reference, writer)
    slope = KL(1.0, estimator, corrected=corrected).slope(logits.log_softmax(0)[:, None], rollout)[:, 0]
    leaf = logits.clone().requires_grad_()
    (writer.softmax(0) * slope * leaf.log_softmax(0)).sum().backward()
    found = leaf.grad

    leaf = logits.clone().requires_grad_()
    log_pi, log_ref = leaf.log_softmax(0), reference.log_softmax(0)
    p, q = (log_pi, log_ref) if divergence == "pi|ref" else (log_ref, log_pi)
    (p.exp() * (p - q)).sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-9, atol=1e-12)


def test_the_expected_gradient_of_k1_in_the_loss_is_zero_so_it_is_refused() -> None:
    with pytest.raises(UsageError, match="is 0 in expectation"):
        anchors.make("kl", estimator="k1")


def test_estimates_are_schulmans() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, reference = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    rollout = one_step(logits, reference, logits)
    pi, x = logits.softmax(0), logits.log_softmax(0) - reference.log_softmax(0)
    kl = (pi * x).sum()
    for estimator, expected in (("k1", kl), ("k2", (pi * x.square()).sum() / 2), ("k3", kl)):
        value = KL(0.5, estimator, place="reward").penalty(logits.log_softmax(0)[:, None], rollout)[:, 0]
        torch.testing.assert_close((pi * value).sum(), 0.5 * expected)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
def test_update_gradient_is_grpos_loss_with_its_penalty(folder: str, aggregation: str) -> None:
    """Eq. 3 and 4 of arXiv 2402.03300 by autograd; every completion counts, those without an advantage too."""
    agent = moved(folder, anchor=K3, aggregation=aggregation, correction="ppo-clip", advantage="dr-grpo")
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    advantage = agent.advantage(rollout.reward, rollout.group)
    assert (advantage == 0).any()
    reference = make(folder).target
    with torch.no_grad():
        ref = reference.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    before = weights(agent)
    measured = agent.anchoring.measure(rollout, agent.update.score, 0)
    assert torch.equal(weights(agent), before)
    torch.testing.assert_close(measured.reference_logp, ref)
    found = gradient_of(agent, lambda: agent.update(measured, advantage, np.random.default_rng(0)))

    agent.optimizer.zero_grad()
    logp = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    r = (logp - logp.detach()).exp()
    k3 = (ref - logp).exp() - (ref - logp) - 1
    per_token = -(r * advantage[:, None] - 0.3 * k3) * rollout.mask
    if aggregation == "token-mean":
        loss = per_token.sum() / rollout.mask.sum()
    else:
        loss = (per_token.sum(1) / rollout.mask.sum(1)).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    mean = float((k3.detach() * rollout.mask).sum() / rollout.mask.sum())
    assert agent.anchoring.metrics(logp.detach(), measured)["kl_reference"] == pytest.approx(mean, rel=1e-4)


def test_a_penalty_in_the_reward_is_taken_from_it(folder: str) -> None:
    agent = moved(folder, anchor={"id": "kl", "beta": 0.2, "estimator": "k1", "place": "reward"}, sampler="uniform")
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    reference = make(folder).target
    with torch.no_grad():
        ref, own = (p.logprobs(rollout.prompts, rollout.tokens, rollout.mask) for p in (reference, agent.target))
    found = agent.anchoring.reward(agent.anchoring.measure(rollout, agent.update.score, 0))
    torch.testing.assert_close(found, rollout.reward - 0.2 * ((own - ref) * rollout.mask).sum(1), rtol=1e-4, atol=1e-4)
    metrics = agent.iterate()
    assert metrics["kl_reference"] > 0.01
    right = 24 * metrics["rollout_reward"]
    assert right == pytest.approx(round(right), abs=1e-3), "the verifier's reward is reported as it was"
    assert metrics["sequences_used"] == 24, "rewards of a group are no longer equal"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"correction": "self-normalised"},
        {"minibatches": 3, "epochs": 2},
        {"correction": "defensive", "anchor": {**K3, "corrected": True}},  # some tokens are the target's own
    ],
)
def test_micro_batches_change_nothing(folder: str, arguments: dict[str, Any]) -> None:
    given = {"anchor": K3, "correction": "ppo-clip", "sampler": "fixed", **arguments}
    whole, parts = (moved(folder, microbatch_tokens=tokens, **given) for tokens in (None, 120))
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)
    assert whole.metrics["kl_reference"] == pytest.approx(parts.metrics["kl_reference"], rel=1e-4)


def test_a_strong_anchor_holds_the_target(folder: str) -> None:
    def distance(**arguments: Any) -> float:
        agent = make(folder, **arguments)
        start = weights(agent).clone()
        for _ in range(6):
            agent.iterate()
        rollout, _ = write_batch(agent, np.random.default_rng(0))
        assert not torch.equal(weights(agent), start)
        reference = make(folder).target
        with torch.no_grad():
            ref, own = (p.logprobs(rollout.prompts, rollout.tokens, rollout.mask) for p in (reference, agent.target))
        return float((own - ref)[rollout.mask].mean())

    free = distance()
    assert distance(anchor={"id": "kl", "beta": 30.0}) < 0.5 * free


@pytest.mark.parametrize("arguments", [{}, {"lora_rank": 4}], ids=["weights", "adapters"])
@pytest.mark.parametrize("every", [0, 2])
def test_the_reference_survives_saving(folder: str, tmp_path: Path, every: int, arguments: dict[str, Any]) -> None:
    given = {"anchor": {**K3, "every": every}, **arguments}
    straight = make(folder, **given)
    start = {name: value.clone() for name, value in straight.anchoring.state_dict().items()}
    for _ in range(3):
        straight.iterate()
    now = straight.anchoring.state_dict()
    assert all(torch.equal(now[name], start[name]) for name in start) == (every == 0)
    straight.save(tmp_path / "saved")
    resumed = ReFT.load(tmp_path / "saved", CoinFlips(16))
    for _ in range(2):
        assert numbers(resumed.iterate()) == numbers(straight.iterate())
    assert torch.equal(weights(resumed), weights(straight))
    if arguments:
        assert sum(value.numel() for value in now.values()) < 0.3 * sum(
            p.numel() for p in straight.target.model.parameters()
        )


@pytest.mark.parametrize("rank", [0, 4])
def test_an_anchor_that_load_adds_starts_at_the_weights_loaded(folder: str, tmp_path: Path, rank: int) -> None:
    agent = make(folder, lora_rank=rank)
    agent.iterate()
    agent.save(tmp_path / "saved")
    loaded = ReFT.load(tmp_path / "saved", CoinFlips(16), anchor=K3, ema_decay=0.9)
    for copy in (loaded.average, *loaded.anchoring.copies):
        assert copy is not None
        with copy.in_place():
            assert torch.equal(weights(loaded), weights(agent))


@pytest.mark.parametrize(
    "arguments",
    [
        {"anchor": {**K3, "every": 1}, "minibatches": 2},
        {"anchor": {"id": "kl", "beta": 0.1, "estimator": "k1", "place": "reward"}, "sampler": "fixed"},
        {"anchor": {**K3, "corrected": True}, "sampler": "fixed", "correction": "self-normalised"},
        {"anchor": {"id": "kl-convex", "beta": 0.3, "hold": 0, "step": 1}, "minibatches": 2},
    ],
    ids=["loss", "reward", "corrected", "convex"],
)
def test_two_processes_give_the_numbers_of_one(folder: str, tmp_path: Path, arguments: dict[str, Any]) -> None:
    metrics, after = trained(folder, **arguments)
    assert metrics["1 kl_reference"] > 0
    for found in in_processes(2, lambda: trained(folder, **arguments), tmp_path):
        assert not isinstance(found, str), found
        for name, value in metrics.items():
            assert found[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(found[1], after, rtol=1e-4, atol=1e-5)


def test_a_copy_changes_places_bit_for_bit(folder: str) -> None:
    agent = make(folder)
    start = weights(agent).clone()
    copy = WeightCopy(agent.target)
    agent.iterate()
    later = weights(agent).clone()
    assert not torch.equal(start, later)
    with copy.in_place():
        assert torch.equal(weights(agent), start)
    assert torch.equal(weights(agent), later)
    copy.average(0.75)
    with copy.in_place():
        torch.testing.assert_close(weights(agent), 0.75 * start + 0.25 * later)
    agent.iterate()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"estimator": "k4"}, "k4"),
        ({"place": "prompt"}, "prompt"),
        ({"beta": 0.0}, "anchor=none"),
        ({"every": -1}, "every=-1"),
        ({"place": "reward", "corrected": True}, "place=loss"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        anchors.make("kl", **fields)


def test_lam_falls_as_declared() -> None:
    """ReMix: 1, from step 50 on less by .1 every 10 steps, at least .5."""
    lam = KLConvex().share
    assert [lam(n) for n in (0, 50, 59, 60, 70, 99, 100, 300)] == pytest.approx([1, 1, 1, 0.9, 0.8, 0.6, 0.5, 0.5])


CONVEX = {"id": "kl-convex", "beta": 0.3, "hold": 1, "step": 1, "fall": 0.25}


def test_the_convex_anchor_is_of_the_start_and_the_target_before_the_last_update(folder: str) -> None:
    """beta [lam KL(pi, start) + (1 - lam) KL(pi, previous)] by autograd of both k2, at every token."""
    agent = make(folder, anchor=CONVEX, correction="token-is")
    before = [WeightCopy(agent.target)]
    for _ in range(3):
        agent.iterate()
        before.append(WeightCopy(agent.target))
    seen: list[Rollout] = []
    gradient = gradient_of(agent, lambda: seen.extend(seen_by_update(agent)[0]))
    (batch,) = seen

    def scored(copy: WeightCopy) -> Tensor:
        with copy.in_place(), torch.no_grad():
            return agent.target.logprobs(batch.prompts, batch.tokens, batch.mask)

    start, previous = scored(before[0]), scored(before[2])
    with before[3].in_place():
        agent.optimizer.zero_grad()
        advantage = agent.advantage(batch.reward, batch.group)
        logp = agent.target.logprobs(batch.prompts, batch.tokens, batch.mask)
        ratio = torch.where(batch.mask, logp - batch.behavior_logp, 0.0).exp()
        anchor = 0.5 * (logp - start).square() / 2 + 0.5 * (logp - previous).square() / 2
        (((0.3 * anchor - ratio * advantage[:, None]) * batch.mask).sum() / batch.mask.sum()).backward()
        expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    assert (start - previous)[batch.mask].abs().max() > 1e-2
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_the_base_becomes_the_target_once(folder: str, tmp_path: Path) -> None:
    """ReMix's reincarnation; and a run that is cut goes on to the same numbers."""
    straight = make(folder, anchor={**CONVEX, "restart": 2})
    base = []
    for n in range(5):
        straight.iterate()
        straight.save(tmp_path / str(n))
        base.append(torch.cat([v.flatten() for k, v in straight.anchoring.state_dict().items() if k[:2] == "0."]))
    assert torch.equal(base[0], base[1]) and not torch.equal(base[1], base[2])
    assert torch.equal(base[2], base[3]) and torch.equal(base[3], base[4])
    expected = numbers(straight.iterate())
    for n in (1, 4):
        resumed = ReFT.load(tmp_path / str(n), CoinFlips(16))
        for _ in range(4 - n):
            resumed.iterate()
        assert numbers(resumed.iterate()) == expected


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"estimator": "k3"}, "k3 of two references"),
        ({"step": 0}, "step=0"),
        ({"restart": -1}, "restart=-1"),
        ({"least": 1.5}, "least=1.5"),
    ],
)
def test_wrong_fields_of_the_convex_anchor(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        anchors.make("kl-convex", **fields)
