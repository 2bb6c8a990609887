"""Patched subsets against transformers with the changed weights, and fits against closed forms."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from policies import LayerSubset, PatchedSubset, Policy
from policies.nested import Change, halves, without
from policies.skipping.divergence import Length, Text, compare, states, write
from policies.skipping.patches import NormalEquations
from registry import UsageError, patches
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

FULL = tuple(range(LAYERS))
SUBSETS: list[LayerSubset] = [(0, 2, 3), (0, "1.attention", "2.mlp", 3), (1, "3.mlp")]
FITTING = ["absorb", "heal"]


def random_patches(policy: Policy, layers: LayerSubset) -> PatchedSubset:
    """Large changes of every second output map kept."""
    torch.manual_seed(1)
    changes = {}
    for number in halves(layers)[::2]:
        block = policy.model.model.layers[number // 2]
        weight = (block.mlp.down_proj if number % 2 else block.self_attn.o_proj).weight
        changes[number] = Change(0.1 * torch.randn_like(weight), 0.1 * torch.randn(len(weight)))
    return PatchedSubset(layers, changes)


def patched_model(model: Any, nested: PatchedSubset) -> Any:
    """transformers' model with what is skipped zeroed and the changes added to its own modules."""
    whole = zeroed(model, nested.layers)
    for number, change in nested.changes.items():
        block = whole.model.layers[number // 2]
        module = block.mlp.down_proj if number % 2 else block.self_attn.o_proj
        module.weight.data += change.weight
        old = module.bias.data if module.bias is not None else 0
        module.bias = torch.nn.Parameter(old + change.bias)
    return whole


def check_decoding(policy: Policy, nested: PatchedSubset) -> None:
    behavior = policy.behavior(nested, slots=2, max_length=LONGEST, temperature=0.0)
    model = patched_model(policy.model, nested)
    prefixes, start = [[5, 6, 7, 8, 9, 10, 11, 12], [9, 9, 2, 4]], np.ones(2, bool)
    for _ in range(4):
        tokens = check_greedy(behavior, model, prefixes, start)
        prefixes = [[*prefix, int(token)] for prefix, token in zip(prefixes, tokens, strict=True)]
        start = np.zeros(2, bool)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", SUBSETS)
def test_decoding_equals_changed_weights(family, layers):
    policy = shared_policy(family)
    check_decoding(policy, random_patches(policy, layers))


@pytest.mark.parametrize("layers", SUBSETS)
def test_decoding_in_pure_torch_equals_changed_weights(layers, monkeypatch):
    monkeypatch.setattr("policies.native.kernels", lambda: None)
    policy = shared_policy("llama-rope-scaled")
    check_decoding(policy, random_patches(policy, layers))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", SUBSETS)
def test_logprobs_equal_changed_weights(family, layers):
    policy = shared_policy(family)
    nested = random_patches(policy, layers)
    prompts, tokens, mask = random_batch()
    expected = plain_logp(patched_model(policy.model, nested), prompts, tokens, mask, 0.7)
    found = policy.logprobs(prompts, tokens, mask, layers=nested, temperature=0.7)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    plain = policy.logprobs(prompts, tokens, mask, layers=layers, temperature=0.7)
    assert (plain - found).abs().max() > 0.1


def test_behaviour_log_probabilities_are_those_of_the_patched_policy():
    policy = Policy(random_model(), dtype="bfloat16")
    nested = random_patches(policy, (0, 2, 3))
    text = write(policy, nested, [torch.tensor([1, 2, 3])] * 8, Length(6), seed=2)
    behavior = policy.behavior(nested, slots=8, max_length=16, seed=2)
    ids = np.zeros((8, 16), np.int64)
    ids[:, :3] = [1, 2, 3]
    token, logp = behavior.act({"input_ids": ids, "length": np.full((8, 1), 3)}, np.ones(8, bool), np.arange(8))
    assert (token == text.tokens[:, 0].numpy()).all()
    scored = policy.logprobs(text.prompts, text.tokens, text.mask, layers=nested)[:, 0]
    np.testing.assert_allclose(logp, scored.detach().numpy(), atol=0.05)


def test_the_target_gets_its_gradient_through_patched_maps():
    policy = Policy(random_model())
    nested = random_patches(policy, (0, 2, 3))
    model = patched_model(policy.model, nested)
    batch = random_batch()
    policy.logprobs(*batch, layers=nested).sum().backward()
    plain_logp(model, *batch).sum().backward()
    for ours, theirs in zip(policy.model.model.layers, model.model.layers, strict=True):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found, wanted = (block.get_submodule(name).weight.grad for block in (ours, theirs))
            if found is not None:
                torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert policy.model.model.layers[0].self_attn.o_proj.weight.grad.abs().max() > 0


def test_normal_equations_recover_a_planted_map_and_stream():
    torch.manual_seed(0)
    features, weight, bias = 5 + torch.randn(400, 7), torch.randn(3, 7), torch.randn(3)
    targets = features @ weight.T + bias
    once, parts = (NormalEquations(7, 3, features.device) for _ in range(2))
    once.add(features, targets)
    for rows in torch.arange(400).split(90):
        parts.add(features[rows], targets[rows])
    found, left = once.solve(1e-7)
    torch.testing.assert_close(found.weight, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.bias, bias, atol=1e-3, rtol=1e-3)
    assert abs(left) < 1e-6
    streamed, _ = parts.solve(1e-7)
    torch.testing.assert_close(streamed.weight, found.weight, atol=1e-5, rtol=1e-5)
    # a strong pull leaves the map where it was, and the bias still makes up for the means
    anchored, _ = once.solve(1e7, Change(2 * weight, bias))
    torch.testing.assert_close(anchored.weight, 2 * weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(anchored.bias, (targets - 2 * features @ weight.T).mean(0), atol=1e-3, rtol=1e-3)


def test_the_residual_is_the_share_that_ridge_regression_leaves():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(60, 4)) + 1, rng.normal(size=(60, 2)) + 3
    equations = NormalEquations(4, 2, torch.device("cpu"))
    equations.add(torch.tensor(features).float(), torch.tensor(targets).float())
    change, left = equations.solve(0.5)
    found = targets - features @ change.weight.numpy().T - change.bias.numpy()
    assert left == pytest.approx(np.square(found).sum() / np.square(targets).sum(), rel=1e-4)
    centred = features - features.mean(0)
    gram = centred.T @ centred
    wanted = np.linalg.solve(gram + 0.5 * gram.diagonal().mean() * np.eye(4), centred.T @ (targets - targets.mean(0)))
    np.testing.assert_allclose(change.weight.numpy(), wanted.T, atol=1e-5)


def sample(policy: Policy, seed: int = 0, rows: int = 40) -> Text:
    rng = np.random.default_rng(seed)
    prompts = [torch.from_numpy(rng.integers(0, 101, 4)) for _ in range(rows)]
    return write(policy, FULL, prompts, Length(12), seed=seed)


@pytest.mark.parametrize("id", FITTING)
def test_a_skipped_half_that_adds_a_constant_is_made_up_for_exactly(id):
    model = random_model("llama-rope-scaled")
    attention = model.model.layers[2].self_attn
    with torch.no_grad():  # keys and queries no longer matter: every value is the bias
        attention.v_proj.weight.zero_()
        attention.v_proj.bias.mul_(10)
    policy = Policy(model)
    layers = without(["2.attention"], LAYERS)
    text, fresh = sample(policy), sample(policy, 1)
    fit = patches.make(id).fit(policy, text, layers)
    target, plain, patched = (states(policy, fresh, nested) for nested in (FULL, layers, fit.subset))
    before, after = compare(policy, target, [plain, patched])
    assert before.kl > 0.01
    assert after.kl < 1e-6
    assert fit.residual < 1e-6


@pytest.mark.parametrize("id", FITTING)
def test_a_fit_explains_fresh_text_better_than_the_plain_skip(id):
    policy = shared_policy()
    text, fresh = sample(policy, rows=120), sample(policy, 1)
    layers: LayerSubset = (0, 3)
    nested = patches.make(id).fit(policy, text, layers).subset
    target = states(policy, fresh, FULL)
    before, after = compare(policy, target, [states(policy, fresh, n) for n in (layers, nested)])
    assert after.kl_reverse < 0.9 * before.kl_reverse
    wanted = {"absorb": {1}, "heal": {1, 6, 7}}
    assert set(nested.changes) == wanted[id]


@pytest.mark.parametrize("id", FITTING)
def test_micro_batches_do_not_change_a_fit(id):
    policy = shared_policy()
    text = sample(policy)
    layers: LayerSubset = (0, "1.mlp", 3)
    whole = patches.make(id).fit(policy, text, layers)
    policy.token_limit = 150
    try:
        split = patches.make(id).fit(policy, text, layers)
    finally:
        policy.token_limit = 8192
    assert split.residual == pytest.approx(whole.residual, rel=1e-4)
    for number, change in whole.subset.changes.items():
        torch.testing.assert_close(split.subset.changes[number].weight, change.weight, atol=1e-3, rtol=1e-3)


def test_fitting_twice_to_the_same_text_leaves_less():
    policy = shared_policy()
    text, layers, absorb = sample(policy), (0, 2, 3), patches.make("absorb", ridge=1.0)
    first = absorb.fit(policy, text, layers)
    second = absorb.fit(policy, text, layers, first.subset)
    assert second.residual < first.residual


@pytest.mark.parametrize("id", FITTING)
def test_nothing_skipped_needs_no_patch(id):
    policy = shared_policy()
    fit = patches.make(id).fit(policy, sample(policy), FULL)
    assert fit.subset.changes == {}
    assert fit.residual == 0


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(UsageError, match="Gemma norms what its layers add"):
        patches.make("absorb").fit(shared_policy("gemma3"), None, (0, 2, 3))
    policy = Policy(random_model("qwen2"))
    change = copy.copy(random_patches(policy, FULL).changes[0])
    with pytest.raises(UsageError, match="half layers \\[2\\]"):
        PatchedSubset((0, 2, 3), {2: change})
    with pytest.raises(UsageError, match="ridge=0"):
        patches.make("heal", ridge=0.0)
    policy.functional = False
    with pytest.raises(UsageError, match="patch='none'"):
        policy.behavior(PatchedSubset((0, 2, 3), {0: change}), slots=1, max_length=8)
