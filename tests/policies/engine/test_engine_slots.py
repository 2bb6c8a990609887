"""KV slots against an uncached forward on the observation, for any order of starts, stops and refills."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import Policy
from policies.engine import decoder
from policies.native import kernels
from registry import UsageError
from tests.oracles.decoding import FULL, LONGEST, check_greedy, observe, roll_out
from tests.oracles.policy_checkpoints import (
    FAMILIES,
    VOCABULARY,
    random_batch,
    random_model,
    shared_policy,
    without_layers,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [FULL, (0, 2, 3)])
def test_slots_equal_a_fresh_forward_of_the_model_with_the_other_layers_removed(family, layers):
    policy = shared_policy(family)
    behavior = policy.behavior(layers, slots=3, max_length=LONGEST, temperature=0.0)
    model = without_layers(policy.model, layers)
    prefixes = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 9, 2, 4]]
    start = np.ones(3, bool)
    for _ in range(6):
        tokens = check_greedy(behavior, model, prefixes, start)
        prefixes = [[*prefix, int(token)] for prefix, token in zip(prefixes, tokens, strict=True)]
        start = np.zeros(3, bool)


# What happens to one slot at one step: it goes on, it starts one of a few prompts (so that prompts repeat), it idles.
EVENTS = st.lists(st.lists(st.sampled_from(["on", "on", "p0", "p1", "p2", "idle"]), min_size=4, max_size=4), max_size=7)
PROMPTS = {"p0": [7], "p1": [1, 2, 3, 4, 5], "p2": [1, 2, 3, 9, 9, 9, 8]}


@settings(max_examples=30, deadline=None)
@given(events=EVENTS, layers=st.sampled_from([FULL, (1, 3)]), flag_starts=st.booleans())
def test_slots_equal_a_fresh_forward_for_any_order_of_resets(events, layers, flag_starts):
    policy = shared_policy("qwen3")
    behavior = policy.behavior(layers, slots=4, max_length=LONGEST, temperature=0.0)
    model = without_layers(policy.model, layers)
    prefixes: list[list[int]] = [[] for _ in range(4)]
    for step in events:
        start = np.zeros(4, bool)
        for slot, event in enumerate(step):
            if event in PROMPTS:
                prefixes[slot], start[slot] = list(PROMPTS[event]), flag_starts
            elif event == "idle":
                prefixes[slot] = []
        tokens = check_greedy(behavior, model, prefixes, start)
        for slot, prefix in enumerate(prefixes):
            if prefix:
                prefix.append(int(tokens[slot]))


def test_the_slot_count_and_refills_change_no_episode():
    policy = shared_policy()
    rng = np.random.default_rng(0)
    distinct = [rng.integers(0, VOCABULARY, size).tolist() for size in (3, 8, 1)]
    deck = [distinct[i // 4] for i in range(12)]
    many = roll_out(policy, 12, deck, 8, seed=3)
    for slots in (1, 5):
        few = roll_out(policy, slots, deck, 8, seed=3)
        for episode, expected in many.items():
            assert [token for token, _ in few[episode]] == [token for token, _ in expected]
            np.testing.assert_allclose([p for _, p in few[episode]], [p for _, p in expected], atol=1e-4)
    other = roll_out(policy, 12, deck, 8, seed=4)
    assert other != many


@pytest.mark.skipif(kernels() is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("whole_steps", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_slot_count_changes_no_bit(dtype, whole_steps, monkeypatch):
    """Prompts are computed alone or with others, rows stand among few or many: the sums are the same."""
    monkeypatch.setattr(decoder, "takes_whole_steps", lambda *model: whole_steps)
    policy = Policy(random_model(hidden_size=128, intermediate_size=320), dtype=dtype)
    rng = np.random.default_rng(0)
    distinct = [rng.integers(0, VOCABULARY, size).tolist() for size in (3, 13, 1, 7)]
    deck = [distinct[i // 4] for i in range(16)]
    many = roll_out(policy, 16, deck, 6, seed=3)
    for slots in (1, 3, 7):
        assert roll_out(policy, slots, deck, 6, seed=3) == many


def test_behavior_logp_equals_policy_logprobs_with_all_layers():
    policy = shared_policy()
    deck = [[4, 5, 6], [4, 5, 6], [9]]
    record = roll_out(policy, 3, deck, 6, temperature=0.8)
    for episode, prompt in enumerate(deck):
        tokens = torch.tensor([[token for token, _ in record[episode]]])
        logp = policy.logprobs([torch.tensor(prompt)], tokens, torch.ones_like(tokens).bool(), temperature=0.8)
        np.testing.assert_allclose(logp[0].detach().numpy(), [p for _, p in record[episode]], atol=1e-4)


def test_bfloat16_slots_stay_near_float32():
    policy = Policy(random_model(), dtype="bfloat16")
    record = roll_out(policy, 3, [[4, 5, 6], [4, 5, 6], [9]], 6)
    tokens = torch.tensor([[token for token, _ in record[2]]])
    mask = torch.ones_like(tokens).bool()
    found = torch.tensor([[p for _, p in record[2]]])
    exact = shared_policy().logprobs([torch.tensor([9])], tokens, mask)
    torch.testing.assert_close(found, exact, atol=0.15, rtol=0.05)
    torch.testing.assert_close(policy.logprobs([torch.tensor([9])], tokens, mask), found, atol=0.15, rtol=0.05)


def test_a_step_needs_a_refresh_and_then_rollouts_follow_the_new_weights():
    policy = Policy(random_model(seed=1))
    behavior = policy.behavior(FULL, slots=1, max_length=LONGEST, temperature=0.0)
    prefixes, start = [[1, 2, 3]], np.ones(1, bool)
    check_greedy(behavior, policy.model, prefixes, start)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    prompts, tokens, mask = random_batch()
    policy.logprobs(prompts, tokens, mask).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="refresh"):
        behavior.act(observe(prefixes), start, np.zeros(1, np.int64))
    with pytest.raises(RuntimeError, match="refresh"):
        policy.behavior(FULL, slots=1, max_length=LONGEST)
    policy.refresh()
    assert policy.version == 1
    with pytest.raises(RuntimeError, match="weight version 0"):
        behavior.act(observe(prefixes), start, np.zeros(1, np.int64))
    check_greedy(policy.behavior((0, 2), 1, LONGEST, 0.0), without_layers(policy.model, (0, 2)), prefixes, start)


def test_the_model_is_never_altered_by_nesting():
    policy = shared_policy()
    before = list(policy.model.model.layers)
    policy.behavior((1,), slots=1, max_length=4).act(observe([[1]]), np.ones(1, bool), np.zeros(1, np.int64))
    assert list(policy.model.model.layers) == before
    assert [block.self_attn.layer_idx for block in before] == list(FULL)


def test_behaviours_share_one_set_of_weights():
    policy = shared_policy()
    first, second = (policy.behavior(layers, 2, LONGEST).decoder.cache.store for layers in (FULL, (0, 3)))
    assert second.model.layers[1] is first.model.layers[3]


def test_bad_arguments_say_what_to_do():
    policy = shared_policy()
    with pytest.raises(UsageError, match="empty layer subset"):
        policy.behavior((), 1, LONGEST)
    with pytest.raises(UsageError, match="not increasing"):
        policy.behavior((1, 0), 1, LONGEST)
    with pytest.raises(UsageError, match="slots=0"):
        policy.behavior(FULL, 0, LONGEST)
    with pytest.raises(UsageError, match="temperature=-1"):
        policy.behavior(FULL, 1, LONGEST, temperature=-1)
    behavior = policy.behavior(FULL, 2, 4)
    with pytest.raises(UsageError, match="longer than max_length=4"):
        behavior.act(observe([[1] * 5, [1]]), np.ones(2, bool), np.zeros(2, np.int64))
    with pytest.raises(UsageError, match="2 slots"):
        behavior.act(observe([[1]]), np.ones(1, bool), np.zeros(1, np.int64))
