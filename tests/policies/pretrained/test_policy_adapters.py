"""Low-rank adapters and gradient checkpointing: the same numbers as the plain weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policies import Policy
from registry import UsageError
from tests.oracles.decoding import LONGEST, check_greedy
from tests.oracles.policy_checkpoints import LAYERS, plain_logp, random_batch, random_model

FULL = tuple(range(LAYERS))


def adapted(family: str = "qwen2") -> Policy:
    policy = Policy(random_model(family))
    policy.add_adapters(rank=3, seed=1)
    return policy


def step(policy: Policy) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    prompts, tokens, mask = random_batch()
    for _ in range(2):  # B starts at zero, so A moves only from the second step on
        optimizer.zero_grad()
        policy.logprobs(prompts, tokens, mask).sum().backward()
        optimizer.step()
    policy.refresh()


def test_adapters_start_as_the_plain_model_and_are_all_that_is_trained():
    pytest.importorskip("peft")
    policy, plain = adapted(), random_model("qwen2")
    assert policy.adapter_rank == 3 and all("lora_" in n for n, p in policy.model.named_parameters() if p.requires_grad)
    assert sum(p.numel() for p in policy.parameters()) < sum(p.numel() for p in plain.parameters()) / 3
    prompts, tokens, mask = random_batch()
    torch.testing.assert_close(
        policy.logprobs(prompts, tokens, mask), plain_logp(plain, prompts, tokens, mask), atol=1e-4, rtol=1e-4
    )


def test_gradients_of_adapters_equal_those_through_pefts_own_forward():
    pytest.importorskip("peft")
    policy = adapted()
    step(policy)
    prompts, tokens, mask = random_batch(seed=1)
    parameters = list(policy.parameters())
    found = torch.autograd.grad(policy.logprobs(prompts, tokens, mask).sum(), parameters)
    expected = torch.autograd.grad(plain_logp(policy.model, prompts, tokens, mask).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_rollouts_and_saved_weights_have_the_adapters_merged(tmp_path):
    pytest.importorskip("peft")
    policy = adapted()
    before = policy.behavior(FULL, 1, LONGEST, temperature=0.0)
    step(policy)
    with pytest.raises(RuntimeError, match="weight version"):
        check_greedy(before, policy.model, [[1, 2, 3]], np.ones(1, bool))
    check_greedy(policy.behavior(FULL, 1, LONGEST, temperature=0.0), policy.model, [[1, 2, 3]], np.ones(1, bool))
    policy.save(tmp_path)
    again = Policy.load(str(tmp_path), dtype="float32")
    assert again.adapter_rank == 0 and policy.adapter_rank == 3
    prompts, tokens, mask = random_batch()
    torch.testing.assert_close(
        again.logprobs(prompts, tokens, mask), policy.logprobs(prompts, tokens, mask), atol=1e-4, rtol=1e-4
    )


def test_bad_adapters_say_what_to_do():
    pytest.importorskip("peft")
    policy = Policy(random_model())
    with pytest.raises(UsageError, match="rank=0"):
        policy.add_adapters(rank=0)
    policy.add_adapters(rank=1)
    with pytest.raises(UsageError, match="already"):
        policy.add_adapters(rank=1)


def test_gradient_checkpointing_changes_no_gradient():
    model = random_model("qwen3")
    prompts, tokens, mask = random_batch()
    plain, saving = Policy(model), Policy(model, gradient_checkpointing=True)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(plain.logprobs(prompts, tokens, mask).sum(), parameters)
    found = torch.autograd.grad(saving.logprobs(prompts, tokens, mask).sum(), parameters)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
