"""Nested models as checkpoints of fewer layers, loaded by transformers and compared with the whole model in which what
is skipped adds zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from policies import LayerSubset, Nested, PatchedSubset, Policy
from policies.nested import Change, halves
from policies.vllm import checkpoint
from policies.vllm.checkpoint import Shape, shape_of
from registry import UsageError
from tests.oracles.policy_checkpoints import FAMILIES, plain_logp, random_batch, random_model, zeroed

SUBSETS: list[LayerSubset] = [(0, 1, 2, 3), (0, 2, 3), (1,), (0, "1.attention", "2.mlp", 3)]
WIDE = {"head_dim": 32}


def computed(policy: Policy, nested: Nested, shape: Shape, folder: Path) -> Any:
    """The checkpoint as transformers loads it, nothing missing and nothing left over."""
    checkpoint.save(policy, nested, shape, folder)
    model, about = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    assert model.config.num_hidden_layers == len(model.model.layers) == len(shape.windows)
    return model.eval()


def check(policy: Policy, expected: Any, nested: Nested, shape: Shape, folder: Path) -> None:
    batch = random_batch()
    theirs = plain_logp(computed(policy, nested, shape, folder), *batch)
    torch.testing.assert_close(theirs, plain_logp(expected, *batch), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", SUBSETS)
def test_the_smaller_model_computes_what_the_nested_one_does(family: str, layers: LayerSubset, tmp_path: Path) -> None:
    policy = Policy(random_model(family, **WIDE))
    check(policy, zeroed(policy.model, layers), layers, shape_of(policy, layers), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subset_fits_into_a_model_of_more_layers(family: str, tmp_path: Path) -> None:
    """Of all kinds that the whole model has."""
    policy = Policy(random_model(family, **WIDE))
    for layers in ((1, 2), (0, "2.mlp", "3.attention")):
        check(policy, zeroed(policy.model, layers), layers, shape_of(policy, (0, 1, 2, 3)), tmp_path)


def test_windows_say_what_fits() -> None:
    whole = Shape((5, None, 5, None))
    assert whole.places(Shape((5, 5))) == [0, 2]
    assert whole.places(Shape((None, None))) == [1, 3]
    assert whole.places(Shape((None, 5, None))) == [1, 2, 3]
    assert whole.places(Shape((None, 5, 5))) is None
    assert whole.places(Shape((5,), biases=True)) is None
    assert Shape((None,), biases=True).places(Shape((None,))) == [0]
    policy = Policy(random_model("gemma3", **WIDE))
    with pytest.raises(ValueError, match="does not fit"):
        next(checkpoint.weights(policy, (0, 2), shape_of(policy, (1, 3))))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_heads_of_sixteen_channels_are_filled_up(family: str, tmp_path: Path) -> None:
    policy = Policy(random_model(family))
    assert policy.architecture.head_dim == 16 and checkpoint.head_channels(policy) == 32
    for layers in SUBSETS[1:]:
        check(policy, zeroed(policy.model, layers), layers, shape_of(policy, layers), tmp_path)


@pytest.mark.parametrize("family", ["llama-rope-scaled", "qwen3", "gemma3"])
def test_narrow_heads_with_norms_or_scaled_tables_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match=r"heads have (16|24) channels, and vLLM's at least 32: use writer='own'"):
        checkpoint.check_heads(Policy(random_model(family)))


@pytest.mark.parametrize("changes", [{}, WIDE, {"num_attention_heads": 2, "num_key_value_heads": 2}])
def test_a_qwen2_whose_heads_do_not_divide_its_width_is_a_llama(changes: dict[str, int]) -> None:
    """vLLM's Qwen2 has hidden_size / num_attention_heads channels a head, whatever its config says."""
    for family in ("qwen2", "qwen2-window"):
        policy = Policy(random_model(family, **changes))
        given = checkpoint.config(policy, shape_of(policy, (0, 1)))
        divided = given["hidden_size"] == given["num_attention_heads"] * checkpoint.head_channels(policy)
        assert divided == (len(changes) == 2)
        if divided or family == "qwen2":
            assert given["architectures"] == ["Qwen2ForCausalLM" if divided else "LlamaForCausalLM"]
            checkpoint.check_heads(policy)
            continue
        with pytest.raises(UsageError, match="vLLM's qwen2 has no heads of 32 channels at a width of 64"):
            checkpoint.check_heads(policy)


@pytest.mark.parametrize("family", ["llama", "llama-rope-scaled", "mistral", "qwen2"])
@pytest.mark.parametrize("changes", [{}, WIDE])
def test_patches_are_weights_and_biases(family: str, changes: dict[str, int], tmp_path: Path) -> None:
    if family == "llama-rope-scaled" and not changes:
        pytest.skip("its narrow heads are refused")
    policy, layers = Policy(random_model(family, **changes)), (0, "1.attention", "2.mlp", 3)
    torch.manual_seed(1)
    whole, patches = zeroed(policy.model, layers), {}
    for number in halves(layers)[::2]:
        block = whole.model.layers[number // 2]
        module = block.mlp.down_proj if number % 2 else block.self_attn.o_proj
        change = Change(0.1 * torch.randn_like(module.weight), 0.1 * torch.randn(len(module.weight)))
        module.weight.data += change.weight
        bias = change.bias if module.bias is None else module.bias.data + change.bias
        module.bias = torch.nn.Parameter(bias)
        patches[number] = change
    nested = PatchedSubset(layers, patches)
    checkpoint.check_biases(policy)
    assert shape_of(policy, nested).biases
    check(policy, whole, nested, shape_of(policy, nested), tmp_path)
    check(policy, zeroed(policy.model, (0, 2)), (0, 2), shape_of(policy, nested), tmp_path)  # biases of zero


@pytest.mark.parametrize("family", ["qwen3", "mistral-window", "gemma3"])
def test_where_output_maps_have_no_biases_patches_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match="has none: use patch='none' or writer='own'"):
        checkpoint.check_biases(Policy(random_model(family, **WIDE)))


def test_adapters_are_merged_in(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    policy = Policy(random_model("qwen2"))
    policy.add_adapters(rank=2, alpha=4)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy.refresh()
    batch = random_batch()
    theirs = plain_logp(computed(policy, (0, 2), shape_of(policy, (0, 2)), tmp_path), *batch)
    with torch.no_grad():
        torch.testing.assert_close(theirs, policy.logprobs(*batch, layers=(0, 2)), atol=2e-5, rtol=1e-5)


def test_a_narrower_dtype_is_written_as_such(tmp_path: Path) -> None:
    policy = Policy(random_model("llama", **WIDE), dtype="bfloat16")
    checkpoint.save(policy, (0, 1), shape_of(policy, (0, 1)), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
