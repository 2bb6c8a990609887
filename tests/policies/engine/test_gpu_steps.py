"""What runs on a GPU. On the meta device, whose tensors have no numbers, whatever reads one on the host fails, and so
does whatever mixes devices: prefill and packing may read sizes, steps and layers may not. On a CPU, with stand-ins."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from policies import Behavior, Policy
from policies.engine import graphs
from policies.engine.ahead import Ahead
from policies.engine.graphs import Replays
from policies.engine.torch_store import TorchStore
from policies.model import products, unpadded
from policies.model.layers import embed, layer, rotated
from policies.model.packing import pack
from registry import skip_samplers
from tests.oracles.decoding import LONGEST
from tests.oracles.policy_checkpoints import LAYERS, random_batch, random_model
from tests.oracles.reft_agents import gradient_of, make
from tests.oracles.replays import plain_varlen, recompute, replayed

META = torch.device("meta")
FAMILIES = ["llama-rope-scaled", "qwen2-window", "qwen3", "gemma3"]


@pytest.fixture
def trusting(monkeypatch):
    """The checks of weights and kernels pass: they read their result."""
    monkeypatch.setattr(unpadded, "can_attend_unpadded", lambda query: query.dtype == torch.bfloat16)
    monkeypatch.setattr(products, "is_half_operand", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(unpadded, "kernel_agrees", lambda *_: True)
    monkeypatch.setattr(products, "can_multiply_halves", lambda *_: True)
    monkeypatch.setattr(graphs, "CAPTURE_AT", 3)  # visits: what checks a capture reads, too
    monkeypatch.setattr("policies.policy.agrees", lambda *_: True)
    monkeypatch.setattr("policies.policy.check_finite", lambda model: None)


def policy_on_meta(family: str) -> Policy:
    table = Policy(random_model(family)).rotary(64)
    policy = Policy(random_model(family).to(META), "bfloat16")
    policy._tables = (table[0].to(META), table[1].to(META))
    return policy


@pytest.mark.parametrize(("replayed", "public"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_steps_read_nothing_on_the_host(family, replayed, public, trusting, monkeypatch):
    monkeypatch.setattr(unpadded, "PUBLIC", public and unpadded.PUBLIC)
    behavior = policy_on_meta(family).behavior((0, 2, 3), 5, LONGEST)
    decoder = behavior.decoder
    store = decoder.cache.store
    assert isinstance(store, TorchStore) and store.device == META
    store.replays = Replays(5, META, capture=lambda *_: pytest.fail("too early")) if replayed else None
    active = np.array([0, 1, 3, 4])
    uniform = torch.rand(4, dtype=torch.float64).to(META)
    with torch.inference_mode():
        hidden = decoder.hidden(np.full((5, LONGEST), 7), np.array([1, 1, 0, 1, 1]), np.ones(5, bool), active)
        decoder.plan(active, np.array([[1, 1, 1, 1], [2, 2, 1, 2]]))
        for step in range(2 - replayed):  # the third visit would be a capture
            token, logp = decoder.draw(hidden, uniform, behavior.sampling.temperature)
            hidden = decoder.follow(step, token)
        for temperature in (0.7, 0.0):
            assert decoder.draw(hidden, uniform, temperature)[0].shape == (4,)
    assert (token.device, logp.device, hidden.device) == (META, META, META)
    assert (token.dtype, logp.dtype, hidden.dtype) == (torch.int64, torch.float32, torch.float32)


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_an_update_read_nothing_on_the_host(family, public, trusting, monkeypatch):
    """With torch's own variable-length attention, whose arguments and gradients are checked without a kernel."""
    monkeypatch.setattr(unpadded, "PUBLIC", public and unpadded.PUBLIC)
    policy = policy_on_meta(family)
    a, packing = policy.architecture, pack(*random_batch())
    own = torch.bincount(packing.sequence[packing.prompt_tokens :], minlength=len(packing.prompt_of))
    spans = unpadded.shared_spans(packing.prompt_size, packing.prompt_of, own)
    moved = {f.name: getattr(spans, f.name) for f in fields(spans)}
    moved = {name: value.to(META) if isinstance(value, torch.Tensor) else value for name, value in moved.items()}
    shared = unpadded.UnpaddedAttention(pytest.fail, a.scale, lambda: unpadded.Spans(**moved))
    ids, position = packing.ids.to(META), packing.position.to(META)
    rotary = tuple(table[position] for table in policy.rotary(64))
    x = embed(ids, policy.model.model.embed_tokens.weight, a)
    for weights in policy._trainable:
        x = layer(x, weights, a, lambda heads, window: shared(*rotated(heads, a, rotary, window), window))
    assert (x.device, x.dtype, x.shape) == (META, torch.float32, (len(ids), a.width))
    x.sum().backward()
    blocks = policy.model.model.layers
    assert len(blocks) == LAYERS
    for block in blocks:
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.shape == parameter.shape


def test_an_iteration_by_all_of_it_is_that_of_a_cpu(folder, monkeypatch):
    """On the CPU with stand-ins: replayed windows of steps, attention without padding."""
    arguments = {"slots": 7, "sampler": skip_samplers.make("even", ratio=0.25)}
    nested = make(folder, **arguments)
    expected = gradient_of(nested, nested.iterate)
    with monkeypatch.context() as patch:
        patch.setattr("policies.native.kernels", lambda: None)
        patch.setattr(torch_varlen, "varlen_attn", plain_varlen)
        patch.setattr(unpadded, "can_attend_unpadded", lambda query: True)
        patch.setattr(unpadded, "kernel_agrees", lambda *_: True)
        made = replayed(patch, recompute)
        begin, windows = Behavior.__init__, []

        def ahead(self, decoder, layers, slots, sampling, current, ahead=None, proposers=()):
            windows.append(Ahead(decoder, slots, sampling, 16, patience=2))
            begin(self, decoder, layers, slots, sampling, current, windows[-1])

        patch.setattr(Behavior, "__init__", ahead)
        again = make(folder, **arguments)
        found = gradient_of(again, again.iterate)
    assert any(replays.captured for replays in made)
    assert max(one.calm for one in windows) > 2
    for name in ("tokens", "rollout_reward", "finish/length"):
        assert again.metrics[name] == nested.metrics[name]
    assert again.metrics["kl_k1"] == pytest.approx(nested.metrics["kl_k1"], rel=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
