"""The registry: ids, composition, products, fields, suggestions, and third parties through the entry-point group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

import agents  # noqa: F401 (registers the components)
from registry import Registry, UnknownField, UnknownName, UsageError, corrections, parse_value, skip_samplers
from registry import agents as agent_registry


@dataclass(frozen=True)
class Scale:
    by: float = 2.0
    times: int = 1

    def __call__(self, x: float) -> float:
        return x * self.by**self.times


@dataclass(frozen=True)
class Shift:
    add: float = 1.0
    times: int = 1


@dataclass(frozen=True)
class Whole:
    part: str = "scale"
    fixed: int = 0


def fresh() -> tuple[Registry, Registry]:
    parts = Registry("part", product=True)
    parts.register("scale")(Scale)
    parts.register("shift")(Shift)
    parts.combine_with(lambda factors: factors)
    wholes = Registry("whole")
    wholes.register("whole", parts={"part": parts})(Whole)
    wholes.register("plain", fixed={"fixed": 7})(Whole)
    return parts, wholes


def test_make_sets_fields_over_defaults():
    parts, wholes = fresh()
    assert parts.make("scale", by=3.0) == Scale(3.0) and parts.make("scale")(5) == 10
    assert parts.build({"id": "shift", "add": 2}) == Shift(2) and parts.build(Scale(4)) == Scale(4)
    assert wholes.make("plain") == Whole(fixed=7)


def test_ids_compose_and_list():
    _, wholes = fresh()
    assert wholes.resolve("whole/shift") == (Whole, {"part": "shift"})
    assert wholes.ids() == ["plain", "whole", "whole/scale", "whole/shift"]
    assert wholes.ids("*/s*t") == ["whole/shift"]
    with pytest.raises(UsageError, match="too many parts"):
        wholes.resolve("whole/shift/scale")


def test_a_part_of_an_id_is_replaced_where_the_id_names_it():
    _, wholes = fresh()
    assert wholes.replace_part("whole/shift", "part", "scale") == "whole/scale"
    assert wholes.replace_part("whole/scale*shift", "part", "shift") == "whole/shift"
    assert [wholes.replace_part(id, "part", "scale") for id in ("whole", "plain")] == ["whole", "plain"]


def test_products_share_fields_out_and_refuse_ambiguous_ones():
    parts, wholes = fresh()
    assert parts.make("scale*shift", by=3.0, add=4.0) == (Scale(3.0), Shift(4.0))
    assert "whole/scale*shift" in wholes and "whole/scale*shiff" not in wholes
    with pytest.raises(UsageError, match="2 factors"):
        parts.make("scale*shift", times=2)
    with pytest.raises(UnknownField, match="did you mean 'add'"):
        parts.make("scale*shift", adds=2)


@pytest.mark.parametrize("name", ["", "a/b", "a*b", "a?", "a b"])
def test_names_that_ids_could_not_hold(name):
    with pytest.raises(UsageError, match="may not be empty or hold"):
        fresh()[0].register(name)


def test_taken_names_are_refused_and_reloading_is_not():
    parts, _ = fresh()
    with pytest.raises(UsageError, match="already registered"):
        parts.register("scale")(Shift)
    parts.register("scale")(Scale)


def test_suggestions():
    with pytest.raises(UnknownName, match="did you mean 'retrace'"):
        corrections.make("retracs")
    with pytest.raises(UnknownName, match="unknown skip sampler 'xyz': known: "):
        skip_samplers.make("xyz")
    with pytest.raises(UnknownField, match="did you mean 'ratio'"):
        skip_samplers.make("uniform", ration=0.5)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        ("no", bool, False),
        ("none", float | None, None),
        ("0.5", float | None, 0.5),
        ("1,2", tuple[int, ...], (1, 2)),
        ("()", tuple[int, ...], ()),
        ("a, b", tuple[str, ...], ("a", "b")),
    ],
)
def test_values_from_a_command_line(text, kind, value):
    assert parse_value(text, kind, "field") == value


@pytest.mark.parametrize(
    ("value", "kind", "same"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (True, bool, True),
        (0.5, float | None, 0.5),
        (None, float | None, None),
        ([1, 2], tuple[int, ...], (1, 2)),
        (3, tuple[int, ...], (3,)),
        (["a", "b,c"], tuple[str, ...], ("a", "b,c")),
        ({"level": 2}, dict[str, int], {"level": 2}),
        ([1], Any, [1]),
    ],
)
def test_typed_values_keep_their_type_and_numbers_widen(value, kind, same):
    parsed = parse_value(value, kind, "field")
    assert parsed == same and type(parsed) is type(same)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0.5, int), (True, int), (True, float), (1, bool), (1, str), (0.5, tuple[int, ...]), (["x"], tuple[int, ...])],
)
def test_values_of_another_type_name_the_field(value, kind):
    with pytest.raises(UsageError, match="field"):
        parse_value(value, kind, "field")


@pytest.mark.parametrize(("text", "kind"), [("x", int), ("maybe", bool), ("1,x", tuple[int, ...]), ("x", int | None)])
def test_bad_values_name_the_field(text, kind):
    with pytest.raises(UsageError, match="field"):
        parse_value(text, kind, "field")


def test_every_agent_id_makes_a_spec():
    from benchmarks.experiment.resolve import resolve

    for id in agent_registry.ids():
        assert resolve(id).agent["id"] == id


PLUGIN = '''
from dataclasses import dataclass

import torch

from registry import corrections


@corrections.register("third-party-half")
@dataclass(frozen=True)
class Half:
    """Half of the importance ratio's square root."""

    power: float = 0.5

    def __call__(self, logp, rollout, advantage):
        return ((logp - rollout.behavior_logp) * self.power).exp() * rollout.mask
