"""Exact divergences against transformers' full logits, and the texts that they are measured on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policies import Policy, Probe, with_int8
from policies.nested import LayerSubset, without
from policies.skipping.divergence import Length, compare, completions, influence, states, states_without_each, write
from registry import UsageError
from tests.oracles.policy_checkpoints import FAMILIES, LAYERS, VOCABULARY, random_model, shared_policy, zeroed

FULL = tuple(range(LAYERS))
PROMPTS = [torch.tensor([1, 2, 3, 4]), torch.tensor([9]), torch.tensor([5, 6])]
LENGTH = Length(7, (3, 4, 5, 6, 7))


def full_logits(model, text) -> torch.Tensor:
    """[B, T, V] float64 log-probabilities, one sequence at a time."""
    rows = []
    for prompt, tokens in zip(text.prompts, text.tokens, strict=True):
        logits = model(torch.cat((prompt, tokens))[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.double().log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("layers", [(0, 2, 3), (0, "1.mlp", 2, "3.attention")])
def test_divergences_equal_those_of_full_logits(family, layers, monkeypatch):
    monkeypatch.setattr("policies.skipping.divergence._CHUNK", 5 * VOCABULARY)
    policy = shared_policy(family)
    text = write(policy, layers, PROMPTS, LENGTH, seed=3)
    with torch.no_grad():
        log_pi, log_mu = (full_logits(model, text) for model in (policy.model, zeroed(policy.model, layers)))
    pi, mu = log_pi.exp(), log_mu.exp()
    wanted = (mu * (log_mu - log_pi), pi * (log_pi - log_mu), (pi - mu).abs() / 2)
    found, same = compare(policy, states(policy, text, FULL), [states(policy, text, s) for s in (layers, FULL)])
    for value, expected in zip((found.kl, found.kl_reverse, found.tv), wanted, strict=True):
        assert value == pytest.approx(float(expected.sum(-1)[text.mask].mean()), rel=1e-3)
    assert found.tokens == int(text.mask.sum())
    sums = torch.zeros(len(PROMPTS)).index_add_(0, completions(policy, text), found.each)
    torch.testing.assert_close(sums.double(), (wanted[0].sum(-1) * text.mask).sum(1), atol=1e-5, rtol=1e-3)
    assert (same.kl, same.kl_reverse, same.tv) == (0, 0, 0)


def test_texts_add_up_and_share_their_prompts():
    policy = shared_policy()
    one, two = (write(policy, FULL, PROMPTS, Length(tokens), seed=tokens) for tokens in (3, 5))
    both = one + two
    assert both.mask.shape == (6, 5)
    assert both.size == 3 * 3 + 3 * 5 + 7
    torch.testing.assert_close(
        policy.logprobs(both.prompts, both.tokens, both.mask)[3:], policy.logprobs(two.prompts, two.tokens, two.mask)
    )
    assert torch.equal(both.first(3).tokens[:, :3], one.tokens)
    assert both.first(2).prompts == PROMPTS[:2]


@pytest.mark.parametrize("int8", [False, True])
def test_the_mean_log_ratio_of_sampled_tokens_estimates_the_exact_divergence(int8):
    policy, layers = shared_policy(), with_int8((0, 1, 3), int8)
    text = write(policy, layers, [PROMPTS[0]] * 400, Length(10), seed=1)
    with torch.no_grad():
        log_mu = policy.logprobs(text.prompts, text.tokens, text.mask, layers)
        ratio = log_mu - policy.logprobs(text.prompts, text.tokens, text.mask)
    found = compare(policy, states(policy, text, FULL), [states(policy, text, layers)], int8=int8)[0]
    error = float(ratio[text.mask].std()) / text.mask.sum() ** 0.5
    assert found.kl > 10 * error
    assert abs(found.kl - float(ratio[text.mask].mean())) < 4 * error


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", [None, "attention", "mlp"])
def test_leaving_out_each_layer_in_turn_equals_the_subsets_one_by_one(family, half):
    policy = shared_policy(family)
    text = write(policy, FULL, PROMPTS, LENGTH)
    found = list(states_without_each(policy, text, half))
    assert len(found) == LAYERS
    for n, one in enumerate(found):
        left: LayerSubset = without([n if half is None else f"{n}.{half}"], LAYERS)
        torch.testing.assert_close(one, states(policy, text, left), atol=1e-4, rtol=1e-4)


def test_block_influence_equals_that_of_transformers_hidden_states():
    policy = shared_policy("qwen2")
    text = write(policy, FULL, [PROMPTS[0]], Length(6))
    ids = torch.cat((PROMPTS[0], text.tokens[0, :-1]))[None]
    caught: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, i, o: caught.extend((i[0], o))) for b in policy.model.model.layers]
    with torch.no_grad():
        policy.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    wanted = [
        1 - float(torch.cosine_similarity(before[0], after[0], dim=-1).mean())
        for before, after in zip(caught[::2], caught[1::2], strict=True)
    ]
    np.testing.assert_allclose(influence(policy, text), wanted, atol=1e-5)


def test_a_probe_measures_layers_and_sets_on_one_text_of_the_full_model():
    policy = Policy(random_model("qwen3"))
    policy.temperature = 0.8
    probe = Probe(policy, PROMPTS, Length(6), seed=2)
    target = states(policy, probe.text, FULL)
    for skipped in ([1], ["2.mlp"], ["0.attention", 3]):
        nested = states(policy, probe.text, without(skipped, LAYERS))
        wanted = compare(policy, target, [nested])[0].kl
        assert probe.set_kl(skipped) == pytest.approx(wanted, rel=1e-5)
    for half in (None, "attention", "mlp"):
        names = [n if half is None else f"{n}.{half}" for n in range(LAYERS)]
        np.testing.assert_allclose(probe.kl(half), [probe.set_kl([name]) for name in names], rtol=1e-3, atol=1e-6)
    assert probe.each() is probe.each()
    assert len(probe.influence) == LAYERS


def test_texts_end_at_stop_tokens_and_do_not_depend_on_their_neighbours():
    policy = shared_policy()
    text = write(policy, (0, 2, 3), PROMPTS, LENGTH, seed=3)
    for tokens, mask in zip(text.tokens.tolist(), text.mask.tolist(), strict=True):
        size = sum(mask)
        assert mask == [True] * size + [False] * (len(mask) - size)
        assert size == LENGTH.tokens or tokens[size - 1] in LENGTH.stop
        assert not set(tokens[: size - 1]) & set(LENGTH.stop)
    alone = write(policy, (0, 2, 3), PROMPTS[:1], LENGTH, seed=3)
    assert alone.tokens[0].tolist() == text.tokens[0, : alone.tokens.shape[1]].tolist()
    assert text.mean_length == float(text.mask.sum()) / 3


def test_a_checkpoint_on_transformers_layers_is_refused():
    from policies import Policy

    policy = Policy(random_model())
    policy.functional = False
    text = write(policy, FULL, PROMPTS, LENGTH)
    with pytest.raises(UsageError, match="transformers' own layers"):
        states(policy, text, FULL)
