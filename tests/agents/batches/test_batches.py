"""Where a batch comes from: nothing changes where nothing is recalled, stored completions keep what wrote them, and
runs that store resume, share out and split exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import ReFT
from agents.batches.sources import Contrast, Mixture, Replay
from agents.batches.weight_copy import WeightCopy
from agents.monitoring.watch import StaleData
from agents.rollout import Rollout
from envs.vector import MathReasonVector
from policies import Policy
from registry import UsageError, batches
from tests.agents.batches.test_refill import pairs, seen_by_update
from tests.agents.test_distributed import in_processes, trained
from tests.oracles.reft_agents import CoinFlips, gradient_of, make, numbers, weights

GROUPS = {"id": "replay", "share": 0.5, "by": "group", "window": 3}
WHOLE = {"id": "replay", "share": 1.0, "window": 1}  # every second batch is the one before it
STALE = {"id": "stale", "iterations": 2}
NESTED = {"sampler": "uniform", "correction": "token-is"}


def scored(policy: Policy, rollout: Rollout) -> Tensor:
    with torch.no_grad():
        return policy.logprobs(rollout.prompts, rollout.tokens, rollout.mask)


def heard(agent: ReFT, iterations: int) -> list[Rollout]:
    """The batches that the update sees."""
    return [seen_by_update(agent)[0][-1] for _ in range(iterations)]


def same_completions(first: Rollout, second: Rollout) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("tokens", "mask", "behavior_logp", "reward")
    ) and all(torch.equal(a, b) for a, b in zip(first.prompts, second.prompts, strict=True))


OF_AGENTS = pytest.mark.parametrize(
    "arguments",
    [{}, {**NESTED, "minibatches": 2}, {"sampler": "fixed", "correction": "defensive", "target_written": 1}],
    ids=["reft", "nested", "defensive"],
)


@pytest.mark.parametrize(
    "batch",
    [
        "fresh",
        {"id": "replay", "share": 0.0},
        {"id": "replay", "share": 0.0, "by": "group"},
        {"id": "stale", "iterations": 0},
        {"id": "replay*stale", "share": 0.0, "iterations": 0},
    ],
    ids=["fresh", "batch", "group", "stale", "mixture"],
)
@OF_AGENTS
def test_with_nothing_recalled_the_agent_is_the_plain_one_to_the_bit(
    folder: str, batch: Any, arguments: dict[str, Any]
) -> None:
    plain, agent = make(folder, **arguments), make(folder, batch=batch, **arguments)
    for _ in range(3):
        assert numbers(agent.iterate()) == numbers(plain.iterate())
    assert torch.equal(weights(agent), weights(plain))
    assert agent.num_timesteps == plain.num_timesteps


@pytest.mark.parametrize("batch", ["contrast", "contrast*fresh"])
@OF_AGENTS
def test_contrast_that_never_finds_a_group_is_the_plain_agent_to_the_bit(
    folder: str, batch: str, arguments: dict[str, Any]
) -> None:
    """Problems of an unlimited source do not come again."""
    plain, agent = make(folder, **arguments), make(folder, batch=batch, **arguments)
    for _ in range(3):
        metrics = numbers(agent.iterate())
        assert {metrics.pop("age"), metrics.pop("borrowed_share")} == {0.0}
        assert metrics == numbers(plain.iterate())
    assert len(agent.batching.kept) == 3
    assert torch.equal(weights(agent), weights(plain))


def few(folder: str, **arguments: Any) -> ReFT:
    """Pairs of coins on four problems, which come again and are half of the time without signal."""
    envs = MathReasonVector(num_envs=8, max_new_tokens=8, reward="random", problem_options={"limit": 4}, copy=False)
    given = {"group_size": 2, "problems_per_batch": 4, "learning_rate": 1e-2, "seed": 3, **arguments}
    return ReFT(folder, envs, **given)


def test_stored_answers_join_groups_without_signal(folder: str) -> None:
    agent = few(folder, batch={"id": "contrast", "answers": 3, "scale": 0.5}, correction="token-is", sampler="fixed")
    for _ in range(4):
        (batch,) = heard(agent, 1)
        borrowed = batch.kinds["borrowed"]
        for group in batch.group.unique():
            own, guests = ((batch.group == group) & rows for rows in (~borrowed, borrowed))
            right = batch.reward[own]
            assert len(right) == 2 and int(guests.sum()) <= 3
            if guests.any():
                assert right[0] == right[1], "a group with signal is left alone"
                assert bool((batch.reward[guests] == 1 - right[0]).all())
                assert len({tuple(batch.prompts[i].tolist()) for i in (own | guests).nonzero()[:, 0].tolist()}) == 1
    assert borrowed.any() and agent.metrics["borrowed_share"] == float(borrowed.double().mean())
    assert agent.metrics["borrowed/D"] != agent.metrics["fresh/D"]


def test_gradient_of_a_mixed_group_is_that_of_its_weighted_advantages(folder: str) -> None:
    """-mean_t (pi / mu) A by autograd, A of arXiv 2402.03300 over the mixed group, halved for those that joined."""
    agent = few(folder, batch={"id": "contrast", "answers": 3, "scale": 0.5}, correction="token-is", sampler="fixed")
    for _ in range(4):
        agent.iterate()
    start = WeightCopy(agent.target)
    seen: list[Rollout] = []
    gradient = gradient_of(agent, lambda: seen.extend(heard(agent, 1)))
    (batch,) = seen
    assert 0 < int(batch.kinds["borrowed"].sum()) < len(batch)
    with start.in_place():
        agent.optimizer.zero_grad()
        advantage = torch.zeros(len(batch))
        for group in batch.group.unique():
            rows = batch.group == group
            reward = batch.reward[rows]
            if reward.max() > reward.min():
                advantage[rows] = (reward - reward.mean()) / (reward.std() + 1e-4)
        advantage[batch.kinds["borrowed"]] *= 0.5
        logp = agent.target.logprobs(batch.prompts, batch.tokens, batch.mask)
        ratio = torch.where(batch.mask, logp - batch.behavior_logp, 0.0).exp()
        (-(ratio * advantage[:, None] * batch.mask).sum() / batch.mask.sum()).backward()
        expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_those_that_join_a_defensive_group_do_not_change_its_mixture(folder: str) -> None:
    """W = pi / ((q + mu) / 2) with the densities of the time of writing, of guests and of hosts."""
    agent = few(folder, batch="contrast", correction="defensive", sampler="fixed", target_written=1)
    batch = [heard(agent, 1)[0] for _ in range(4)][-1]
    assert batch.kinds["borrowed"].any() and batch.target_logp is not None
    full = scored(agent.target, batch)
    weight = agent.correction(full, replace(batch, old_logp=torch.zeros_like(full)), batch.reward)
    pi, q, mu = ((x * batch.mask).double().sum(1).exp() for x in (full, batch.target_logp, batch.behavior_logp))
    torch.testing.assert_close(weight[:, 0].double(), pi / (q / 2 + mu / 2), rtol=1e-3, atol=1e-4)


def test_the_youngest_of_the_other_kind_are_chosen() -> None:
    contrast, rng = Contrast(answers=2), np.random.default_rng(0)
    stored, age = np.array([True, False, True, True, False]), np.array([3, 1, 1, 2, 5])
    assert contrast.join(np.array([False, False]), stored, age, rng).tolist() == [2, 3]
    assert contrast.join(np.array([True, True]), stored, age, rng).tolist() == [1, 4]
    assert contrast.join(np.array([True, False]), stored, age, rng).tolist() == []
    assert contrast.join(np.array([True]), np.array([True]), np.array([1]), rng).tolist() == []
    ties = {tuple(contrast.join(np.array([False]), np.ones(5, bool), np.ones(5, int), rng)) for _ in range(200)}
    assert len(ties) == 20, "those of one age by chance"


@pytest.mark.parametrize("by", ["group", "batch"])
def test_byte_rollouts_of_older_nested_weights_are_replayed_with_their_log_mu(folder: str, by: str) -> None:
    """nested x int8 x stale x replay: log mu of every row is, to the bit, what was drawn with, and up to the noise of
    bytes what the layers and weights of that time give."""
    batch = {"id": "replay*stale", "share": 0.5, "by": by, "window": 3, "iterations": 2}
    agent = make(folder, batch=batch, sampler="uniform", correction="truncated-is", rollout_dtype="int8")
    written: dict[tuple[float, ...], int] = {}
    before, drawn = [], []
    seen_ages = set()
    rollout, draw = agent.rollout, agent.nesting.draw

    def note(*given: Any, **named: Any) -> Rollout:
        made = rollout(*given, **named)
        written.update({_logp(made, i): agent.iteration for i in range(len(made))})
        return made

    def note_draw(*given: Any) -> Any:
        drawn.append(draw(*given))
        return drawn[-1]

    agent.rollout, agent.nesting.draw = note, note_draw  # type: ignore[method-assign]
    for n in range(7):
        before.append(WeightCopy(agent.target))
        (batch_seen,) = heard(agent, 1)
        ages = torch.zeros(len(batch_seen)) if batch_seen.age is None else batch_seen.age
        for age in ages.unique().int().tolist():
            rows = (ages == age).nonzero()[:, 0]
            part, at = batch_seen.select(rows), n - age
            assert {written[_logp(part, i)] for i in range(len(part))} == {at}
            with before[max(0, at - 2)].in_place(), torch.no_grad():
                again = agent.target.logprobs(part.prompts, part.tokens, part.mask, layers=drawn[at])
            gap = (again - part.behavior_logp)[part.mask].abs()
            assert gap.mean() < 0.02 and gap.max() < 0.3
            seen_ages.add(age)
        expected = np.mean([age + min(2, n - age) for age in ages.int().tolist()])
        assert agent.metrics["age"] == pytest.approx(expected)
        if 0 < float(agent.metrics["stored_share"]) < 1:
            assert agent.metrics["stored/D"] != agent.metrics["fresh/D"]
    assert seen_ages >= {0, 1}
    assert (again - scored(agent.target, part))[part.mask].abs().max() > 1e-2, "the target is another policy"


def _logp(rollout: Rollout, i: int) -> tuple[float, ...]:
    return tuple(rollout.behavior_logp[i][rollout.mask[i]].tolist())


def test_replay_ends_where_it_is_to(folder: str) -> None:
    agent = make(folder, batch={**WHOLE, "until": 3}, **NESTED)
    assert [agent.iterate()["tokens"] > 0 for _ in range(6)] == [True, False, True, True, True, True]


@pytest.mark.parametrize("id", ["replay*replay", "stale*stale", "replay*expert*replay"])
def test_a_mixture_has_one_source_of_a_kind(id: str) -> None:
    with pytest.raises(UsageError, match="the same source"):
        batches.make(id)


def test_a_mixture_recalls_no_group_twice_and_each_from_its_own_window(folder: str) -> None:
    class Oldest(Replay):
        def recall(self, age: Any, reward: Any, count: int, rng: Any) -> Any:
            return np.argsort(-age, kind="stable")[:2]

    mixed = Mixture((Oldest(window=3), Replay(share=0.5, window=1, by="group")))
    agent = make(folder, batch=mixed, correction="token-is")
    batch = [heard(agent, 1)[0] for _ in range(5)][-1]
    assert batch.age is not None
    ages = batch.age.view(-1, 4)[:, 0].tolist()
    assert sorted(ages) == [0, 0, 1, 1, 3, 3]
    assert len({_logp(batch, i) for i in range(len(batch))}) == len(batch)


def test_a_replayed_batch_is_the_one_before_and_costs_no_token(folder: str) -> None:
    agent, plain = make(folder, batch=WHOLE, **NESTED), make(folder, **NESTED)
    first, metrics = seen_by_update(agent)
    plain.iterate()
    assert metrics["stored_share"] == 0 and metrics["age"] == 0
    spent, right = agent.num_timesteps, len(agent.ep_info_buffer)
    assert spent == plain.num_timesteps
    second, metrics = seen_by_update(agent)
    assert same_completions(first[0], second[0])
    assert second[0].age is not None and bool((second[0].age == 1).all())
    assert (agent.num_timesteps, len(agent.ep_info_buffer)) == (spent, right)
    assert metrics["tokens"] == 0 and metrics["rollout_tokens_per_second"] == 0
    assert metrics["stored_share"] == 1 and metrics["age"] == 1
    assert "rollout_accuracy" not in metrics and "entropy" not in metrics
    assert metrics["stored/D"] == metrics["D"] and "fresh/D" not in metrics
    third, metrics = seen_by_update(agent)
    assert metrics["tokens"] > 0 and not same_completions(first[0], third[0]), "nothing in the window is left"


def test_stored_log_mu_is_what_the_older_policy_gives(folder: str) -> None:
    agent = make(folder, batch=GROUPS, correction="token-is")
    before: dict[int, WeightCopy] = {}
    for n in range(4):
        before[n] = WeightCopy(agent.target)
        (batch,) = heard(agent, 1)
        assert (batch.age is None) == (n == 0)
    assert batch.age is not None and set(batch.age.tolist()) > {0}
    assert (batch.age > 0).double().mean() == 0.5
    assert len(batch.group.unique()) == 6 and bool((batch.group.unique(return_counts=True)[1] == 4).all())
    now = scored(agent.target, batch)
    for age in batch.age.unique().tolist():
        rows = (batch.age == age).nonzero()[:, 0]
        part = batch.select(rows)
        with before[3 - age].in_place():
            older = scored(agent.target, part)
        torch.testing.assert_close(part.behavior_logp[part.mask], older[part.mask], rtol=1e-4, atol=1e-4)
        assert (now[rows][:, : older.shape[1]] - older)[part.mask].abs().max() > 1e-2, "the target has moved"


def test_gradient_of_a_mixed_batch_is_that_of_the_importance_weighted_loss(folder: str) -> None:
    """token-is: d/d theta of -mean_t (pi / mu) A by autograd, mu being each completion's own writer."""
    agent = make(folder, batch=GROUPS, correction="token-is", sampler="fixed")
    for _ in range(2):
        agent.iterate()
    start = WeightCopy(agent.target)
    seen: list[Rollout] = []
    gradient = gradient_of(agent, lambda: seen.extend(heard(agent, 1)))
    (batch,) = seen
    assert batch.age is not None and 0 < int((batch.age > 0).sum()) < len(batch)
    with start.in_place():
        agent.optimizer.zero_grad()
        advantage = agent.advantage(batch.reward, batch.group)
        logp = agent.target.logprobs(batch.prompts, batch.tokens, batch.mask)
        ratio = torch.where(batch.mask, logp - batch.behavior_logp, 0.0).exp()
        (-(ratio * advantage[:, None] * batch.mask).sum() / batch.mask.sum()).backward()
        expected = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_weights_of_k_iterations_ago_write(folder: str) -> None:
    agent = make(folder, batch=STALE, correction="token-is")
    before = []
    for n in range(5):
        before.append(WeightCopy(agent.target))
        (batch,) = heard(agent, 1)
        own = weights(agent)
        with before[max(0, n - 2)].in_place():
            older = scored(agent.target, batch)
        assert torch.equal(weights(agent), own)
        torch.testing.assert_close(batch.behavior_logp[batch.mask], older[batch.mask], rtol=1e-4, atol=1e-4)
        assert agent.metrics["age"] == min(n, 2)
    assert agent.metrics["D"] != 0
    assert len(agent.batching.copies) == 2


