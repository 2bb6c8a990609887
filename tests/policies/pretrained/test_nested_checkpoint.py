"""A nested policy as a model of its own: what transformers computes with it is what the policy computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from policies.pretrained.nested_checkpoint import keep_layers, nested_weights, save_nested, whole_layers
from registry import UsageError
from tests.oracles.policy_checkpoints import (
    FAMILIES,
    plain_logp,
    random_batch,
    random_model,
    shared_policy,
    without_layers,
)

SUBSETS = [(0, 3), (1, 2, 3)]  # without the first layer, too, whose cache tells the length


def sampled(model: Any, prompts: list[Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Completions [B, T] that transformers' ``generate`` draws by its cache from left-padded prompts, and their
    log-probabilities [B, T]."""
    size = max(map(len, prompts))
    padded = torch.stack([torch.cat((torch.zeros(size - len(p), dtype=torch.int64), p)) for p in prompts])
    mask = torch.stack([torch.arange(size) >= size - len(prompt) for prompt in prompts]).long()
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=steps, pad_token_id=0, output_scores=True, return_dict_in_generate=True
    )
    written = model.generate(input_ids=padded, attention_mask=mask, generation_config=settings)
    tokens = written.sequences[:, size:]
    logp = torch.stack([one.log_softmax(-1) for one in written.scores], 1)
    return tokens, logp.gather(2, tokens[..., None])[..., 0]


def state_of(model: Any) -> tuple[Any, ...]:
    return (
        [id(layer) for layer in model.model.layers],
        [layer.self_attn.layer_idx for layer in model.model.layers],
        copy.deepcopy(model.config.to_dict()),
    )


@pytest.mark.parametrize("layers", SUBSETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_within_is_by_the_nested_policy(family: str, layers: tuple[int, ...]) -> None:
    policy = shared_policy(family)
    prompts, _, _ = random_batch(group_size=1)
    before = state_of(policy.model)
    torch.manual_seed(1)
    with keep_layers(policy.model, layers):
        tokens, logp = sampled(policy.model, prompts, 9)
    assert state_of(policy.model) == before
    with torch.no_grad():
        ours = policy.logprobs(prompts, tokens, torch.ones_like(tokens, dtype=torch.bool), layers=layers)
        whole = policy.logprobs(prompts, tokens, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(logp, ours, atol=1e-4, rtol=0)
    assert (whole - logp).abs().max() > 0.1


def test_an_error_within_leaves_all_as_it_was() -> None:
    model = random_model("gemma3")
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), keep_layers(model, (1, 3)):
        assert len(model.model.layers) == model.config.num_hidden_layers == len(model.config.layer_types) == 2
        raise ZeroDivisionError
    assert state_of(model) == before


def test_a_peft_model_is_taken_as_the_model_that_it_wraps() -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model, ids = peft.get_peft_model(random_model(), adapters), torch.tensor([[4, 9, 31]])
    whole = model(ids).logits
    with keep_layers(model, (0, 2)):
        nested = model(ids).logits
    torch.testing.assert_close(model(ids).logits, whole, atol=0, rtol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(without_layers(merged, (0, 2))(ids).logits, nested, atol=1e-5, rtol=0)
    assert (nested - whole).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_a_checkpoint_of_the_nested_policy(family: str, tmp_path: Path) -> None:
    policy, layers = shared_policy(family), (1, 3)
    save_nested(policy.config, policy.model.named_parameters(), layers, tmp_path)
    loaded, about = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 2 and policy.config.num_hidden_layers == 4
    batch = random_batch()
    with torch.no_grad():
        ours, theirs = policy.logprobs(*batch, layers=layers), plain_logp(loaded, *batch)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


class TestWeights:
    def test_every_weight_is_asked_for(self) -> None:
        asked = []

        def weights() -> Any:
            for name, weight in random_model().named_parameters():
                asked.append(name)
                yield name, weight

        names = [name for name, _ in nested_weights(weights(), (0, 3))]
        assert any("layers.2." in name for name in asked)
        assert {name.split(".")[2] for name in names if "layers" in name} == {"0", "1"}
        assert "model.embed_tokens.weight" in names and "model.norm.weight" in names

    def test_layers_that_have_no_weight_are_named(self) -> None:
        pairs = [("model.layers.0.x", torch.ones(1)), ("model.layers.1.x", torch.ones(1))]
        with pytest.raises(UsageError, match=r"kept layers N = \[5\]"):
            list(nested_weights(pairs, (0, 5)))

    @pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (0, "1.mlp")])
    def test_what_is_no_subset_of_whole_layers_is_refused(self, layers: Any) -> None:
        with pytest.raises(UsageError, match="whole layers, increasing"):
            list(nested_weights([], layers))

    def test_halves_are_refused(self) -> None:
        with pytest.raises(UsageError, match="halves"):
            whole_layers((0, "1.mlp", 2), 3)
