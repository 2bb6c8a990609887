"""Loading, saving and the self-check."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from policies import Policy
from registry import UsageError
from tests.oracles.policy_checkpoints import (
    FAMILIES,
    LAYERS,
    VOCABULARY,
    plain_logp,
    random_batch,
    random_model,
    shared_policy,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_loads_as_itself_in_transformers_and_here(family, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = shared_policy(family)
    policy.save(tmp_path)
    prompts, tokens, mask = random_batch()
    expected = policy.logprobs(prompts, tokens, mask)
    again = Policy.load(str(tmp_path), dtype="float32")
    assert (again.functional, again.num_layers, again.vocab_size) == (True, LAYERS, VOCABULARY)
    torch.testing.assert_close(again.logprobs(prompts, tokens, mask), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(plain_logp(plain, prompts, tokens, mask), expected, atol=1e-4, rtol=1e-4)
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in tmp_path.iterdir())


def test_errors_of_a_new_user(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no such model folder: ./nowhere"):
        Policy.load("./nowhere")
    with pytest.raises(UsageError, match="no such model folder"):
        Policy.load(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"no config.json: give a folder written by save_pretrained"):
        Policy.load(str(tmp_path), dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UsageError, match=r"unsupported architecture 'gpt2'.*Llama, SmolLM2.*Qwen3"):
        Policy.load(str(tmp_path), dtype="float32")
    with pytest.raises(UsageError, match="is not a folder"):
        Policy.load(str(tmp_path / "config.json"), dtype="float32")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot read a model config"):
        Policy.load(str(tmp_path), dtype="float32")
    random_model().config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"model.safetensors"):
        Policy.load(str(tmp_path), dtype="float32")
    with pytest.raises(UsageError, match="dtype='float16' is unknown: use one of auto, float32, bfloat16"):
        Policy.load("tiny", dtype="float16")
    with pytest.raises(UsageError, match="not a torch device"):
        Policy.load("tiny", device="abacus")
    with pytest.raises(UsageError, match="device='mps' is not supported"):
        Policy.load("tiny", device="mps")


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="while the hub is reachable"):
        Policy.load("no-such-organisation/no-such-model")


def test_a_checkpoint_that_the_functional_layers_get_wrong_falls_back_loudly_and_correctly(monkeypatch):
    from policies.model import layers

    prompts, tokens, mask = random_batch()
    obs = {"input_ids": np.array([[1, 2, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]]), "length": np.array([[3], [0], [1]])}
    start, episode = np.ones(3, bool), np.arange(3)
    fast = shared_policy("qwen2-window")
    expected = fast.logprobs(prompts, tokens, mask, layers=(0, 2, 3))
    acts = [fast.behavior(kept, 3, 8).act(obs, start, episode) for kept in ((0, 1, 2, 3), (1, 2))]
    monkeypatch.setitem(layers.GATES, "silu", layers.GATES["gelu"])
    with pytest.warns(UserWarning, match="falling back to transformers' layers"):
        slow = Policy(random_model("qwen2-window"))
    assert not slow.functional
    torch.testing.assert_close(slow.logprobs(prompts, tokens, mask, layers=(0, 2, 3)), expected, atol=1e-4, rtol=1e-4)
    for kept, (token, logp) in zip(((0, 1, 2, 3), (1, 2)), acts, strict=True):
        found = slow.behavior(kept, 3, 8).act(obs, start, episode)
        assert found[0].tolist() == token.tolist()
        np.testing.assert_allclose(found[1], logp, atol=1e-4)


def test_dynamic_rotary_tables_fall_back():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.warns(UserWarning, match="falling back"):
        assert not Policy(random_model(rope_parameters=rope)).functional


def test_what_no_gemma_3_sets_is_refused():
    with pytest.raises(UsageError, match="this gemma3_text config sets final_logit_softcapping=30"):
        Policy(random_model("gemma3", final_logit_softcapping=30.0))
    with pytest.raises(UsageError, match="use_bidirectional_attention=True"):
        Policy(random_model("gemma3", use_bidirectional_attention=True))


def test_parameters_are_float32_whatever_the_compute_dtype():
    policy = Policy(random_model(), dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.functional
