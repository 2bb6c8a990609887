"""The compiled kernels and the pure torch path against the same references."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from policies import Policy
from policies.engine.sampling import draw, uniforms
from policies.engine.torch_store import TorchStore
from policies.engine.whole_steps import WholeStepStore
from policies.model.attention import CompiledAttention
from policies.model.layers import rms_norm, rotated, silu_mul
from policies.model.packing import Layout, pack
from policies.model.products import linear, outer_product, product
from policies.native import build, kernels
from tests.oracles.decoding import LONGEST, check_greedy, roll_out
from tests.oracles.policy_checkpoints import FAMILIES, LAYERS, random_model, shared_policy, without_layers

FULL = tuple(range(LAYERS))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def native():
    found = kernels()
    if found is None:
        pytest.skip("no compiled kernels here")
    return found


@pytest.fixture
def pure(monkeypatch):
    monkeypatch.setattr("policies.native.kernels", lambda: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pure_path_equals_a_fresh_forward(pure, family):
    policy = shared_policy(family)
    behavior = policy.behavior((0, 2, 3), slots=3, max_length=LONGEST, temperature=0.0)
    assert isinstance(behavior.decoder.cache.store, TorchStore)
    model = without_layers(policy.model, (0, 2, 3))
    prefixes, start = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 9, 2, 4]], np.ones(3, bool)
    for _ in range(6):
        tokens = check_greedy(behavior, model, prefixes, start)
        prefixes = [[*prefix, int(token)] for prefix, token in zip(prefixes, tokens, strict=True)]
        start = np.zeros(3, bool)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_paths_write_the_same_episodes(native, monkeypatch, dtype):
    deck = [[4, 5, 6], [4, 5, 6], [9], *[list(range(n)) for n in (17, 17, 2)]]
    model = random_model("qwen3", head_dim=32)
    compiled = roll_out(Policy(model, dtype), 4, deck, 4, seed=1)
    monkeypatch.setattr("policies.native.kernels", lambda: None)
    plain = roll_out(Policy(model, dtype), 4, deck, 4, seed=1)
    for episode, steps in compiled.items():
        for (token, logp), (expected, expected_logp) in zip(steps, plain[episode], strict=True):
            if token != expected:
                assert dtype == "bfloat16"  # a rounding apart at a boundary of the inverse CDF: the rest differs, too
                break
            assert logp == pytest.approx(expected_logp, abs=1e-4 if dtype == "float32" else 0.1)


def test_kernels_are_used_where_they_fit(native):
    assert isinstance(shared_policy("llama").behavior(FULL, 1, 4).decoder.cache.store, WholeStepStore)
    assert isinstance(shared_policy("qwen3").behavior(FULL, 1, 4).decoder.cache.store, TorchStore)  # head_dim 24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 100])
def test_add_norm(native, dtype, width):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, width, generator=generator), torch.randn(width, generator=generator)
    delta = torch.randn(7, width, generator=generator).to(dtype)
    total = x + delta.float()
    found = native.add_norm(x, delta, weight, 1e-5, dtype)
    torch.testing.assert_close(x, total)
    torch.testing.assert_close(found, F.rms_norm(total, (width,), weight, 1e-5).to(dtype), atol=1e-5, rtol=1e-2)
    again = native.add_norm(x, None, weight, 1e-5, dtype)
    assert torch.equal(again, found) and torch.equal(x, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(native, dtype):
    x = (torch.randn(5, 2 * 37, generator=torch.Generator().manual_seed(0)) * 60).to(dtype)  # also beyond exp's range
    gate, up = x.float().chunk(2, dim=-1)
    assert gate.min() < -89 and gate.max() > 89
    torch.testing.assert_close(
        native.silu_mul(x), (F.silu(gate) * up).to(dtype), atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize("vocabulary", [32, 70, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("rows", [1, 3, 17, 40])
def test_the_fused_head_draws_what_the_plain_draw_does(native, vocabulary, temperature, rows):
    if not native.bf16_head:
        pytest.skip("no bfloat16 dot product on this processor")
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 64, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, 64, generator=generator) * 0.5).bfloat16()
    uniform = torch.from_numpy(uniforms(0, np.arange(rows), np.arange(rows)))
    token, logp = native.head_draw(hidden, native.pack_head(weight), vocabulary, temperature, uniform)
    logits = hidden.float() @ weight.float().t()
    expected, expected_logp = draw(logits, uniform, temperature)
    assert torch.equal(token, expected)
    torch.testing.assert_close(logp, expected_logp, atol=1e-4, rtol=1e-4)
    alone, alone_logp = native.head_draw(hidden[:1], native.pack_head(weight), vocabulary, temperature, uniform[:1])
    assert torch.equal(alone, token[:1]) and torch.equal(alone_logp, logp[:1])


def test_the_fused_head_at_the_edges_of_the_uniform(native):
    if not native.bf16_head:
        pytest.skip("no bfloat16 dot product on this processor")
    hidden = torch.ones(4, 2).bfloat16()
    weight = torch.full((100, 2), -2000.0).bfloat16()
    weight[[3, 98]] = 1.0
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    token, logp = native.head_draw(hidden, native.pack_head(weight), 100, 1.0, uniform)
    assert token.tolist() == [3, 3, 98, 98]
    torch.testing.assert_close(logp, torch.full((4,), 0.5).log())


def test_a_machine_without_a_compiler_warns_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NESTED_REFT_NATIVE", raising=False)
    with pytest.warns(UserWarning, match="pure torch, which is slower; install a C\\+\\+ compiler and ninja"):
        assert kernels.__wrapped__() is None
    monkeypatch.setenv("NESTED_REFT_NATIVE", "0")
    assert kernels.__wrapped__() is None


def test_the_library_is_keyed_by_what_it_depends_on(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    here = build.built_at()
    assert here == build.built_at() and here.is_relative_to(tmp_path)
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert build.built_at() != here


def whole_sequence_attention(heads, packing, shape, tables, window):
    """Attention [N, Hq * D] of each prompt and completion by itself, in the dtype of ``heads``."""
    out = torch.zeros(len(heads), shape.query_heads * shape.head_dim, dtype=heads.dtype)
    prompt, n = packing.prompt_tokens, len(heads)
    where = torch.arange(n)
    runs = [(where[:prompt][packing.sequence[:prompt] == p], where[:0]) for p in range(len(packing.prompt_size))]
    for b, p in enumerate(packing.prompt_of.tolist()):
        runs.append((runs[p][0], where[prompt:][packing.sequence[prompt:] == b]))
    for before, own in runs:
        index = torch.cat((before, own))
        query, key, value = (
            part.transpose(0, 1)
            for part in rotated(heads[index], shape, [table[: len(index)] for table in tables], window)
        )
        distance = torch.arange(len(index))[:, None] - torch.arange(len(index))
        seen = (distance >= 0) & (distance < (window or len(index)))
        key, value = (part.repeat_interleave(shape.repeat, 0) for part in (key, value))
        scores = (query @ key.transpose(1, 2) * shape.scale).masked_fill(~seen, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        kept = own if len(own) else before
        out = out.index_copy(0, kept, mixed[len(index) - len(kept) :])
    return out


@pytest.mark.parametrize("window", [None, 7, 20])
@pytest.mark.parametrize(("query_heads", "key_heads", "head_dim"), [(9, 3, 64), (4, 2, 16), (5, 1, 48)])
def test_packed_attention_equals_each_sequence_by_itself(native, query_heads, key_heads, head_dim, window):
    shape = SimpleNamespace(
        query_heads=query_heads,
        key_heads=key_heads,
        head_dim=head_dim,
        repeat=query_heads // key_heads,
        scale=0.3,
        ropes=(),
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.zeros(size, dtype=torch.int64) for size in (3, 70, 1)]
    which, sizes = [1, 0, 1, 2, 2, 0], [40, 1, 17, 90, 2, 66]  # a completion of one token has no input of its own
    mask = torch.arange(90) < torch.tensor(sizes)[:, None]
    packing = pack([prompts[p] for p in which], torch.zeros(6, 90, dtype=torch.int64), mask)
    angle = torch.randn(200, 1, head_dim // 2, generator=generator)
    tables = angle.cos().repeat(1, 1, 2), torch.cat((-angle.sin(), angle.sin()), -1)
    heads = torch.randn(len(packing.ids), query_heads + 2 * key_heads, head_dim, generator=generator)
    slope = torch.randn(len(heads), query_heads * head_dim, generator=generator)
    attend = CompiledAttention(native, Layout(packing, shape, tables))
    exact = heads.double().requires_grad_()
    expected = whole_sequence_attention(exact, packing, shape, [table.double() for table in tables], window)
    (expected_slope,) = torch.autograd.grad((expected * slope).sum(), exact)
    for dtype, tight in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        given = heads.to(dtype).requires_grad_()
        found = attend(given, window)
        (found_slope,) = torch.autograd.grad((found * slope.to(dtype)).sum(), given)
        torch.testing.assert_close(found.double(), expected, atol=tight, rtol=tight)
        scale = expected_slope.abs().amax((1, 2), keepdim=True)
        torch.testing.assert_close(found_slope.double() / scale, expected_slope / scale, atol=tight, rtol=tight)


@pytest.mark.parametrize(("rows", "columns", "width"), [(0, 3, 16), (1, 1, 16), (300, 7, 64), (513, 100, 48)])
def test_float32_products(native, rows, columns, width):
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(rows, size, generator=generator) for size in (columns, width))
    expected = grad.double().t() @ x.double()
    torch.testing.assert_close(native.outer_product(grad, x).double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(outer_product(grad[:, ::2], x).double(), expected[::2], atol=1e-4, rtol=1e-5)
    weight = torch.randn(width, columns, generator=generator)
    expected = grad.double() @ weight.double().t()
    torch.testing.assert_close(product(grad, weight).double(), expected, atol=1e-4, rtol=1e-5)
    across = weight.t().contiguous()
    found = native.small_product(grad, across)
    assert all(torch.equal(native.small_product(grad[i : i + 1], across)[0], found[i]) for i in range(rows))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_backwards_equal_autograd(monkeypatch, compiled, dtype):
    if not compiled:
        monkeypatch.setattr("policies.native.kernels", lambda: None)
    generator = torch.Generator().manual_seed(0)
    tight = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}

    def check(found, expected, *inputs):
        slope = torch.randn(found.shape, generator=generator)
        torch.testing.assert_close(found.float(), expected, **tight)
        got = torch.autograd.grad((found * slope).sum(), inputs)
        want = torch.autograd.grad((expected * slope).sum(), inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.float(), b.float(), **tight)

    x = torch.randn(9, 40, generator=generator, requires_grad=True)
    gain = torch.randn(40, generator=generator, requires_grad=True)
    check(rms_norm(x, gain, 1e-5, dtype), F.rms_norm(x, (40,), gain, 1e-5), x, gain)
    y = torch.randn(9, 40, generator=generator).to(dtype).requires_grad_()
    gate, up = y.float().chunk(2, dim=-1)
    check(silu_mul(y), F.silu(gate) * up, y)
    weight = (torch.randn(24, 40, generator=generator) * 0.1).to(dtype).float().requires_grad_()
    bias = torch.randn(24, generator=generator).to(dtype).float().requires_grad_()
    check(linear(y, [weight], [bias]), F.linear(y.float(), weight, bias), y, weight, bias)
    halves = [part.detach().requires_grad_() for part in weight.split((16, 8))]
    check(linear(y, halves), F.linear(y.float(), torch.cat(halves)), y, *halves)
