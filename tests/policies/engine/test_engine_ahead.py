"""Tokens written ahead are those written one by one, whatever the environment does with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from policies import Behavior, Policy
from policies.engine.ahead import Ahead
from policies.engine.native_store import NativeStore
from policies.engine.torch_store import TorchStore
from tests.oracles.decoding import FULL, LONGEST, check_greedy, fresh_logp, observe, roll_out
from tests.oracles.policy_checkpoints import random_model, shared_policy
from tests.oracles.replays import recompute, replayed

DECK = [[4, 5, 6], [4, 5, 6], [9], list(range(11)), list(range(11)), [1, 2]]


def let_ahead(behavior: Behavior, most: int) -> Ahead:
    ahead = Ahead(behavior.decoder, behavior.slots, behavior.sampling, most, patience=1)
    behavior._next = ahead.next
    return ahead


class Writing:
    """A policy whose behaviours write up to ``most`` tokens ahead, and what they had to ask the decoder for."""

    def __init__(self, policy: Policy, most: int) -> None:
        self.policy = policy
        self.most = most
        self.made: list[Ahead] = []
        self.calls = 0

    def behavior(self, *arguments: Any, **sampling: Any) -> Behavior:
        behavior = self.policy.behavior(*arguments, **sampling)
        if self.most > 1:
            self.made.append(let_ahead(behavior, self.most))
        decoder: Any = behavior.decoder
        hidden = decoder.hidden

        def counted(*given: Any) -> Any:
            self.calls += 1
            return hidden(*given)

        decoder.hidden = counted
        return behavior


def same_episodes(found: dict[int, list], expected: dict[int, list], exact: bool) -> None:
    for episode, steps in expected.items():
        tokens, logp = zip(*steps, strict=True)
        again, logp_again = zip(*found[episode], strict=True)
        assert again == tokens
        if exact:
            assert logp_again == logp
        np.testing.assert_allclose(logp_again, logp, atol=1e-4)


@pytest.fixture(params=[NativeStore, TorchStore])
def store(request, monkeypatch):
    if request.param is TorchStore:
        monkeypatch.setattr("policies.native.kernels", lambda: None)
    return request.param


@pytest.mark.parametrize("most", [2, 3, 8])
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_writing_ahead_changes_no_episode(store, slots, most):
    """Six episodes of 8, 9 and 10 tokens: slots are refilled while others are in the middle, and drained."""
    policy = shared_policy()
    expected = roll_out(policy, slots, DECK, 8, seed=2)
    writing = Writing(policy, most)
    found = roll_out(writing, slots, DECK, 8, seed=2)
    same_episodes(found, expected, exact=slots == 1)
    assert isinstance(writing.made[0].decoder.cache.store, store)
    steps = sum(map(len, expected.values())) / slots
    assert writing.calls < 0.8 * steps


@pytest.mark.parametrize("most", [3, 8])
def test_rows_in_step_give_the_same_numbers_to_the_bit(store, most):
    """Where no episode ends before the others, every step has the rows that it would have one by one."""
    policy = shared_policy()
    deck = [[1, 2, 3], [4, 5], [6], [1, 2, 3]]
    same_episodes(roll_out(Writing(policy, most), 1, deck, 13, seed=5), roll_out(policy, 1, deck, 13, seed=5), True)
    together = {slots: act_on(policy, most, slots, 14) for slots in (2, 4)}
    for slots, (found, calls) in together.items():
        expected, single = act_on(policy, 1, slots, 14)
        assert found == expected
        assert single == 14
        assert calls == {3: 5, 8: 3}[most]  # windows of 2, 3, 3, 3, 3 and of 2, 4, 8


def act_on(policy: Policy, most: int, slots: int, steps: int) -> tuple[list, int]:
    writing = Writing(policy, most)
    behavior = writing.behavior(FULL, slots=slots, max_length=LONGEST, seed=7)
    prefixes = [[slot + 1, 2, 3] for slot in range(slots)]
    written = []
    for step in range(steps):
        tokens, logp = behavior.act(observe(prefixes), np.full(slots, step == 0), np.arange(slots))
        written.append((tokens.tolist(), logp.tolist()))
        for prefix, token in zip(prefixes, tokens.tolist(), strict=True):
            prefix.append(token)
    return written, writing.calls


def test_the_observation_is_the_truth(store):
    """Edited last tokens, edited prompts, truncated prefixes, episodes that change without saying so."""
    policy = shared_policy()
    behavior = policy.behavior(FULL, slots=3, max_length=LONGEST, temperature=0.0)
    let_ahead(behavior, 8)
    prefixes, start = [[5, 6, 7, 8], [3], [9, 9, 2, 4]], np.ones(3, bool)

    def go(steps: int) -> None:
        nonlocal start
        for _ in range(steps):
            tokens = check_greedy(behavior, policy.model, prefixes, start)
            for prefix, token in zip(prefixes, tokens.tolist(), strict=True):
                prefix.append(token)
            start = np.zeros(3, bool)

    go(4)
    prefixes[0][-1] = (prefixes[0][-1] + 1) % 90
    go(3)
    prefixes[1][0] = 4
    go(2)
    del prefixes[2][-3:]
    go(2)
    del prefixes[0][2:]  # shorter than the prompt that the row began with
    go(3)


def test_a_token_belongs_to_its_episode(store):
    policy = shared_policy()
    behavior = policy.behavior(FULL, slots=1, max_length=LONGEST, seed=1)
    let_ahead(behavior, 8)
    obs, prompt, none = observe([[1, 2, 3]]), np.ones(1, bool), np.zeros(1, bool)
    for episode in range(12):
        token, logp = behavior.act(obs, prompt if episode == 0 else none, np.array([episode]))
        alone = policy.behavior(FULL, slots=1, max_length=LONGEST, seed=1).act(obs, prompt, np.array([episode]))
        assert token == alone[0]
        assert logp == pytest.approx(alone[1], abs=1e-5)


def test_states_and_tokens_of_one_behaviour(store):
    policy = shared_policy()
    behavior = policy.behavior(FULL, slots=2, max_length=LONGEST, temperature=0.0)
    let_ahead(behavior, 4)
    prefixes, start = [[5, 6, 7], [3]], np.ones(2, bool)
    for _ in range(7):
        tokens = check_greedy(behavior, policy.model, prefixes, start)
        logits = policy.model.lm_head(behavior.states(observe(prefixes)).clone())
        for row, expected in zip(logits.log_softmax(-1), fresh_logp(policy.model, prefixes), strict=True):
            np.testing.assert_allclose(row.detach(), expected, atol=1e-3)
        prefixes = [[*prefix, int(token)] for prefix, token in zip(prefixes, tokens, strict=True)]
        start = np.zeros(2, bool)


def test_a_prefix_may_reach_the_longest(store):
    policy = shared_policy()
    behavior = policy.behavior(FULL, slots=2, max_length=LONGEST, temperature=0.0)
    let_ahead(behavior, 8)
    prefixes, start = [list(range(10, 10 + LONGEST - 9)), [3]], np.ones(2, bool)
    while len(prefixes[0]) <= LONGEST:
        tokens = check_greedy(behavior, policy.model, prefixes, start)
        prefixes = [[*prefix, int(token)] for prefix, token in zip(prefixes, tokens, strict=True)]
        start = np.zeros(2, bool)
    prefixes[0] = []
    for _ in range(5):
        tokens = check_greedy(behavior, policy.model, prefixes, start)
        prefixes[1].append(int(tokens[1]))


@pytest.mark.parametrize("most", [3, 8])
def test_windows_of_replayed_steps_write_the_same_episodes(most, monkeypatch):
    model = random_model("llama")
    expected = roll_out(Policy(model), 5, DECK, 6, seed=1)
    made = replayed(monkeypatch, recompute)
    found = roll_out(Writing(Policy(model), most), 5, DECK, 6, seed=1)
    assert any(replays.captured for replays in made)
    same_episodes(found, expected, exact=False)
