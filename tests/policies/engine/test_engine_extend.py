"""Several tokens of a slot in one pass, against one step a token: in every store, at any mixture of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policies import Policy
from policies.engine.native_store import NativeStore
from policies.engine.torch_store import TorchStore
from policies.engine.whole_steps import WholeStepStore
from policies.native import kernels
from tests.oracles.policy_checkpoints import FAMILIES, LAYERS, VOCABULARY, random_model
from tests.policies.engine.test_engine_steps import layered, pure

LONGEST = 80
FULL = tuple(range(LAYERS))
STORES = {"whole": WholeStepStore, "layered": NativeStore, "torch": TorchStore, "uncached": None}
PROMPTS = (20, 3, 20, 1, 17, 20)  # tokens; equal sizes are the same prompt
SIZES = (64, 30, 21, 60, 18, 40)  # of the whole text


def texts() -> np.ndarray:
    """[6, LONGEST] tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (len(PROMPTS), LONGEST))
    for row in (2, 5):
        ids[row, :20] = ids[0, :20]
    return ids


def decoder_of(monkeypatch, policy: Policy, store: str):
    if store in ("whole", "layered") and kernels() is None:
        pytest.skip("no compiled kernels here")
    if store == "layered":
        layered(monkeypatch)
    if store == "torch":
        pure(monkeypatch)
    if store == "uncached":
        policy.functional = False
    decoder = policy.behavior(FULL, len(PROMPTS), LONGEST).decoder
    if STORES[store] is not None and type(decoder.cache.store) is not STORES[store]:
        pytest.skip("this store does not cover the model")
    return decoder


def one_by_one(decoder, ids: np.ndarray) -> list[list[torch.Tensor]]:
    """By slot, the final hidden state after each prefix from the prompt's on."""
    states: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    length, start = np.array(PROMPTS), np.ones(len(PROMPTS), bool)
    while True:
        active = np.flatnonzero(length <= np.array(SIZES))
        if not len(active):
            return states
        for slot, state in zip(active, decoder.hidden(ids, length * (length <= SIZES), start, active), strict=True):
            states[slot].append(state)
        length, start = length + 1, np.zeros(len(PROMPTS), bool)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_many_tokens_at_once_are_as_many_steps(monkeypatch, family: str, store: str) -> None:
    policy = Policy(random_model(family))
    decoder, ids = decoder_of(monkeypatch, policy, store), texts()
    none = np.zeros(len(PROMPTS), bool)
    with torch.inference_mode():
        expected = one_by_one(policy.behavior(FULL, len(PROMPTS), LONGEST).decoder, ids)
        # first the prompts of all slots but one, a step of two of them, then the rest of all, from wherever they are
        first = np.array([n for n in range(len(PROMPTS)) if n != 4])
        size = np.array(PROMPTS)
        start = decoder.extend(ids, size[first], size[first], ~none, first)
        check(start, [expected[slot][0] for slot in first], store)
        middle = np.array([2, 3])
        between = decoder.extend(ids, size[middle] + 1, size[middle] + 1, none, middle)
        check(between, [expected[slot][1] for slot in middle], store)
        everyone = np.arange(len(PROMPTS))
        whole = decoder.extend(ids, size, np.array(SIZES), none, everyone)
        check(whole, [state for states in expected for state in states], store)
        # what is cut off again is overwritten, and steps go on from there
        other = ids.copy()
        other[:, 25:] = (other[:, 25:] + 1) % VOCABULARY
        long = np.array([0, 1, 3, 5])
        again = decoder.extend(other, np.full(4, 24), np.full(4, 26), none, long)
        fresh = policy.behavior(FULL, len(PROMPTS), LONGEST).decoder
        check(again, list(fresh.extend(other, np.full(4, 24), np.full(4, 26), ~none, long)), store)
        step = decoder.hidden(other, np.full(6, 27), none, long)
        check(step, list(fresh.hidden(other, np.full(6, 27), ~none, long)), store)


def check(states: torch.Tensor, expected: list[torch.Tensor], store: str) -> None:
    if store == "whole":  # the same sums in the same order
        torch.testing.assert_close(states, torch.stack(expected), atol=2e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(states, torch.stack(expected), atol=2e-4, rtol=1e-3)


def test_whole_steps_give_the_same_bits(monkeypatch) -> None:
    policy = Policy.load("tiny")
    decoder, ids = decoder_of(monkeypatch, policy, "whole"), texts() % policy.vocab_size
    with torch.inference_mode():
        expected = one_by_one(policy.behavior(tuple(range(policy.num_layers)), len(PROMPTS), LONGEST).decoder, ids)
    decoder = policy.behavior(tuple(range(policy.num_layers)), len(PROMPTS), LONGEST).decoder
    everyone, size = np.arange(len(PROMPTS)), np.array(PROMPTS)
    with torch.inference_mode():
        decoder.extend(ids, size, size, everyone >= 0, everyone)
        states = decoder.extend(ids, size, np.array(SIZES), everyone < 0, everyone)
    assert torch.equal(states, torch.stack([state for states in expected for state in states]))
