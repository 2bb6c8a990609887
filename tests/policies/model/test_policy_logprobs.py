"""Log-probabilities of completions against transformers' forward, and their gradients against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from policies.model.head import chunked_logp
from policies.model.packing import micro_batches
from registry import UsageError
from tests.oracles.policy_checkpoints import (
    FAMILIES,
    LAYERS,
    plain_logp,
    random_batch,
    random_model,
    shared_policy,
    without_layers,
)

FULL = tuple(range(LAYERS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, (0, 3), (1, 2, 3)])
def test_logprobs_equal_a_forward_of_the_model_with_the_other_layers_removed(family, layers):
    policy = shared_policy(family)
    assert policy.functional
    prompts, tokens, mask = random_batch()
    found = policy.logprobs(prompts, tokens, mask, layers=layers, temperature=0.7)
    expected = plain_logp(without_layers(policy.model, layers or FULL), prompts, tokens, mask, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found[~mask] == 0).all()


def test_a_mask_with_holes_scores_only_the_chosen_tokens():
    policy = shared_policy()
    prompts, tokens, _ = random_batch(longest=6)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0] = False
    found = policy.logprobs(prompts, tokens, mask)
    torch.testing.assert_close(found, plain_logp(policy.model, prompts, tokens, mask), atol=1e-4, rtol=1e-4)


def test_nothing_to_score_gives_zeros():
    prompts, tokens, mask = random_batch()
    assert (shared_policy().logprobs(prompts, tokens, mask & False) == 0).all()


def test_padding_of_the_completions_has_no_influence():
    policy = shared_policy()
    prompts, tokens, mask = random_batch()
    other = torch.where(mask, tokens, (tokens + 7) % 101)
    assert torch.equal(policy.logprobs(prompts, tokens, mask), policy.logprobs(prompts, other, mask))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma3"])
def test_gradients_equal_plain_autograd_with_shared_and_with_separate_prompts(family):
    model = random_model(family)
    policy = shared_policy(family)
    prompts, tokens, mask = random_batch(groups=2, group_size=3)
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    (plain_logp(model, prompts, tokens, mask) * weight).sum().backward()
    for given in (prompts, [prompt.clone() for prompt in prompts]):
        policy.model.zero_grad()
        (policy.logprobs(given, tokens, mask) * weight).sum().backward()
        for (name, found), expected in zip(policy.model.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, atol=2e-4, rtol=1e-3, msg=name)
    policy.model.zero_grad()


def test_micro_batches_change_nothing_and_keep_the_limit():
    policy = shared_policy()
    prompts, tokens, mask = random_batch(groups=5, group_size=3)
    whole = policy.logprobs(prompts, tokens, mask)
    policy.token_limit = 20
    try:
        parts = policy.logprobs(prompts, tokens, mask)
    finally:
        policy.token_limit = 8192
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    batches = micro_batches(prompts, mask, 25)
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    for batch in batches:
        distinct = {id(prompts[i]): len(prompts[i]) for i in batch}
        assert len(batch) == 1 or sum(distinct.values()) + int(mask[batch].sum()) <= 25


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [None, 0, 1, 9])  # panels of 32 tokens; None: not compiled
@pytest.mark.parametrize("vocabulary", [50, 97])
def test_chunked_head_equals_the_plain_head_forward_and_backward(monkeypatch, temperature, dtype, kept, vocabulary):
    monkeypatch.setattr("policies.model.head.CHUNK_LOGITS", {"cpu": 17 * vocabulary})
    if kept is None:
        monkeypatch.setattr("policies.native.kernels", lambda: None)
    else:
        monkeypatch.setattr("policies.model.head.KEPT", kept * 32 * 43)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(43, 16, generator=generator).to(dtype).float().requires_grad_()
    weight = torch.randn(vocabulary, 16, generator=generator).to(dtype).float().requires_grad_()
    token = torch.randint(0, vocabulary, (43,), generator=generator)
    slope = torch.randn(43, generator=generator)
    plain = (F.linear(hidden, weight) / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]
    expected = torch.autograd.grad((plain * slope).sum(), (hidden, weight))
    chunked = chunked_logp(hidden, weight, token, temperature, dtype)
    found = torch.autograd.grad((chunked * slope).sum(), (hidden, weight))
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)  # float32 logits in both dtypes
    tight = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(found, expected, **tight)


def test_bad_arguments_say_what_to_do():
    policy = shared_policy()
    prompts, tokens, mask = random_batch()
    with pytest.raises(UsageError, match="prompt is empty"):
        policy.logprobs([torch.zeros(0, dtype=torch.int64)] * len(prompts), tokens, mask)
    with pytest.raises(UsageError, match="temperature=0"):
        policy.logprobs(prompts, tokens, mask, temperature=0)
    with pytest.raises(UsageError, match="outside the model's layers"):
        policy.logprobs(prompts, tokens, mask, layers=(0, LAYERS))
