"""Log-probabilities and entropies of the chunked head against torch's, values and gradients."""

from __future__ import annotations

import pytest
import torch

from policies import Policy
from policies.model import entropy as module
from policies.model.entropy import chunked_entropy


@pytest.mark.parametrize("chunk", [2**24, 2**11])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float
) -> None:
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 48, generator=generator).requires_grad_()
    weight = (0.4 * torch.randn(301, 48, generator=generator)).requires_grad_()
    token = torch.randint(301, (23,), generator=generator)
    pull = torch.randn(2, 23, generator=generator)

    found = chunked_entropy(hidden, weight, token, temperature, torch.float32)
    ours = torch.autograd.grad((found[0] * pull[0] + found[1] * pull[1]).sum(), (hidden, weight))
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    expected = log_p.gather(1, token[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    theirs = torch.autograd.grad((expected[0] * pull[0] + expected[1] * pull[1]).sum(), (hidden, weight))
    for mine, wanted in zip((*found, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_a_policys_entropies_are_of_its_temperature(folder: str) -> None:
    policy = Policy.load(folder, dtype="float32")
    policy.temperature = 1.3
    prompts = [torch.tensor([5, 6, 7])] * 2 + [torch.tensor([9])]
    tokens = torch.randint(512, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    logp, entropy = policy.logprobs_and_entropies(prompts, tokens, mask)
    torch.testing.assert_close(logp, policy.logprobs(prompts, tokens, mask))
    assert not entropy[~mask].any()
    for row, length in enumerate(mask.sum(1).tolist()):
        ids = torch.cat([prompts[row], tokens[row, :length]])[None]
        logits = policy.model(ids).logits[0, len(prompts[row]) - 1 : -1] / 1.3
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(entropy[row, :length], expected, rtol=1e-3, atol=1e-4)