def test_noise_is_of_the_weights_that_write(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored by what wrote it a batch is off by rounding alone, however far the target has moved since."""
    monkeypatch.setattr("agents.reft.NOISE_EVERY", 1)
    agent = make(folder, batch=STALE, sampler="fixed", correction="token-is")
    metrics = [agent.iterate() for _ in range(4)][-1]
    assert metrics["kl_k3"] > 1e-2
    assert metrics["behavior_noise_kl"] < 1e-6 and metrics["noise_kl"] < 1e-6


def test_a_sampler_that_learns_hears_of_fresh_completions_alone(folder: str) -> None:
    agent = make(folder, batch=GROUPS, **NESTED)
    told: list[dict[str, float]] = []
    agent.nesting.observe = lambda rollout, diagnostics: told.append(dict(diagnostics))  # type: ignore[method-assign]
    for _ in range(3):
        metrics = agent.iterate()
    assert told[-1]["D"] == metrics["fresh/D"] != metrics["D"]
    assert told[-1]["ess_sequence"] == metrics["fresh/ess_sequence"]
    whole = make(folder, batch=WHOLE, **NESTED)
    told.clear()
    whole.nesting.observe = agent.nesting.observe  # type: ignore[method-assign]
    whole.iterate(), whole.iterate()
    assert len(told) == 1


def test_stored_completions_do_not_pull_at_the_layers_drawn_now(folder: str) -> None:
    """The consistency loss is an expectation over what the nested policy of this iteration writes."""

    def gradient(batch: dict[str, Any], consistency: float) -> Tensor:
        agent = make(folder, batch=batch, consistency=consistency, **NESTED)
        agent.consistency = 0.0
        agent.iterate()
        agent.consistency = consistency
        return gradient_of(agent, agent.iterate)

    assert torch.equal(gradient(WHOLE, 1.0), gradient(WHOLE, 0.0))
    assert not torch.allclose(gradient(GROUPS, 1.0), gradient(GROUPS, 0.0), rtol=1e-2)


@pytest.mark.parametrize("batch", [GROUPS, STALE], ids=["replay", "stale"])
def test_defensive_groups_keep_both_densities_of_their_time(folder: str, batch: dict[str, Any]) -> None:
    """W = pi / ((q + mu) / 2), q and mu being the full and the nested model of the time of writing, whatever has been
    learnt since."""
    agent = make(folder, batch=batch, sampler="fixed", correction="defensive", target_written=2)
    before = []
    for _ in range(4):
        before.append(WeightCopy(agent.target))
        (seen,) = heard(agent, 1)
        assert numbers(agent.metrics)["weight_mean"] > 0
    assert seen.target_logp is not None and seen.by_target is not None
    ages = torch.full((len(seen),), 2) if seen.age is None else seen.age
    for age in ages.unique().tolist():
        part = seen.select((ages == age).nonzero()[:, 0])
        assert part.target_logp is not None
        with before[3 - age].in_place():
            full = scored(agent.target, part)
            nested = agent.target.logprobs(part.prompts, part.tokens, part.mask, layers=agent.layers).detach()
        torch.testing.assert_close(part.target_logp[part.mask], full[part.mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.behavior_logp[part.mask], nested[part.mask], rtol=1e-4, atol=1e-4)
        q, mu = ((logp * part.mask).double().sum(1).exp() for logp in (full, nested))
        weight = agent.correction(full, replace(part, old_logp=torch.zeros_like(full)), part.reward)
        torch.testing.assert_close(weight[:, 0].double(), q / (q / 2 + mu / 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch": WHOLE, **NESTED},
        {"batch": {**GROUPS, "window": 2}, **NESTED, "mask_truncated": True, "minibatches": 2, "epochs": 2},
        {"batch": GROUPS, "sampler": "fixed", "correction": "defensive", "target_written": 1},
        {"batch": STALE, **NESTED},
        {"batch": STALE, "lora_rank": 4, "correction": "token-is"},
        {"batch": STALE, "sampler": "fixed", "correction": "defensive", "target_written": 1},
    ],
    ids=["whole", "groups", "groups-defensive", "stale", "stale-adapters", "stale-defensive"],
)
def test_a_run_cut_in_the_middle_goes_on_to_the_same_numbers(
    folder: str, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    straight = make(folder, **arguments)
    for n in range(3):
        straight.iterate()
        straight.save(tmp_path / str(n))
    expected = [numbers(straight.iterate()) for _ in range(2)]
    assert any(metrics["age"] > 0 for metrics in expected)
    for n in range(3):
        resumed = ReFT.load(tmp_path / str(n), CoinFlips(16))
        for _ in range(2 - n):
            resumed.iterate()
        assert [numbers(resumed.iterate()) for _ in range(2)] == expected
        assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch": WHOLE, **NESTED},
        {"batch": {**GROUPS, "window": 1}, "sampler": "fixed", "correction": "self-normalised", "minibatches": 2},
        {"batch": GROUPS, "sampler": "fixed", "correction": "defensive", "target_written": 1},
        {"batch": {"id": "stale"}, **NESTED},
    ],
    ids=["whole", "groups", "defensive", "stale"],
)
def test_two_processes_give_the_numbers_of_one(folder: str, tmp_path: Path, arguments: dict[str, Any]) -> None:
    metrics, after = trained(folder, **arguments)
    assert metrics["1 age"] > 0
    for result in in_processes(2, lambda: trained(folder, **arguments), tmp_path):
        assert not isinstance(result, str), result
        assert result[0].keys() == metrics.keys()
        for name, value in metrics.items():
            assert result[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(result[1], after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [WHOLE, GROUPS, STALE], ids=["whole", "groups", "stale"])
def test_micro_batches_change_nothing(folder: str, batch: dict[str, Any]) -> None:
    whole, parts = (make(folder, batch=batch, microbatch_tokens=tokens, **NESTED) for tokens in (None, 120))
    for agent in (whole, parts):
        agent.optimizer.param_groups[0]["eps"] = 1e-2
        agent.iterate()
    first, second = (gradient_of(agent, agent.iterate) for agent in (whole, parts))
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(second, first, rtol=2e-3, atol=2e-5)


def test_refill_replaces_silent_groups_among_the_fresh_ones_alone(folder: str) -> None:
    agent = pairs(folder, refill_tokens=10_000, correction="token-is", batch={**GROUPS, "window": 1})
    (first,) = heard(agent, 1)
    (second,) = heard(agent, 1)
    assert second.age is not None and len(second) == len(first) == 16
    assert int((second.age > 0).sum()) == 8
    stored = second.select((second.age > 0).nonzero()[:, 0])
    of_first = {tuple(row) for row in first.behavior_logp.tolist()}
    assert {tuple(row[: stored.mask.shape[1]]) for row in first.behavior_logp.tolist()} >= {
        tuple(row) for row in stored.behavior_logp.tolist()
    }
    assert len(of_first) > 4
    fresh = second.reward[second.age == 0].view(-1, 2)
    assert bool((fresh.amax(1) > fresh.amin(1)).all()), "every fresh group has signal"
    assert agent.metrics["refill_groups"] > 0


def test_replayed_groups_are_drawn_as_declared() -> None:
    age, reward = np.repeat([1, 2], 8), np.zeros((16, 4), dtype=np.float32)
    draws = [Replay(0.4).recall(age, reward, 8, np.random.default_rng([5, n])) for n in range(2000)]
    stored = [draw for draw in draws if len(draw)]
    assert len(stored) / len(draws) == pytest.approx(0.4, abs=4 * (0.24 / 2000) ** 0.5)
    assert {tuple(draw) for draw in stored} == {tuple(range(8)), tuple(range(8, 16))}
    newest = np.mean([draw[0] == 0 for draw in stored])
    assert newest == pytest.approx(0.5, abs=4 * (0.25 / len(stored)) ** 0.5)
    mixed = [Replay(0.25, by="group").recall(age, reward, 8, np.random.default_rng([6, n])) for n in range(2000)]
    assert all(len(set(draw.tolist())) == 2 for draw in mixed)
    counts = np.bincount(np.concatenate(mixed), minlength=16)
    assert np.all(np.abs(counts - 250) < 5 * 250**0.5)


def test_store_is_bounded_by_its_window(folder: str) -> None:
    agent = make(folder, batch={**GROUPS, "window": 2}, correction="token-is")
    for _ in range(5):
        agent.iterate()
    assert sorted(agent.batching.kept) == [3, 4]
    tensors, _ = agent.batching.state_dict()
    per_token = sum(
        value.numel() * value.element_size()
        for name, value in tensors.items()
        if name.endswith((".tokens", ".mask", ".behavior_logp"))
    )
    assert per_token <= 2 * 24 * 8 * 13, "window * B * T * 13 bytes"


@pytest.mark.parametrize(
    ("id", "arguments", "word"),
    [
        ("replay", {"share": 1.5}, "share=1.5"),
        ("replay", {"window": 0}, "batch=fresh"),
        ("replay", {"by": "token"}, "by='token'"),
        ("replay", {"until": -1}, "until=-1"),
        ("stale", {"iterations": -1}, "iterations=-1"),
        ("contrast", {"memory": 0}, "memory=0"),
        ("contrast", {"answers": 0}, "answers=0"),
        ("contrast", {"scale": 0.0}, "scale=0.0"),
    ],
)
def test_wrong_fields(id: str, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        batches.make(id, **arguments)


def test_wrong_positions_are_named(folder: str) -> None:
    class Twice(Replay):
        def recall(self, age: Any, reward: Any, count: int, rng: Any) -> Any:
            return np.zeros(2, dtype=np.int64)

    agent = make(folder, batch=Twice(), correction="token-is")
    agent.iterate()
    with pytest.raises(UsageError, match=r"Twice.recall returned \[0, 0\]"):
        agent.iterate()


def test_stored_groups_of_another_size_are_refused(folder: str, tmp_path: Path) -> None:
    agent = make(folder, batch=GROUPS, correction="token-is")
    agent.iterate()
    agent.save(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"group_size=4.*group_size=2"):
        ReFT.load(tmp_path / "saved", CoinFlips(16), group_size=2)
    assert ReFT.load(tmp_path / "saved", CoinFlips(16), group_size=2, batch="fresh").iterate()["tokens"] > 0


@pytest.mark.parametrize("rank", [0, 4])
def test_stale_weights_that_load_adds_begin_at_those_loaded(folder: str, tmp_path: Path, rank: int) -> None:
    agent = make(folder, lora_rank=rank, correction="token-is")
    agent.iterate()
    agent.save(tmp_path / "saved")
    loaded = ReFT.load(tmp_path / "saved", CoinFlips(16), batch=STALE)
    for copy in loaded.batching.copies:
        with copy.in_place():
            assert torch.equal(weights(loaded), weights(agent))
    assert [loaded.iterate()["age"] for _ in range(4)] == [0, 1, 2, 2]


def test_no_callback_saves_weights_of_another_time(folder: str, tmp_path: Path) -> None:
    agent = make(folder, batch=STALE, correction="token-is")
    agent.iterate()
    with agent.batching.writing(agent.iteration), pytest.raises(UsageError, match="between iterations"):
        agent.save(tmp_path / "saved")
    agent.save(tmp_path / "saved")


@pytest.mark.parametrize("batch", ["replay", "stale"])
def test_a_correction_that_knows_nothing_of_mu_is_named(folder: str, batch: str) -> None:
    with pytest.warns(StaleData, match="truncated-is"):
        make(folder, batch=batch, correction="ppo-clip")


@pytest.mark.filterwarnings("error::agents.monitoring.watch.StaleData")
def test_a_correction_of_mu_is_not(folder: str) -> None:
    make(folder, batch="replay", correction="truncated-is*ppo-clip")
