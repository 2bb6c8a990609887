"""A spec is complete, canonical and round-trips; assignments reach every field and refuse every typo."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import string
from contextlib import suppress
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agents  # noqa: F401 (registers the agents)
from benchmarks.experiment.resolve import applicable, resolve
from benchmarks.experiment.spec import LATER, RunSpec, agent_arguments
from registry import UnknownField, UnknownName, UsageError, corrections, fields_of
from registry import agents as agent_registry
from registry.command import assignment


def test_every_default_is_resolved():
    spec = resolve("nested-reft/uniform/truncated-is")
    component, _ = agent_registry.resolve("nested-reft")
    given = dict.fromkeys(("policy", "env", "seed", "device"))  # what a run gives its agent beside them
    bound = inspect.signature(component).bind(**given, **agent_arguments(spec.agent)[1])
    assert set(fields_of(component)) - set(bound.arguments) == {"verbose", "tensorboard_log"}
    wanted = {name: field.default for name, field in corrections.fields("truncated-is").items()}
    assert spec.agent["correction"] == {"id": "truncated-is", **wanted}


@pytest.mark.parametrize(
    "id", ["reft", "nested-reft", "nested-reft/fixed/none", "nested-reft/uniform/token-is*ppo-clip"]
)
def test_round_trip_through_a_file(id, tmp_path):
    spec = resolve(id, settings={"learning_rate": 1e-4}, seed=7)
    spec.write(tmp_path / "spec.json")
    assert RunSpec.read(tmp_path / "spec.json") == spec
    assert RunSpec.read(tmp_path / "spec.json").hash == spec.hash
    component, arguments = agent_arguments(spec.agent)
    assert component is agent_registry.resolve(id)[0] and arguments["learning_rate"] == 1e-4


def test_lists_become_the_tuples_that_components_declare():
    spec = resolve("nested-reft/fixed/none", settings={"sampler.layers": "3,4"})
    assert spec.agent["sampler"]["layers"] == [3, 4]
    assert agent_arguments(spec.agent)[1]["sampler"]["layers"] == (3, 4)
    sets = resolve("reft", settings={"evaluation.sets": "svamp,gsm8k"})
    assert sets.evaluation["sets"] == ["svamp", "gsm8k"] and sets.evaluated.sets == ("svamp", "gsm8k")


def test_a_value_may_be_text_or_typed():
    """As from a command line and from a TOML file: the same run."""
    pairs = [
        ("learning_rate", "1", 1),
        ("seconds", "7", 7),
        ("iterations", "4", 4),
        ("slots", "none", None),
        ("sampler.layers", "2,3", [2, 3]),
        ("evaluation.sets", "svamp,gsm8k", ["svamp", "gsm8k"]),
        ("env.problem_options.level", "[1, 2]", [1, 2]),
        ("dtype", "bfloat16", "bfloat16"),
        ("policy", "owner/on-the-hub", "owner/on-the-hub"),
    ]
    text = resolve("nested-reft/fixed/none", settings={name: text for name, text, _ in pairs})
    typed = resolve("nested-reft/fixed/none", settings={name: value for name, _, value in pairs})
    assert text == typed and text.hash == typed.hash and text.seconds == 7.0
    with pytest.raises(UsageError, match=r"iterations=4\.5 is not a valid int"):
        resolve("reft", settings={"iterations": 4.5})


def test_reward_parts_and_their_fields_are_settings_too():
    names = ("env.reward_parts.length-penalty.weight", "env.reward_parts")
    text = resolve("reft", settings=dict(zip(names, ("0.01", "format,length-penalty"), strict=True)))
    typed = resolve("reft", settings=dict(zip(names, (0.01, ["format", "length-penalty"]), strict=True)))
    assert text == typed and [part["id"] for part in text.env["reward_parts"]] == ["format", "length-penalty"]
    assert text.env["reward_parts"][1]["weight"] == 0.01
    with pytest.raises(UsageError, match="not among the reward parts"):
        resolve("reft", settings={names[0]: 0.01})


def test_what_an_agent_has_a_field_for():
    wanted = {"sampler.ratio": 0.5, "correction.lam": 0.5, "iterations": 3, "sampler": "uniform", "nonsense": 1}
    kept, missed = applicable("reft", wanted)
    assert kept == {"sampler.ratio": 0.5, "iterations": 3, "sampler": "uniform"}
    assert set(missed) == {"correction.lam", "nonsense"}
    with pytest.raises(UsageError, match="not a valid float"):
        applicable("reft", {"sampler": "uniform", "sampler.ratio": "much"})


def test_hash_knows_every_field_and_no_order():
    spec = resolve("reft")
    assert spec.hash == resolve("reft").hash == RunSpec(**json.loads(json.dumps(spec.__dict__))).hash
    changes = ["learning_rate=0.5", "iterations=3", "evaluation.every=1", "env.template=chat", "seed=9", "tokens=100"]
    assert (
        len({spec.hash, *(resolve("reft", settings=dict([assignment(text)])).hash for text in changes)})
        == len(changes) + 1
    )
    for name in ("sampler", "agent.sampler"):
        first, last = {"sampler.layers": 1, name: "fixed"}, {name: "fixed", "sampler.layers": 1}
        assert resolve("nested-reft", settings=first).hash == resolve("nested-reft", settings=last).hash


@pytest.mark.parametrize("agent", ["reft", "sft", "sb3-ppo"])
def test_what_came_later_changes_no_hash_where_it_is_not_used(agent, tmp_path):
    spec = resolve(agent)
    plain = asdict(spec)
    for fields in (plain, plain["agent"]):
        for name in set(LATER) & set(fields):
            assert fields.pop(name) is None
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    assert spec.hash == hashlib.sha256(text.encode()).hexdigest()[:12]
    (tmp_path / "spec.json").write_text(text)
    assert RunSpec.read(tmp_path / "spec.json").hash == spec.hash
    if agent != "sb3-ppo":
        assert resolve(agent, settings={"trained_layers": "3,4"}).hash != spec.hash


def test_seed_does_not_reach_into_the_agent():
    one, two = (resolve("nested-reft/uniform/retrace", seed=seed) for seed in (0, 1))
    assert one.agent == two.agent and one.env == two.env


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("correction.lamm=1", UnknownField, "did you mean 'lam'"),
        ("corection.lam=1", UnknownField, "did you mean 'correction'"),
        ("sampler.ratio=none", UsageError, "not a valid float"),
        ("sampler=uniformly", UnknownName, "did you mean 'uniform'"),
        ("env.templat=chat", UnknownField, "did you mean 'template'"),
        ("iteration=3", UnknownField, "did you mean 'iterations'"),
        ("iterations=-1", UsageError, "must be positive"),
        ("tokens=0", UsageError, "must be positive"),
        ("evaluation.samples=0", UsageError, "evaluation.samples=0 must be at least 1"),
        ("evaluation.problems=0", UsageError, "evaluation.problems=0 must be at least 1"),
        ("evaluation.every=-1", UsageError, "evaluation.every=-1 must be at least 0"),
        ("group_size", UsageError, "no assignment"),
    ],
)
def test_bad_assignments_name_the_remedy(text, error, message):
    with pytest.raises(error, match=message):
        resolve("nested-reft/uniform/retrace", settings=dict([assignment(text)]))


def test_bad_values_of_components_fail_before_the_run():
    with pytest.raises(UsageError):
        resolve("reft", settings={"problem_sampler": "curriculum", "problem_sampler.target": 2})


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
        resolve("nested-reft/uniform/retrace", settings={name: value})


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


@pytest.mark.parametrize("name", ["env.problems", "evaluation.source", "evaluation.sets"])
def test_files_of_problems_are_part_of_a_run(tmp_path, name):
    """A run on a file that was corrected is another run, wherever the file is; the old one does not go on with it."""
    from benchmarks.experiment.training import make_agent

    file = tmp_path / "sums.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 1?", "answer": "4"}\n')
    before = resolve("reft", settings={name: str(file)})
    assert before.data is not None and before == resolve("reft", settings={name: str(file)})
    file.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 1?", "answer": "3"}\n')
    after = resolve("reft", settings={name: str(file)})
    assert after.hash != before.hash
    with pytest.raises(UsageError, match="hold something else"):
        make_agent(before)


@pytest.mark.parametrize("spelling", ["./mine", "mine/", "sub/../mine", ".//mine", "~/mine"])
def test_a_local_path_is_one_run_however_it_is_written(spelling, tmp_path, monkeypatch):
    from policies.pretrained.load import BUILT_IN

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(BUILT_IN["tiny"], "mine")
    shutil.copytree(BUILT_IN["tiny"], "tiny")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')

    def resolved(model: str, sums: str) -> RunSpec:
        names = {"env.problems": sums, "evaluation.source": sums, "evaluation.sets": sums}
        return resolve("reft", settings={**names, f"evaluation.problem_options.{sums}.limit": 1}, policy=model)

    plain = resolved("mine", "sums.jsonl")
    assert (plain.policy, plain.env["tokenizer"], plain.env["problems"]) == ("mine", "mine", "sums.jsonl")
    other = resolved(spelling, spelling.rstrip("/").replace("mine", "sums.jsonl"))
    assert other.hash == (plain if spelling[0] != "~" else resolved(f"{tmp_path}/mine", f"{tmp_path}/sums.jsonl")).hash
    assert resolve("reft", policy="./tiny").policy == "./tiny"  # a folder, and not the built-in model
    assert resolve("reft", policy="owner/on-the-hub/").policy == "owner/on-the-hub/"


def test_tokenizer_and_template_are_part_of_a_run(tmp_path):
    from policies.pretrained.load import BUILT_IN

    model = tmp_path / "model"
    shutil.copytree(BUILT_IN["tiny"], model)
    hashes = {resolve("reft", policy=str(model)).hash}
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    hashes.add(resolve("reft", policy=str(model)).hash)
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    hashes.add(resolve("reft", policy=str(model)).hash)
    assert len(hashes) == 3


def test_options_of_evaluated_sets_and_of_nothing_else(tmp_path):
    """A set's name may have dots; a run without such options has the hash that it always had."""
    settings = {"evaluation.sets": "svamp,my.data.csv", "evaluation.source": "other.jsonl"}
    plain = resolve("reft", settings=settings)
    assert "problem_options" not in plain.evaluation
    chosen = resolve(
        "reft",
        settings={
            "evaluation.problem_options.my.data.csv.answer": "key",
            "evaluation.problem_options.my.data.csv.limit": "5",
            "evaluation.problem_options.other.jsonl.question": "text",
            **settings,
        },
    )
    expected = {"my.data.csv": {"answer": "key", "limit": 5}, "other.jsonl": {"question": "text"}}
    assert chosen.evaluated.problem_options == expected and chosen.hash != plain.hash
    chosen.write(tmp_path / "spec.json")
    assert RunSpec.read(tmp_path / "spec.json") == chosen
    with pytest.raises(UsageError, match=r"'my\.data\.cvs', which is not measured: did you mean 'my\.data\.csv'"):
        resolve("reft", settings={**settings, "evaluation.problem_options.my.data.cvs.answer": "key"})
    with pytest.raises(UsageError, match="did you mean 'problem_options'"):
        resolve("reft", settings={"evaluation.problem_option.x.answer": "key"})


@pytest.mark.parametrize("name", ["max_grad_norm", "learning_rate", "env.problem_options.x", "correction.lam"])
def test_a_spec_holds_no_number_that_json_cannot(name: str) -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(UsageError, match=r"not a finite number|must"):
            resolve("nested-reft/uniform/retrace", settings={name: value})