'''

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "third-party-correction"
version = "1.0"
[project.entry-points.nested_reft]
half = "third_party_correction"
[tool.setuptools]
py-modules = ["third_party_correction"]
"""

USE = """
import json, sys
from benchmarks.experiment.resolve import resolve
from registry import agents, corrections
import agents as zoo
print(json.dumps({
    "ids": agents.ids("*/third-party-half"),
    "made": corrections.make("third-party-half", power=0.25).power,
    "spec": resolve("nested-reft/uniform/third-party-half", settings={"correction.power": 0.1}).agent["correction"],
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages with a third party's, really built and installed by pip."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "third_party_correction.py").write_text(PLUGIN)
    (source / "pyproject.toml").write_text(PROJECT)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "--target", str(target), str(source)], check=True, timeout=120)
    return target


def _with_site(site, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.getcwd()]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_third_party_correction_is_found_by_its_id(site):
    done = _with_site(site, sys.executable, "-c", USE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "nested-reft/uniform/third-party-half" in found["ids"]
    assert found["made"] == 0.25 and found["spec"] == {"id": "third-party-half", "power": 0.1}


def test_third_party_correction_trains_from_the_command_line(site, tmp_path):
    small = ["iterations=1", "problems_per_batch=2", "group_size=2", "env.max_new_tokens=8", "evaluation.problems=2"]
    options = [word for text in [*small, "env.reward=random", "evaluation.samples=1"] for word in ("--set", text)]
    command = [sys.executable, "-m", "benchmarks.run", "--agent", "nested-reft/uniform/third-party-half", "--quiet"]
    done = _with_site(site, *command, "--runs", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/result.json"))) == 1


def test_broken_plug_in_is_named(tmp_path):
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nested_reft]\nbroken = broken_plugin\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('oh')\n")
    done = _with_site(tmp_path, sys.executable, "-m", "benchmarks.run", "--agent", "no-such-agent")
    assert done.returncode == 2
    assert "plug-in 'broken' (broken_plugin) failed to import" in done.stderr and "Traceback" not in done.stderr
