"""Replayed decode steps. Capturing needs a CUDA device; the buckets, the padding and the checks around it do not."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from policies import Policy
from policies.engine.graphs import bucket
from tests.oracles.decoding import observe, roll_out
from tests.oracles.policy_checkpoints import random_model
from tests.oracles.replays import recompute, replayed

DECK = [[4, 5, 6], [4, 5, 6], [9], *[list(range(n)) for n in (17, 17, 2)]]


def wrong(step, inputs, size, pool):
    out = step(inputs, size).clone()
    return (lambda: out.mul_(1.5)), out


def impossible(step, inputs, size, pool):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_padded_and_replayed_steps_write_the_same_episodes(family, monkeypatch):
    model = random_model(family)
    expected = roll_out(Policy(model), 5, DECK, 4, seed=1)
    made = replayed(monkeypatch, recompute)
    found = roll_out(Policy(model), 5, DECK, 4, seed=1)
    assert any(replays.captured for replays in made)
    for episode, steps in expected.items():
        tokens, logp = zip(*steps, strict=True)
        again, logp_again = zip(*found[episode], strict=True)
        assert again == tokens
        np.testing.assert_allclose(logp_again, logp, atol=1e-4)


@pytest.mark.parametrize(
    ("capture", "why"), [(wrong, "not reproduce"), (impossible, r"captured \(operation not .*g\):")]
)
def test_a_graph_that_computes_something_else_is_not_used(monkeypatch, capture, why):
    model = random_model("llama")
    expected = roll_out(Policy(model), 5, DECK, 4, seed=1)
    made = replayed(monkeypatch, capture)
    with pytest.warns(UserWarning, match=f"{why}.*without graphs"):
        found = roll_out(Policy(model), 5, DECK, 4, seed=1)
    assert not any(replays.captured or replays.trusted for replays in made if replays.visits)
    assert {e: [t for t, _ in steps] for e, steps in found.items()} == {
        e: [t for t, _ in steps] for e, steps in expected.items()
    }


def test_a_behaviour_that_is_dropped_frees_its_store_at_once(monkeypatch):
    """On a GPU it has gigabytes, and the next iteration makes another."""
    made = replayed(monkeypatch, recompute)
    behavior = Policy(random_model("llama")).behavior((0, 1), 2, 8)
    store = weakref.ref(behavior.decoder.cache.store)
    behavior.act(observe([[1, 2, 3], []]), np.ones(2, bool), np.arange(2))
    made.clear()
    gc.disable()
    try:
        del behavior
        assert store() is None
    finally:
        gc.enable()


def test_buckets():
    assert [bucket(n, 200) for n in (1, 16, 17, 33, 64, 65, 129)] == [16, 16, 32, 64, 64, 128, 200]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_agree_with_scoring(dtype):
    """On a device: what a rollout through graphs logged is what the same weights score."""
    policy = Policy(random_model("qwen2").to("cuda"), dtype)
    steps = roll_out(policy, 5, DECK, 4, seed=1)
    for number, prompt in enumerate(DECK):
        tokens, logp = zip(*steps[number], strict=True)
        mask = torch.ones(1, len(tokens), dtype=torch.bool)
        scored = policy.logprobs([torch.tensor(prompt)], torch.tensor([tokens]), mask)[0]
        np.testing.assert_allclose(scored.detach().cpu(), logp, atol=1e-3 if dtype == "float32" else 0.2)
