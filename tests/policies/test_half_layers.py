"""Subsets that keep half of a layer, against transformers with the other half's residual branch zeroed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policies import LayerSubset, Policy, check_subset
from policies.nested import from_halves, halves, without
from registry import UsageError
from tests.oracles.decoding import LONGEST, check_greedy
from tests.oracles.policy_checkpoints import (
    FAMILIES,
    LAYERS,
    plain_logp,
    random_batch,
    random_model,
    shared_policy,
    zeroed,
)

SUBSETS: list[LayerSubset] = [(0, "1.attention", "2.mlp", 3), ("0.mlp", "2.attention", 3), ("1.attention",)]


def check_decoding(policy: Policy, layers: LayerSubset) -> None:
    behavior = policy.behavior(layers, slots=3, max_length=LONGEST, temperature=0.0)
    model = zeroed(policy.model, layers)
    prefixes, start = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 9, 2, 4]], np.ones(3, bool)
    for _ in range(5):
        tokens = check_greedy(behavior, model, prefixes, start)
        prefixes = [[*prefix, int(token)] for prefix, token in zip(prefixes, tokens, strict=True)]
        start = np.zeros(3, bool)
    # one slot falls idle, another starts a prompt that is remembered
    prefixes[0], prefixes[2], start = [], [9, 9, 2, 4], np.array([False, False, True])
    check_greedy(behavior, model, prefixes, start)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", SUBSETS)
def test_decoding_equals_zeroed_branches(family, layers):
    check_decoding(shared_policy(family), layers)


@pytest.mark.parametrize("family", ["llama-rope-scaled", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("layers", SUBSETS)
def test_decoding_in_pure_torch_equals_zeroed_branches(family, layers, monkeypatch):
    monkeypatch.setattr("policies.native.kernels", lambda: None)
    check_decoding(shared_policy(family), layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", SUBSETS)
def test_logprobs_equal_zeroed_branches(family, layers):
    policy = shared_policy(family)
    prompts, tokens, mask = random_batch()
    expected = plain_logp(zeroed(policy.model, layers), prompts, tokens, mask, 0.7)
    for saving in (False, True):
        policy.gradient_checkpointing = saving
        try:
            found = policy.logprobs(prompts, tokens, mask, layers=layers, temperature=0.7)
        finally:
            policy.gradient_checkpointing = False
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", SUBSETS)
def test_the_fallback_to_transformers_layers_equals_zeroed_branches(layers):
    policy = Policy(random_model("qwen2"))
    policy.functional = False
    check_decoding(policy, layers)
    prompts, tokens, mask = random_batch()
    expected = plain_logp(zeroed(policy.model, layers), prompts, tokens, mask)
    torch.testing.assert_close(policy.logprobs(prompts, tokens, mask, layers), expected, atol=1e-4, rtol=1e-4)


def test_a_half_that_is_skipped_gets_no_gradient():
    policy = Policy(random_model())
    policy.logprobs(*random_batch(), layers=(0, "1.mlp", 2, "3.attention")).sum().backward()
    first, last = policy.model.model.layers[1], policy.model.model.layers[3]
    assert first.self_attn.q_proj.weight.grad is None
    assert last.mlp.up_proj.weight.grad is None
    assert first.mlp.up_proj.weight.grad.abs().max() > 0
    assert last.self_attn.q_proj.weight.grad.abs().max() > 0


@given(kept=st.sets(st.integers(0, 15), min_size=1))
def test_a_subset_has_one_spelling_and_skipping_is_its_complement(kept):
    if all(half % 2 for half in kept):
        with pytest.raises(UsageError, match="no attention"):
            check_subset(from_halves(sorted(kept)), 8)
        return
    names = [f"{half // 2}.{('attention', 'mlp')[half % 2]}" for half in sorted(kept)]
    subset = check_subset(names, 8)
    assert subset == check_subset(subset, 8)
    assert halves(subset) == sorted(kept)
    assert not any(f"{n}.attention" in subset and f"{n}.mlp" in subset for n in range(8))
    assert without(from_halves(sorted(set(range(16)) - kept)), 8) == subset


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((0, "1.head"), "'1.head' is no block"),
        ((0, "mlp"), "'mlp' is no block"),
        (("1.mlp", "1.attention"), "not increasing"),
        ((1, "1.mlp"), "not increasing"),
        ((0, "4.mlp"), "outside the model's layers 0 to 3"),
        (("0.mlp", "1.mlp"), "keeps no attention"),
    ],
)
def test_what_is_no_subset_is_refused(layers, words):
    with pytest.raises(UsageError, match=words):
        check_subset(layers, 4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_skipped_is_counted_by_weight(family):
    policy = shared_policy(family)
    block = policy.model.model.layers[0]
    attention, mlp = (
        sum(weight.numel() for weight in half.parameters() if weight.dim() == 2)
        for half in (block.self_attn, block.mlp)
    )
    share = attention / (attention + mlp)
    assert policy.layers_skipped(tuple(range(LAYERS))) == 0
    assert policy.layers_skipped((0, 3)) == 2
    assert policy.layers_skipped((0, "1.mlp", 2, 3)) == pytest.approx(share)
    assert policy.layers_skipped((0, "2.attention", 3)) == pytest.approx(2 - share)
