"""Whole decode steps in one call, against the layered kernels and the pure torch path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from policies import PatchedSubset, Policy
from policies.engine.native_store import NativeStore
from policies.engine.sampling import draw, uniforms
from policies.engine.torch_store import TorchStore
from policies.engine.whole_steps import WholeStepStore
from policies.native import kernels
from policies.nested import Change
from tests.oracles.policy_checkpoints import FAMILIES, LAYERS, VOCABULARY, random_model

LONGEST = 48
SHAPES = {"odd": {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 72}}
SUBSETS = {"full": tuple(range(LAYERS)), "skip": (0, 2, 3), "halves": ("0.mlp", 1, "2.attention", "3.mlp")}


@pytest.fixture
def native():
    found = kernels()
    if found is None:
        pytest.skip("no compiled kernels here")
    return found


def layered(monkeypatch):
    monkeypatch.setattr("policies.engine.decoder.takes_whole_steps", lambda *_: False)


def pure(monkeypatch):
    monkeypatch.setattr("policies.native.kernels", lambda: None)


def prefixes(step: int) -> list[list[int]]:
    """Six slots: a shared prompt of 20 tokens, one of 3, none at all; a refill at step 3 and idle slots from step 5."""
    rng = np.random.default_rng(0)
    shared, short = rng.integers(0, VOCABULARY, 20).tolist(), rng.integers(0, VOCABULARY, 3).tolist()
    tails = rng.integers(0, VOCABULARY, (6, 12)).tolist()
    begins = [shared, short, shared, [], short if step < 3 else shared, shared]
    written = [tail[: 1 + (step if slot != 4 or step < 3 else step - 3)] for slot, tail in enumerate(tails)]
    full = [begin + tail for begin, tail in zip(begins, written, strict=True)]
    return [[] if step >= 5 and slot in (0, 3) else prefix for slot, prefix in enumerate(full)]


def hidden_states(policy: Policy, layers, store: type, slots: list[int], steps: int = 8) -> list[torch.Tensor]:
    """By step, the final hidden states [active, width] of the given ones of the six slots, with the same tokens."""
    behavior = policy.behavior(layers, len(slots), LONGEST)
    assert type(behavior.decoder.cache.store) is store
    found, before = [], [[] for _ in slots]
    for step in range(steps):
        now = [prefixes(step)[slot] for slot in slots]
        ids = np.zeros((len(slots), LONGEST), np.int64)
        for row, prefix in zip(ids, now, strict=True):
            row[: len(prefix)] = prefix
        length = np.array([len(prefix) for prefix in now])
        start = np.array([step == 0 or a[:3] != b[:3] for a, b in zip(before, now, strict=True)])
        active = np.flatnonzero(length)
        if len(active):
            with torch.inference_mode():
                found.append(behavior.decoder.hidden(ids, length, start, active))
        before = now
    return found


def check_paths(monkeypatch, policy: Policy, layers) -> None:
    everyone = list(range(6))
    whole = hidden_states(policy, layers, WholeStepStore, everyone)
    with monkeypatch.context() as patch:
        layered(patch)
        others = [hidden_states(policy, layers, NativeStore, everyone)]
        pure(patch)
        others.append(hidden_states(policy, layers, TorchStore, everyone))
    for other in others:
        for found, expected in zip(whole, other, strict=True):
            if policy.dtype == torch.float32:
                torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
            else:
                apart = (found - expected).norm(dim=1) / expected.norm(dim=1)
                assert apart.max() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", SUBSETS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3"}))  # which the kernels do not cover
def test_whole_steps_equal_the_other_paths(native, monkeypatch, family, layers, dtype):
    if dtype == "bfloat16" and not native.bf16_head:
        pytest.skip("no bfloat16 dot product on this processor")
    changes = {"head_dim": 32} if family == "qwen3" else {}
    check_paths(monkeypatch, Policy(random_model(family, **changes), dtype), SUBSETS[layers])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_odd_shapes_and_patches(native, monkeypatch, dtype):
    if dtype == "bfloat16" and not native.bf16_head:
        pytest.skip("no bfloat16 dot product on this processor")
    policy = Policy(random_model("llama", **SHAPES["odd"]), dtype)
    generator = torch.Generator().manual_seed(0)

    def change(size: int) -> Change:
        return Change(torch.randn(80, size, generator=generator) * 0.1, torch.randn(80, generator=generator))

    check_paths(monkeypatch, policy, PatchedSubset((0, 2, 3), {0: change(80), 5: change(72)}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_and_threads_change_no_bit(native, dtype):
    if dtype == "bfloat16" and not native.bf16_head:
        pytest.skip("no bfloat16 dot product on this processor")
    policy = Policy(random_model("qwen2"), dtype)
    layers, threads = SUBSETS["full"], torch.get_num_threads()
    together = hidden_states(policy, layers, WholeStepStore, list(range(6)), steps=5)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = hidden_states(policy, layers, WholeStepStore, list(range(6)), steps=5)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(together, again, strict=True):
        assert torch.equal(a, b)
    for slot in range(6):
        alone = hidden_states(policy, layers, WholeStepStore, [slot], steps=5)
        assert all(torch.equal(a[slot], b[0]) for a, b in zip(together, alone, strict=True))


def test_a_prompt_at_once_equals_its_tokens_one_by_one(native):
    policy = Policy(random_model("mistral-window"))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    at_once = policy.behavior(SUBSETS["full"], 1, LONGEST).decoder
    one_by_one = policy.behavior(SUBSETS["full"], 1, LONGEST).decoder
    for size in range(1, 41):
        stepped = one_by_one.hidden(tokens[None], np.array([size]), np.array([size == 1]), np.array([0]))
        if size in (1, 2, 16, 17, 33, 40):
            whole = at_once.hidden(tokens[None], np.array([size]), np.array([True]), np.array([0]))
            torch.testing.assert_close(whole, stepped, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vocabulary", [32, 70, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_small_head_draws_what_the_plain_draw_does(native, vocabulary, temperature, rows):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 50, generator=generator)
    weight = torch.randn(vocabulary, 50, generator=generator) * 0.5
    uniform = torch.from_numpy(uniforms(0, np.arange(rows), np.arange(rows)))
    head = native.steps.pack(weight)
    token, logp = native.steps.draw(hidden, head, temperature, uniform)
    expected, expected_logp = draw(F.linear(hidden, weight), uniform, temperature)
    assert torch.equal(token, expected)
    torch.testing.assert_close(logp, expected_logp, atol=1e-4, rtol=1e-4)
    alone, alone_logp = native.steps.draw(hidden[:1].contiguous(), head, temperature, uniform[:1])
    assert torch.equal(alone, token[:1]) and torch.equal(alone_logp, logp[:1])


def test_the_small_head_at_the_edges_of_the_uniform(native):
    weight = torch.full((100, 2), -2000.0)
    weight[[3, 98]] = 1.0
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    token, logp = native.steps.draw(torch.ones(4, 2), native.steps.pack(weight), 1.0, uniform)
    assert token.tolist() == [3, 3, 98, 98]
    torch.testing.assert_close(logp, torch.full((4,), 0.5).log())


def test_gates_far_below_zero_close(native):
    gate = torch.tensor([[-1e4, -200.0, -89.0, -60.0, 60.0, 200.0]])
    found = native.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(found, F.silu(gate), atol=1e-20, rtol=1e-5)


def test_large_models_go_layer_by_layer(native, monkeypatch):
    monkeypatch.setattr("policies.model.compute._WHOLE_STEP_BYTES", 1000)
    behavior = Policy(random_model()).behavior(SUBSETS["full"], 1, 4)
    assert type(behavior.decoder.cache.store) is NativeStore
