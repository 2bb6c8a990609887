"""Folders as users have them: whole ones load, and of every other one a single line says what is wrong."""

from __future__ import annotations

import itertools
import json
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from policies import Policy
from policies.pretrained.architecture import read_architecture
from policies.pretrained.load import damage_of, weights_fault
from registry import UsageError
from tests.oracles.byte_checkpoints import write_checkpoint
from tests.oracles.decoding import roll_out
from tests.oracles.policy_checkpoints import random_model

WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change) -> None:
    """``change`` the dict of tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def settings(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    """The one line of the error, and no warning beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError) as caught:
            Policy.load(str(folder), dtype="float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_folders_load_as_they_are(tmp_path, tied, shard, dtype):
    model = write_checkpoint(tmp_path, tie_word_embeddings=tied)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    if shard != "5GB":
        (tmp_path / WEIGHTS).unlink()
    assert damage_of(tmp_path) is None and weights_fault(tmp_path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = Policy.load(str(tmp_path), dtype="float32")
    for ours, theirs in zip(policy.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("tied", [True, False])
def test_no_weight_may_be_missing_or_of_another_shape(tmp_path, tied):
    write_checkpoint(tmp_path, tie_word_embeddings=tied)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for name in load_file(tmp_path / WEIGHTS):
        rewrite(tmp_path, lambda tensors, name=name: tensors.pop(name))
        assert name in refusal(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(whole)
        rewrite(tmp_path, lambda tensors, name=name: tensors.update({name: torch.zeros(3, 5)}))
        assert WEIGHTS in refusal(tmp_path) or name in refusal(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(whole)


def test_weights_without_a_place_are_warned_of(tmp_path):
    write_checkpoint(tmp_path)
    settings(tmp_path, num_hidden_layers=1, layer_types=None)
    with pytest.warns(UserWarning, match=r"no place for.*model\.layers\.1\..* more"):
        Policy.load(str(tmp_path), dtype="float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    write_checkpoint(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors[name].view(-1).__setitem__(7, value))
    assert name in refusal(tmp_path) and "not finite" in refusal(tmp_path)
    assert name in str(weights_fault(tmp_path))


def test_logits_that_overflow_are_named(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=False)
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    assert "logits are not finite" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("shard", ["5GB", "45KB"])
def test_files_that_are_cut_off_are_named(tmp_path, share, shard):
    write_checkpoint(tmp_path, shard=shard)
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert f"{path} is damaged or cut off" in refusal(tmp_path)


def test_pointers_and_missing_shards_are_named(tmp_path):
    write_checkpoint(tmp_path, shard="45KB")
    path = max(tmp_path.glob("*.safetensors"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n")
    assert f"{path} is a git-lfs pointer" in refusal(tmp_path) and "git lfs pull" in refusal(tmp_path)
    path.unlink()
    assert path.name in refusal(tmp_path)


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "something new"},
        {"bits": 4},
    ],
)
def test_quantised_folders_are_refused(tmp_path, quantised):
    write_checkpoint(tmp_path)
    settings(tmp_path, quantization_config=quantised)
    said = refusal(tmp_path)
    assert "quantised" in said and quantised.get("quant_method", "") in said


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_stored_as_no_floats_are_refused(tmp_path, kind):
    write_checkpoint(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    said = refusal(tmp_path)
    assert name in said and "quantised" in said


def test_links_to_nothing_are_named(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).symlink_to(tmp_path / "blobs" / "3f2a")
    assert f"{tmp_path / WEIGHTS} is a link to a file that is not there" in refusal(tmp_path)


def test_weights_that_memory_cannot_hold_are_refused_before_they_are_read(tmp_path, monkeypatch):
    model = write_checkpoint(tmp_path)
    needed = 4 * sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr("policies.pretrained.load.available_bytes", lambda: needed)
    Policy.load(str(tmp_path), dtype="float32")
    monkeypatch.setattr("policies.pretrained.load.available_bytes", lambda: int(0.98 * needed))
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert "not enough memory" in refusal(tmp_path)


def test_adapters_are_refused_and_their_base_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    assert "adapter of 'some/model'" in refusal(tmp_path) and "merge_and_unload" in refusal(tmp_path)
    write_checkpoint(tmp_path)  # transformers would load the base and the adapter in place of these weights
    assert "adapter of 'some/model'" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu", "gelu", "gelu_pytorch_tanh"])
def test_any_activation_loads_and_writes(tmp_path, activation):
    model = write_checkpoint(tmp_path, hidden_act=activation)
    ours = activation in ("silu", "gelu", "gelu_pytorch_tanh")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        policy = Policy.load(str(tmp_path), dtype="float32")
    assert policy.functional == ours
    assert [str(note.message) for note in notes if activation in str(note.message)] == (
        [] if ours else [str(notes[-1].message)]
    )
    ids = torch.randint(0, 300, (1, 9))
    wanted = model(ids).logits.log_softmax(-1)[0, 3:-1].gather(1, ids[0, 4:, None])[:, 0]
    found = policy.logprobs([ids[0, :4]], ids[:, 4:], torch.ones(1, 5).bool())
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)


def test_a_part_that_no_supported_family_has_falls_back(monkeypatch):
    monkeypatch.setattr("policies.policy.agrees", lambda *_: {}["norm"])
    with pytest.warns(UserWarning, match=r"KeyError: 'norm'.*falling back"):
        assert not Policy.load("tiny").functional


def test_what_falls_back_writes_and_scores_by_one_dtype():
    """Transformers' layers multiply by the weights that there are; rounded ones would be another policy."""
    with pytest.warns(UserWarning, match="falling back"):
        policy = Policy(random_model(hidden_act="relu"), "bfloat16")
    assert policy.dtype == torch.float32
    [tokens] = roll_out(policy, 1, [[5, 6, 7]], 6, seed=1).values()
    ids = torch.tensor([[token for token, _ in tokens]])
    wrote = torch.tensor([[logp for _, logp in tokens]])
    with torch.no_grad():
        scored = policy.logprobs([torch.tensor([5, 6, 7])], ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(scored, wrote, atol=1e-5, rtol=1e-5)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(("rope", "reach"), [(DYNAMIC, 48), (LONGROPE, 32)])
def test_a_row_never_depends_on_the_rows_beside_it(tmp_path, rope, reach):
    write_checkpoint(tmp_path, rope_parameters=rope, max_position_embeddings=48)
    with pytest.warns(UserWarning, match="depends on the length.*falling back"):
        policy = Policy.load(str(tmp_path), dtype="float32")
    rows = torch.randint(0, 300, (2, reach))
    mask = torch.zeros(2, reach - 4).bool()
    mask[0, :5], mask[1] = True, True
    together = policy.logprobs([rows[0, :4], rows[1, :4]], rows[:, 4:], mask)
    alone = policy.logprobs([rows[0, :4]], rows[:1, 4:9], mask[:1, :5])
    torch.testing.assert_close(together[0, :5], alone[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=f"{reach + 1} tokens .* {reach} positions .* one rotary table"):
        policy.logprobs([torch.zeros(5).long()], rows[:1, 4:], mask[1:])
    for limit in (policy.check_length, lambda n: policy.behavior((0, 1), 1, n)):
        limit(reach)
        with pytest.raises(UsageError, match=f"{reach} positions"):
            limit(reach + 1)


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 64),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}, 192),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
            256,
        ),
    ],
)
def test_lengths_beyond_the_positions_are_refused_or_warned_of(tmp_path, rope, reach):
    write_checkpoint(tmp_path, rope_parameters=rope, max_position_embeddings=64)
    policy = Policy.load(str(tmp_path), dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.check_length(64)
    if reach > 64:
        with pytest.warns(UserWarning, match=f"{reach} tokens go beyond the 64 positions"):
            policy.check_length(reach)
    with pytest.raises(UsageError, match=f"{reach + 1} tokens .* {reach} positions"):
        policy.check_length(reach + 1)


def test_the_self_check_reads_beyond_every_window(monkeypatch):
    model = random_model("mistral", sliding_window=20)
    assert Policy(model).functional
    wrong = replace(read_architecture(model.config), windows=(21,) * 4)
    monkeypatch.setattr("policies.policy.read_architecture", lambda _: wrong)
    with pytest.warns(UserWarning, match="falling back"):
        assert not Policy(model).functional


@pytest.mark.parametrize("seed", range(8))
def test_any_harm_to_a_folder_is_one_line_or_does_nothing(tmp_path, seed):
    """Bytes overwritten, cut or doubled at drawn places of drawn files: refused in one line, or the same model."""
    rng = np.random.default_rng(seed)
    model = write_checkpoint(tmp_path, shard=("5GB", "45KB")[seed % 2], tie_word_embeddings=bool(seed % 3))
    files = sorted(path for path in tmp_path.iterdir() if path.name != "generation_config.json")
    originals = {path: path.read_bytes() for path in files}
    for path, _ in itertools.product(files, range(2)):
        whole = originals[path]
        header = 8 + struct.unpack("<Q", whole[:8])[0] if path.suffix == ".safetensors" else len(whole)
        at = int(rng.integers(0, header - 3))  # what is written over a number, nobody can tell
        harmed = (
            whole[:at],
            whole[:at] + b"\x00\xff{" + whole[at + 3 :],
            whole + whole[at:],
            b"",
        )[rng.integers(4)]
        path.write_bytes(harmed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                policy = Policy.load(str(tmp_path), dtype="float32")
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
        else:
            assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), model.parameters(), strict=True))
        path.write_bytes(whole)
