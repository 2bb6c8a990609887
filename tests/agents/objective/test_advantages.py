"""Advantages and aggregations: closed forms, invariances, and micro-batches that add up."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import agents  # noqa: F401  registers the components
from registry import UsageError, advantages, aggregations

REWARD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
GROUP = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2])
MASK = torch.arange(6) < torch.tensor([6, 1, 3, 5, 2, 6, 4, 1])[:, None]


@pytest.mark.parametrize(
    ("id", "fields", "expected"),
    [
        ("reinforce", {}, [1, 0, 0, 1, 1, 1, 1, 0]),
        ("reinforce", {"baseline": 0.25}, [0.75, -0.25, -0.25, 0.75, 0.75, 0.75, 0.75, -0.25]),
        ("unlabelled", {}, [1] * 8),
        ("rloo", {}, [2 / 3, -2 / 3, -2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, -1]),
        ("dr-grpo", {}, [0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75]),
        ("grpo", {"eps": 0.0}, [0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5, 0.5, 0.5, 0.5, -1.5]),
        ("whitened", {"eps": 0.0}, [0.6**0.5, -1 / 0.6**0.5, -1 / 0.6**0.5, *[0.6**0.5] * 4, -1 / 0.6**0.5]),
    ],
)
def test_by_hand(id, fields, expected):
    torch.testing.assert_close(advantages.make(id, **fields)(REWARD, GROUP), torch.tensor(expected, dtype=REWARD.dtype))


@pytest.mark.parametrize("id", advantages.ids())
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_order_and_group_numbers_change_nothing(id, data):
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5))
    reward = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=groups * size, max_size=groups * size))
    )
    group = torch.arange(groups).repeat_interleave(size)
    advantage = advantages.make(id)
    found = advantage(reward, group)
    order = torch.tensor(data.draw(st.permutations(range(groups * size))))
    torch.testing.assert_close(advantage(reward[order], 50 - 3 * group[order]), found[order])
    assert torch.isfinite(found).all() and found.shape == reward.shape


@pytest.mark.parametrize("id", ["rloo", "dr-grpo", "grpo", "down-sampled"])
def test_a_group_that_agrees_teaches_nothing(id):
    found = advantages.make(id)(torch.ones(4), torch.tensor([0, 0, 1, 1]))
    assert torch.equal(found, torch.zeros(4))


@given(
    reward=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=7),
    keep=st.integers(2, 5),
)
@settings(max_examples=60, deadline=None)
def test_down_sampling_keeps_the_completions_of_largest_variance(reward, keep):
    values = torch.tensor(reward)
    found = advantages.make("down-sampled", keep=keep, eps=0.0 if len(set(reward)) > 1 else 1.0)(
        torch.cat([values, 1 - values]), torch.tensor([4] * len(reward) + [1] * len(reward))
    )
    for rewards, advantage in ((values, found[: len(reward)]), (1 - values, found[len(reward) :])):
        kept = advantage.nonzero()[:, 0]
        largest = max(torch.var(torch.tensor(some)) for some in combinations(rewards.tolist(), min(keep, len(reward))))
        if largest == 0:
            assert len(kept) == 0
            continue
        # kept completions at their own mean have advantage 0: the others are a lower bound of the sum of squares
        torch.testing.assert_close(advantage.square().sum(), torch.tensor(min(keep, len(reward)) - 1.0))
        slope = (rewards[kept].max() - rewards[kept].min()) / (advantage[kept].max() - advantage[kept].min())
        torch.testing.assert_close(slope.square(), largest)


def test_down_sampling_one_right_of_many_keeps_it():
    reward = torch.zeros(64)
    reward[41] = 1.0
    found = advantages.make("down-sampled", keep=8, eps=0.0)(reward, torch.zeros(64))
    assert int((found != 0).sum()) == 8
    torch.testing.assert_close(found[41], torch.tensor(7 / 8**0.5))


def test_down_sampling_to_one_is_refused():
    with pytest.raises(UsageError, match="keep=1"):
        advantages.make("down-sampled", keep=1)


@pytest.mark.parametrize("id", ["rloo", "dr-grpo", "grpo", "down-sampled"])
def test_a_lone_completion_is_refused(id):
    with pytest.raises(UsageError, match="at least 2"):
        advantages.make(id)(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))


def test_coefficients_by_hand():
    lengths = MASK.sum(1, keepdim=True)
    coefficients = {
        "token-mean": MASK / 28,
        "sequence-mean": MASK / (8 * lengths),
        "constant": MASK / 8,
    }
    for id, expected in coefficients.items():
        found = aggregations.make(id)(MASK)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(aggregations.make("constant", max_tokens=10)(MASK), MASK.float() / 80)


@pytest.mark.parametrize("id", aggregations.ids())
def test_micro_batches_add_up(id):
    """The coefficients are the whole minibatch's, so any split of it, packed or not, sums to the same loss."""
    values = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coef = aggregations.make(id)(MASK).double()
    whole = (coef * values).sum()
    packed = coef[MASK] @ values[MASK]
    parts = sum((c * v).sum() for c, v in zip(coef.split(3), values.split(3), strict=True))
    torch.testing.assert_close(whole, packed)
    torch.testing.assert_close(whole, parts)
    assert not coef[~MASK].any()


@pytest.mark.parametrize("id", aggregations.ids())
def test_empty_completions_are_harmless(id):
    mask = torch.tensor([[True, True], [False, False]])
    found = aggregations.make(id)(mask)
    assert torch.isfinite(found).all() and not found[1].any()


def test_constant_refuses_a_budget_below_one():
    with pytest.raises(UsageError, match="max_tokens"):
        aggregations.make("constant", max_tokens=0)


@pytest.mark.parametrize("id", [id for id in advantages.ids() if id not in ("reinforce", "unlabelled")])
@given(reward=st.floats(-1e3, 1e3, width=32), size=st.integers(2, 64))
@settings(max_examples=50, deadline=None)
def test_equal_rewards_teach_exactly_nothing(id, reward, size):
    """In float32 the mean of seven .9 is not .9; what is left would be divided by a deviation that is next to 0."""
    advantage = advantages.make(id)(torch.full((size,), reward, dtype=torch.float32), torch.zeros(size).long())
    assert not advantage.any()
