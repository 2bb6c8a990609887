"""A spec is complete, canonical and round-trips; assignments reach every field and refuse every typo."""

from __future__ import annotations

import json
import shutil
import string
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agents  # noqa: F401 (registers the agents)
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec, agent_arguments
from registry import UnknownField, UnknownName, UsageError, corrections, fields_of
from registry import agents as agent_registry


def test_every_default_is_resolved():
    spec = resolve("nested-reft/uniform/truncated-is")
    component, _ = agent_registry.resolve("nested-reft")
    elsewhere = {"policy", "env", "seed", "verbose", "tensorboard_log", "device"}
    assert set(spec.agent) - {"id"} == set(fields_of(component)) - elsewhere
    wanted = {name: field.default for name, field in corrections.fields("truncated-is").items()}
    assert spec.agent["correction"] == {"id": "truncated-is", **wanted}


@pytest.mark.parametrize(
    "id", ["reft", "nested-reft", "nested-reft/fixed/none", "nested-reft/uniform/token-is*ppo-clip"]
)
def test_round_trip_through_a_file(id, tmp_path):
    spec = resolve(id, settings=["learning_rate=1e-4"], seed=7)
    spec.write(tmp_path / "spec.json")
    assert RunSpec.read(tmp_path / "spec.json") == spec
    assert RunSpec.read(tmp_path / "spec.json").hash == spec.hash
    component, arguments = agent_arguments(spec.agent)
    assert component is agent_registry.resolve(id)[0] and arguments["learning_rate"] == 1e-4


def test_lists_become_the_tuples_that_components_declare():
    spec = resolve("nested-reft/fixed/none", settings=["sampler.layers=3,4"])
    assert spec.agent["sampler"]["layers"] == [3, 4]
    assert agent_arguments(spec.agent)[1]["sampler"]["layers"] == (3, 4)
    sets = resolve("reft", settings=["evaluation.sets=svamp,gsm8k"])
    assert sets.evaluation["sets"] == ["svamp", "gsm8k"] and sets.evaluated.sets == ("svamp", "gsm8k")


def test_hash_knows_every_field_and_no_order():
    spec = resolve("reft")
    assert spec.hash == resolve("reft").hash == RunSpec(**json.loads(json.dumps(spec.__dict__))).hash
    changes = ["learning_rate=0.5", "iterations=3", "evaluation.every=1", "env.template=chat", "seed=9", "tokens=100"]
    assert len({spec.hash, *(resolve("reft", settings=[text]).hash for text in changes)}) == len(changes) + 1
    both = ["sampler.layers=1", "sampler=fixed"]
    assert resolve("nested-reft", settings=both).hash == resolve("nested-reft", settings=both[::-1]).hash


def test_seed_does_not_reach_into_the_agent():
    one, two = (resolve("nested-reft/uniform/retrace", seed=seed) for seed in (0, 1))
    assert one.agent == two.agent and one.env == two.env


@pytest.mark.parametrize(
    ("assignment", "error", "message"),
    [
        ("correction.lamm=1", UnknownField, "did you mean 'lam'"),
        ("corection.lam=1", UnknownField, "did you mean 'correction'"),
        ("sampler.ratio=none", UsageError, "not a valid float"),
        ("sampler=uniformly", UnknownName, "did you mean 'uniform'"),
        ("env.templat=chat", UnknownField, "did you mean 'template'"),
        ("iteration=3", UnknownField, "did you mean 'iterations'"),
        ("iterations=-1", UsageError, "must be positive"),
        ("tokens=0", UsageError, "must be positive"),
        ("group_size", UsageError, "no assignment"),
    ],
)
def test_bad_assignments_name_the_remedy(assignment, error, message):
    with pytest.raises(error, match=message):
        resolve("nested-reft/uniform/retrace", settings=[assignment])


def test_bad_values_of_components_fail_before_the_run():
    with pytest.raises(UsageError):
        resolve("reft", settings=["problem_sampler=curriculum", "problem_sampler.target=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "has no 'agent'"),
        ('{"agent": {"id": "reft"}, "sed": 1}', "did you mean 'seed'"),
        ('{"agent": {"id": "reft", "group_sise": 1}}', "did you mean 'group_size'"),
        ('{"agent": {"id": "refd"}}', "did you mean 'reft'"),
        ('{"agent": {"id": "reft", "correction": {"id": "retrace", "lamda": 1}}}', "did you mean 'lam'"),
        ('{"agent": {"id": "reft"}, "evaluation": {"evry": 1}}', "did you mean 'every'"),
        ('{"agent": {"id": "reft"}, "env": {"id": "MathReason-v0", "splt": 1}}', "did you mean 'split'"),
        ('{"agent": {"id": "reft"}, "iterations": 0}', "must be positive"),
    ],
)
def test_bad_spec_files_are_refused(tmp_path, text, message):
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        RunSpec.read(tmp_path / "spec.json")


@given(st.text(string.printable, max_size=12), st.text(string.printable, max_size=12))
@settings(max_examples=80, deadline=None)
def test_any_assignment_is_taken_or_refused_as_usage(name, value):
    with suppress(UsageError):
        resolve("nested-reft/uniform/retrace", settings=[f"{name}={value}"])


def test_weights_are_part_of_a_run(tmp_path):
    """A run of a model that changed in place is another run, and its old spec does not start."""
    from benchmarks.experiment.training import make_agent
    from policies.pretrained.load import BUILT_IN

    model = tmp_path / "model"
    shutil.copytree(BUILT_IN["tiny"], model)
    before = resolve("reft", policy=str(model))
    assert resolve("reft", policy=str(model)) == before and before.weights is not None
    assert before.weights == resolve("reft").weights  # the same files elsewhere
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    after = resolve("reft", policy=str(model))
    assert after.hash != before.hash
    with pytest.raises(UsageError, match="has other weights"):
        make_agent(before)
    assert resolve("reft", policy="owner/on-the-hub").weights is None
