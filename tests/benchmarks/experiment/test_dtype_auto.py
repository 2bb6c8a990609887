"""``dtype="auto"``: what the machine is fast in, settled when a spec is made, and never for the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import policies.dtype as module
from agents import ReFT
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec, agent_arguments
from policies import Policy
from policies.dtype import settle_dtype
from policies.model.compute import fast_dtype
from policies.pretrained.load import folder_dtype
from registry import UsageError
from tests.oracles.policy_checkpoints import random_model


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that multiplies bfloat16."""
    monkeypatch.setattr(module, "fast_dtype", lambda device: ("bfloat16", "it is made so"))
    module._tell_dtype.cache_clear()


def small(folder: str | Policy, **given: Any) -> ReFT:
    import gymnasium as gym

    env = gym.make_vec("MathReason-v0", num_envs=2, vocab_size=512, max_new_tokens=4)
    return ReFT(folder, env, group_size=2, problems_per_batch=1, **given)


@pytest.mark.parametrize(
    ("onednn", "avx512", "amx", "dtype"),
    [
        (True, True, False, "bfloat16"),
        (True, False, True, "bfloat16"),
        (True, False, False, "float32"),  # AVX-512 alone: oneDNN takes bfloat16, by more instructions than float32
        (False, True, True, "float32"),
    ],
)
def test_a_processor_needs_such_products(
    onednn: bool, avx512: bool, amx: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_dtype(torch.device("cpu"))[0] == dtype


@pytest.mark.parametrize("able", [True, False])
def test_a_card_is_asked(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able and not including_emulation)
    assert fast_dtype(torch.device("cuda"))[0] == ("bfloat16" if able else "float32")


def test_it_is_told_once_and_what_is_given_stays(halves: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert [settle_dtype(dtype, "a/model") for dtype in ("float32", "bfloat16", None)] == ["float32", "bfloat16", None]
    assert not capsys.readouterr().err
    assert settle_dtype("auto", "a/model") == settle_dtype("auto", "another/model") == "bfloat16"
    assert capsys.readouterr().err == "computing in dtype=bfloat16: it is made so; dtype=float32 is the other choice\n"
    assert settle_dtype("auto", "tiny") is None
    with pytest.raises(UsageError, match="dtype='half' is unknown"):
        settle_dtype("half", "a/model")


class TestSpec:
    def test_a_spec_says_what_is_computed_in(self, halves: None, folder: str) -> None:
        assert resolve("reft", policy=folder).agent["dtype"] == "bfloat16"
        assert resolve("sft", policy=folder).agent["dtype"] == "bfloat16"
        chosen = resolve("reft", policy=folder, settings={"dtype": "float32"})
        assert chosen.agent["dtype"] == "float32"
        assert resolve("reft", policy=folder, settings={"dtype": "auto"}) == resolve("reft", policy=folder)

    def test_the_built_in_models_specs_are_as_they_were(self, halves: None) -> None:
        assert resolve("reft").agent["dtype"] is None

    def test_a_spec_of_before_stays_in_float32(self, halves: None, folder: str, tmp_path: Path) -> None:
        made = resolve("reft", policy=folder)
        old = RunSpec(**{**vars(made), "agent": {**made.agent, "dtype": None}})
        old.write(tmp_path / "spec.json")
        read = RunSpec.read(tmp_path / "spec.json")
        assert read == old and read.hash != made.hash
        _, arguments = agent_arguments(read.agent)
        assert small(folder, dtype=arguments["dtype"]).target.dtype == torch.float32


def test_an_agent_computes_in_it_and_is_saved_with_what_it_was(
    halves: None, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = small(folder)
    assert agent.target.dtype == torch.bfloat16
    agent.save(tmp_path)
    monkeypatch.setattr(module, "fast_dtype", lambda device: ("float32", "another machine"))
    again = ReFT.load(tmp_path, env=agent.get_env())
    assert again.target.dtype == torch.bfloat16
    assert Policy.load(folder, dtype="float32").dtype == torch.float32 and ReFT("tiny").target.dtype == torch.float32


def test_a_policy_that_is_loaded_computes_in_what_an_agent_of_its_folder_would(halves: None, folder: str) -> None:
    assert Policy.load(folder).dtype == small(folder).target.dtype == torch.bfloat16
    assert Policy.load("tiny").dtype == torch.float32
    assert small(Policy.load(folder)).target.dtype == torch.bfloat16


def test_a_saved_policy_of_stable_baselines_keeps_its_dtype(halves: None, folder: str, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        policy = small(folder, dtype=str(dtype).removeprefix("torch.")).policy
        policy.save(tmp_path / "policy")
        assert type(policy).load(tmp_path / "policy").target.dtype == dtype


class TestTrainedInHalf:
    """What a training in bfloat16 changed by less than that holds, no product of it has seen."""

    @pytest.fixture
    def trained(self, tmp_path: Path) -> Policy:
        policy = Policy(random_model(), "bfloat16")
        with torch.no_grad():
            for weight in policy.parameters():
                weight.copy_(weight.bfloat16())
                weight += weight * 2**-10  # which rounding takes back
        policy.refresh()
        policy.save(tmp_path)
        return policy

    def test_others_load_it_in_what_it_was_trained_in(self, trained: Policy, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}

    def test_float32_products_have_its_weights(self, trained: Policy, tmp_path: Path) -> None:
        loaded = Policy.load(str(tmp_path), dtype="float32")
        assert loaded.dtype == torch.float32
        for ours, theirs in zip(loaded.parameters(), trained.parameters(), strict=True):
            assert torch.equal(ours, theirs.bfloat16().float()) and not torch.equal(ours, theirs)

    def test_it_goes_on_from_what_it_has_summed(self, trained: Policy, tmp_path: Path) -> None:
        loaded = Policy.load(str(tmp_path), dtype="bfloat16")
        assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), trained.parameters(), strict=True))

    def test_float32_stays_float32(self, tmp_path: Path) -> None:
        policy = Policy(random_model())
        policy.save(tmp_path)
        loaded = Policy.load(str(tmp_path), dtype="float32")
        assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), policy.parameters(), strict=True))
        assert folder_dtype(str(tmp_path)) == "float32"

    def test_auto_says_that_it_rounds(self, halves: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Policy(random_model()).save(tmp_path / "single")
        Policy(random_model(), "bfloat16").save(tmp_path / "half")
        settle_dtype("auto", str(tmp_path / "half"))
        assert "rounded" not in capsys.readouterr().err
        settle_dtype("auto", str(tmp_path / "single"))
        assert "weights that config.json says are float32 are rounded to it; dtype=float32" in capsys.readouterr().err
