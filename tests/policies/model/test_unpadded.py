"""Attention without padding. The kernel needs a CUDA device; here a plain one of the same signature stands for it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen as torch_varlen

from policies import Policy
from policies.model import unpadded
from policies.model.attention import CausalAttention, SharedPromptAttention, SlotAttention
from tests.oracles.decoding import roll_out
from tests.oracles.policy_checkpoints import random_batch, random_model, shared_policy
from tests.oracles.replays import plain_varlen

CPU = torch.device("cpu")


@pytest.fixture
def stand_in(monkeypatch):
    """``varlen_attn`` and the places that look for it; counts its calls."""
    calls: list[tuple[int, int]] = []

    def counted(*arguments, **options):
        calls.append(options["window_size"])
        return plain_varlen(*arguments, **options)

    monkeypatch.setattr(torch_varlen, "varlen_attn", counted)
    monkeypatch.setattr(unpadded, "can_attend_unpadded", lambda query: True)
    monkeypatch.setattr("policies.native.kernels", lambda: None)  # not by compiled attention
    unpadded.kernel_agrees.cache_clear()
    yield calls
    unpadded.kernel_agrees.cache_clear()


def test_the_stand_in_is_called_as_torch_s_own():
    ours, theirs = inspect.signature(plain_varlen), inspect.signature(torch_varlen.varlen_attn)
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_stand_in_equals_torch_s_dense_attention(window, key_heads):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 3), (1, 6), (4, 9)]
    q = torch.randn(8, 4, 16, generator=generator)
    k, v = torch.randn(2, 18, key_heads, 16, generator=generator)
    ends = [F.pad(torch.tensor(size).cumsum(0), (1, 0)).int() for size in zip(*sizes, strict=True)]
    seen = (-1 if window is None else window - 1, 0)
    found = plain_varlen(q, k, v, *ends, 4, 9, scale=0.3, window_size=seen, enable_gqa=True)
    at = [0, 0]
    for rows, columns in sizes:
        mask = torch.ones(rows, columns).bool().tril(columns - rows)
        if window is not None:
            mask &= ~torch.ones(rows, columns).bool().tril(columns - rows - window)
        part = [
            x[a : a + n].transpose(0, 1) for x, a, n in ((q, at[0], rows), (k, at[1], columns), (v, at[1], columns))
        ]
        expected = F.scaled_dot_product_attention(*(x[None] for x in part), attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[at[0] : at[0] + rows], expected[0].transpose(0, 1))
        at = [at[0] + rows, at[1] + columns]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_of_slots_equals_each_row_s_own(window, key_heads, stand_in):
    """With what rows hold beyond their tokens as large as can be."""
    generator = torch.Generator().manual_seed(0)
    used = torch.tensor([1, 6, 4, 9])
    query = torch.randn(4, 4, 16, generator=generator)
    kv = torch.randn(4, 12, 2, key_heads, 16, generator=generator)
    kv[torch.arange(12) >= used[:, None]] = 1e4
    padded = SlotAttention(used, 10, 0.3)
    found = unpadded.UnpaddedSlots(padded, 12)(query, kv[:, :, 0], kv[:, :, 1], window)
    assert len(stand_in) == 2  # and the check's
    for row, size in enumerate(used.tolist()):
        begin = 0 if window is None else max(0, size - window)
        key, value = kv[row, begin:size].movedim(0, 2)[:, None]
        expected = F.scaled_dot_product_attention(query[row, None, :, None], key, value, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[row], expected.flatten())
    torch.testing.assert_close(found, padded(query, kv[:, :, 0], kv[:, :, 1], window))


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 2, 4]),
)
def test_spans_give_what_padding_gives_values_and_gradients(prompts, window):
    """Any prompts with any number of completions of any length, some without tokens of their own."""
    generator = torch.Generator().manual_seed(0)
    prompt_size = torch.tensor([size for size, _ in prompts])
    prompt_of = torch.tensor([n for n, (_, owns) in enumerate(prompts) for _ in owns], dtype=torch.int64)
    own = torch.tensor([size for _, owns in prompts for size in owns], dtype=torch.int64)
    order = torch.randperm(len(own), generator=generator)
    prompt_of, own = prompt_of[order], own[order]
    sequence = torch.repeat_interleave(torch.arange(len(prompts)), prompt_size)
    completion = torch.repeat_interleave(torch.arange(len(own)), own)
    place = torch.cat([torch.arange(int(size)) for size in (*prompt_size, *own)])
    n = len(sequence)
    place[n:] += prompt_size[prompt_of][completion]
    q = torch.randn(len(place), 4, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(len(place), 2, 8, generator=generator, requires_grad=True) for _ in "kv")
    slope = torch.randn(len(place), 32, generator=generator)
    causal = CausalAttention(sequence, place[:n], 0.4)
    padded = SharedPromptAttention(causal, completion, place[n:], prompt_of, prompt_size)(q, k, v, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_varlen, "varlen_attn", plain_varlen)
        found = unpadded.span_attention(q, k, v, unpadded.shared_spans(prompt_size, prompt_of, own), 0.4, window)
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(out, (q, k, v), slope) for out in (found, padded))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_scores_and_gradients_without_padding_are_those_with_padding(family, stand_in):
    prompts, tokens, mask = random_batch(groups=3, group_size=3)
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for fits in (False, True):
        unpadded.can_attend_unpadded = lambda query, fits=fits: fits  # undone by the fixture
        policy = Policy(random_model(family))
        logp = policy.logprobs(prompts, tokens, mask, layers=(0, 2, 3))
        (logp * weight).sum().backward()
        results.append((logp.detach(), [parameter.grad for parameter in policy.parameters()]))
        assert bool(stand_in) == fits
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for found, expected in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert ((4, 0) in stand_in) == (family == "qwen2-window")


def test_rollouts_without_padding_write_the_same_episodes(stand_in, monkeypatch):
    monkeypatch.setattr("policies.native.kernels", lambda: None)
    decoded = []
    kernel = unpadded.UnpaddedSlots.kernel
    monkeypatch.setattr(unpadded.UnpaddedSlots, "kernel", lambda *given: decoded.append(1) or kernel(*given))
    deck = [[4, 5, 6], [9], list(range(11)), [1, 2]]
    found = roll_out(shared_policy("qwen2-window"), 3, deck, 5, seed=1)
    assert 0 < len(decoded) < len(stand_in)  # decode steps, and prefill
    unpadded.can_attend_unpadded = lambda query: False
    expected = roll_out(shared_policy("qwen2-window"), 3, deck, 5, seed=1)
    for episode, steps in expected.items():
        assert [token for token, _ in found[episode]] == [token for token, _ in steps]
        np.testing.assert_allclose([p for _, p in found[episode]], [p for _, p in steps], atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("looks ahead", "differs from padded attention by"),
        ("one key too many", r"with a window \(it differs"),
        ("raises", r"\(only Ampere GPUs or newer\): padded"),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_used(fault, says, stand_in, monkeypatch):
    def faulty(*given, window_size, **options):
        left, right = window_size
        if fault == "raises":
            raise RuntimeError("only Ampere GPUs or newer\nand more")
        if fault == "looks ahead":
            return plain_varlen(*given, window_size=(left, right + 1), **options)
        return plain_varlen(*given, window_size=(left + (left >= 0), right), **options)

    monkeypatch.setattr(torch_varlen, "varlen_attn", faulty)
    policy = shared_policy("qwen2-window")
    prompts, tokens, mask = random_batch()
    with pytest.warns(UserWarning, match=says):
        found = policy.logprobs(prompts, tokens, mask)
    unpadded.can_attend_unpadded = lambda query: False
    torch.testing.assert_close(found, policy.logprobs(prompts, tokens, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["raises", "reads on", "another window"])
def test_a_kernel_that_decodes_something_else_is_not_used(fault, stand_in, monkeypatch):
    def faulty(*given, seqused_k=None, window_size, **options):
        if seqused_k is not None and fault == "raises":
            raise TypeError("no such argument: seqused_k")
        if seqused_k is not None and fault == "reads on":
            seqused_k = (seqused_k + 1).clamp(max=given[6])
        if seqused_k is not None and fault == "another window" and window_size[0] > 0:
            window_size = (window_size[0] - 1, 0)
        return plain_varlen(*given, seqused_k=seqused_k, window_size=window_size, **options)

    monkeypatch.setattr("policies.native.kernels", lambda: None)
    monkeypatch.setattr(torch_varlen, "varlen_attn", faulty)
    deck = [[4, 5, 6], list(range(11))]
    with pytest.warns(UserWarning, match="to decode for"):
        found = roll_out(shared_policy("qwen2-window"), 2, deck, 5, seed=1)
    unpadded.can_attend_unpadded = lambda query: False
    expected = roll_out(shared_policy("qwen2-window"), 2, deck, 5, seed=1)
    for episode, steps in expected.items():
        np.testing.assert_allclose([p for _, p in found[episode]], [p for _, p in steps], atol=1e-4)


@pytest.mark.parametrize("check", [unpadded.disagreement, unpadded.slot_disagreement])
def test_the_check_holds_in_half_precision(check, stand_in):
    for dtype in (torch.bfloat16, torch.float16):
        for window in (None, 7):
            assert 0 < check(CPU, dtype, torch.Size((4, 16)), 2, window) < unpadded.TOLERANCE


@pytest.mark.parametrize("check", [unpadded.disagreement, unpadded.slot_disagreement])
@torch.inference_mode()
def test_the_first_use_may_be_a_rollout_s(check, stand_in):
    assert unpadded.kernel_agrees(check, CPU, torch.float32, torch.Size((2, 8)), 1, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", [unpadded.disagreement, unpadded.slot_disagreement])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "key_heads"), [((12, 128), 2), ((9, 64), 3), ((4, 256), 1)])
def test_torch_s_kernel_agrees_with_padding(heads, key_heads, window, check):
    error = check(torch.device("cuda"), torch.bfloat16, torch.Size(heads), key_heads, window)
    assert error <= unpadded.TOLERANCE
