"""Comparisons: what a grid stands for, fairness, processes that crash or are killed, and the whole command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.compare import _parser as parser
from benchmarks.compare import grid_of, main, resources
from benchmarks.comparison import launch
from benchmarks.comparison.arms import Arm, arms, start_arms
from benchmarks.comparison.board import clock, seconds_left
from benchmarks.comparison.grid import PRESETS, Grid, Start, Variant, agent_ids, preset, recipe
from benchmarks.comparison.launch import Launcher, Watched
from benchmarks.comparison.plan import FinishedRuns
from benchmarks.comparison.resolution import seeds_needed
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.summary import read_result
from benchmarks.measuring.durable import locked
from benchmarks.measuring.statistics import Components
from registry import UsageError, corrections
from tests.oracles.finished_runs import PEAK_BYTES, finish

SMALL = {"iterations": 2, "problems_per_batch": 2, "group_size": 2, "env.max_new_tokens": 8}
SMALL |= {"evaluation.problems": 4, "evaluation.every": 1, "evaluation.samples": 1, "checkpoint_every": 1}


def options(settings: dict) -> list[str]:
    """Settings as a command line has them."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


# What a grid stands for


def test_patterns_over_composed_ids():
    assert agent_ids(["nested-reft/uniform/*"]) == [f"nested-reft/uniform/{name}" for name in corrections]
    assert "nested-reft/fixed/retrace" in agent_ids(["nested-reft/*/retrace"])
    assert agent_ids(["reft", "ref?"]) == ["reft"]


def test_a_product_id_is_no_pattern():
    assert agent_ids(["nested-reft/uniform/token-is*ppo-clip"]) == ["nested-reft/uniform/token-is*ppo-clip"]
    assert "nested-reft/uniform/token-is" in agent_ids(["nested-reft/uniform/token*"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nested-reft/*/retrase", "no agent id matches.*did you mean.*retrace"),
        ("nested-reft/uniform/retrase", "did you mean 'retrace'"),
        ("raft", "did you mean 'reft'"),
    ],
)
def test_a_pattern_without_a_match_is_an_error(pattern, message):
    with pytest.raises(UsageError, match=message):
        agent_ids([pattern])


def test_arms_are_paired_by_seed():
    grid = Grid(agents=("nested-reft/uniform/retrace", "reft"), seeds=(3, 5), set={"iterations": 4})
    made = arms(grid)
    assert [arm.label for arm in made] == ["reft", "nested-reft/uniform/retrace"]  # the baseline first
    for arm in made:
        assert [spec.seed for spec in arm.specs] == [3, 5]
        assert len({json.dumps([spec.env, spec.evaluation, spec.policy, spec.iterations]) for spec in arm.specs}) == 1
    base, nested = made[0].specs[0], made[1].specs[0]
    assert (base.env, base.evaluation, base.policy) == (nested.env, nested.evaluation, nested.policy)


def test_assignments_reach_the_arms_that_have_the_field():
    made = arms(Grid(agents=("reft", "nested-reft/uniform/retrace"), set={"correction.lam": 0.5}))
    assert made[0].missed == ("correction.lam=0.5",)
    assert made[1].specs[0].agent["correction"]["lam"] == 0.5
    with pytest.raises(UsageError, match="did you mean 'lam'"):
        arms(Grid(agents=("nested-reft/uniform/retrace",), set={"correction.lamb": 0.5}))
    with pytest.raises(UsageError, match="not a valid float"):
        arms(Grid(agents=("nested-reft/uniform/retrace",), set={"correction.lam": "x"}))


def test_a_name_that_all_arms_miss_is_refused_with_the_nearest_of_any_arm():
    """Neither the baseline, which has no such fields at all, nor a control, which drops them, hides the typo."""
    ids = ("reft", "nested-reft/uniform/retrace")
    with pytest.raises(UsageError, match="did you mean 'lam'"):
        arms(Grid(agents=ids, controls=("uncorrected",), set={"correction.lamb": 0.5}))


def test_settings_fit_in_any_order():
    for settings in ({"sampler": "fixed", "sampler.layers": [1, 2]}, {"sampler.layers": [1, 2], "sampler": "fixed"}):
        [arm] = arms(Grid(agents=("nested-reft",), set=settings))
        assert arm.specs[0].agent["sampler"]["layers"] == [1, 2] and arm.missed == ()


def test_controls():
    ids = ("reft", "nested-reft/uniform/retrace", "nested-reft/uniform/base")
    controls = ("random-reward", "uncorrected", "fewer")
    made = {arm.label: arm.specs[0] for arm in arms(Grid(agents=ids, controls=controls, set={"sampler.ratio": 0.25}))}
    assert len(made) == 6
    assert made["reft random reward"].env["reward"] == "random"
    assert made["nested-reft/uniform/none"].agent["sampler"] == made[ids[1]].agent["sampler"]
    assert made["reft 6 of 8 completions"].agent["group_size"] == 6
    variants = tuple(Variant(f"ratio {n}", "nested-reft/*", {"sampler.ratio": n}) for n in (0.25, 0.5))
    bare = [arm.label for arm in arms(Grid(agents=ids, variants=variants, controls=("uncorrected",)))]
    assert len(set(bare)) == len(bare) and bare[-2:] == [f"nested-reft/uniform/none ratio {n}" for n in (0.25, 0.5)]
    variants = (Variant("", "reft", {}), Variant("on bytes", "reft", {"rollout_dtype": "int8"}))
    one = [arm.label for arm in arms(Grid(agents=("reft",), variants=variants, controls=("random-reward",)))]
    assert one == ["reft", "reft on bytes", "reft random reward"]
    with pytest.raises(UsageError, match="did you mean 'fewer'"):
        Grid(controls=("fever",))


def test_arms_say_which_control_they_are_and_whether_they_skip():
    """From what the agent is made of: an id without a correction has controls too, and ``full`` skips nothing."""
    ids = ("reft", "nested-reft/uniform", "nested-reft/full/retrace")
    settings = {"correction": "retrace", "sampler.ratio": 0.25}
    compared = arms(Grid(agents=ids, controls=("random-reward", "uncorrected", "fewer"), set=settings))
    assert [(arm.label, arm.control, arm.skips) for arm in compared] == [
        ("reft", None, False),
        ("nested-reft/uniform", None, True),
        ("nested-reft/full/retrace", None, False),
        ("reft random reward", "random-reward", False),
        ("nested-reft/uniform uncorrected", "uncorrected", True),
        ("reft 6 of 8 completions", "fewer", False),
    ]
    corrections_used = [arm.specs[0].agent["correction"]["id"] for arm in compared]
    assert corrections_used == ["retrace", "retrace", "retrace", "retrace", "none", "retrace"]


def test_a_recipe_divides_and_clips_as_its_source_does():
    recipe = {"recipe": "dr-grpo-qwen2.5-math", "agents": ("reft",)}
    spec = arms(Grid(**recipe))[0].specs[0]
    assert spec.agent["aggregation"] == {"id": "constant", "max_tokens": spec.env["max_new_tokens"]}
    assert spec.agent["correction"] == {"id": "ppo-clip", "eps_low": 0.2, "eps_high": 0.2, "dual_clip": None}
    other = arms(Grid(**recipe, set={"aggregation": "token-mean"}))[0].specs[0]
    assert other.agent["aggregation"] == {"id": "token-mean"}
    same = arms(Grid(**recipe, set={"aggregation": "constant"}))[0].specs[0]
    assert same.agent["aggregation"] == spec.agent["aggregation"]


def test_presets_resolve():
    for path in sorted(PRESETS.glob("*.toml")):
        if path.stem == "recipes":
            continue
        grid = preset(path.stem)
        made = arms(grid)
        assert len({spec.hash for arm in made for spec in arm.specs}) == len(made) * len(grid.seeds)
        assert len({arm.label for arm in made}) == len(made)
    paper = arms(preset("paper"))
    assert len(paper) == 2 * 3 * (1 + 3 * 3)
    assert {arm.specs[0].agent["sampler"].get("ratio") for arm in paper} == {None, 0.05, 0.1, 0.15}
    assert paper[0].specs[0].agent["learning_rate"] == 1e-6


def test_smoke_is_the_default():
    grid = grid_of(parser().parse_args([]))
    assert grid == preset("smoke")
    nested = [arm for arm in arms(grid) if arm.specs[0].agent["id"].startswith("nested-reft/")]
    assert len(nested) >= 3 and len(grid.seeds) >= 3 and grid.policies == ("tiny",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('margin = "much"', "margin='much' is not a valid float"),
        ("margin = true", "margin=True is not a valid float"),
        ("seeds = 3", r"seeds=3 must be a list: write \[3\]"),
        ('seeds = ["a"]', r"seeds\[0\]='a' is not a valid int"),
        ("seeds = [1.5]", r"seeds\[0\]=1.5 is not a valid int"),
        ("seeds = [-1]", "seed -1 must be from 0"),
        ("seeds = [0, 1, 0]", "have 0 more than once"),
        ('agents = "reft"', "agents='reft' must be a list"),
        ("policies = [3]", r"policies\[0\]=3 is not a valid str"),
        ("set = 3", "set=3 must be a table"),
        ('threads = "a"', "threads='a' is not a valid int"),
        ("recipe = 5", "recipe=5 is not a valid str"),
        ("title = 3", "title=3 is not a valid str"),
        ("baseline = 3", "baseline=3 is not a valid str"),
        ('baseline = "nested-reft/uniform/base"', "is not compared: known: reft"),
        ("variants = 3", "variants=3 must be a list"),
        ("variants = [3]", r"variants\[0\] is 3: make it a table"),
        ('[[variants]]\nagents = "reft"', r"variants\[0\] has no 'name'"),
        ("[start]\nseed = 3", "start has no 'agent'"),
        ('[start]\nagent = "sft"\nseed = "x"', "seed='x' is not a valid int"),
        ("start = 3", "start is 3: make it a table"),
    ],
)
def test_a_preset_is_read_by_its_types(text, message, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        preset(str(tmp_path / "mine.toml"))


def test_a_comparison_without_its_baseline_says_so(capsys, tmp_path):
    line = ["--dry-run", "--runs", str(tmp_path), "--agents", "nested-reft/even/none", "nested-reft/uniform/none"]
    assert main(line) == 0 and "the baseline 'reft' is not compared" in capsys.readouterr().err
    assert main([*line, "reft"]) == 0 and "baseline" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((PRESETS.parent / "results").rglob("preset.toml")), ids=lambda path: path.parent.name
)
def test_what_committed_runs_were_made_by_resolves(path):
    grid = preset(str(path))
    resolved = arms(grid)
    assert {len(arm.specs) for arm in resolved} == {len(grid.seeds)} and not any(arm.missed for arm in resolved)
    assert not grid.start or start_arms(grid)


def test_command_line_changes_the_preset():
    line = ["--agents", "reft", "--seeds", "3,7", "--iterations", "9", "--set", "learning_rate=0.5", "--tokens", "50"]
    grid = grid_of(parser().parse_args(line))
    spec = arms(grid)[0].specs[1]
    assert (spec.seed, spec.iterations, spec.agent["learning_rate"], spec.tokens) == (7, 9, 0.5, 50)
    assert grid_of(parser().parse_args(["--seeds", "3"])).seeds == (0, 1, 2)
    assert grid_of(parser().parse_args(["--seeds", "3,"])).seeds == (3,)
    with_recipe = grid_of(parser().parse_args(["--recipe", "dr-grpo-qwen2.5-math", "--set", "group_size=4"]))
    assert with_recipe.set["group_size"] == "4" and with_recipe.set["learning_rate"] == 1e-6


def test_a_budget_replaces_the_presets():
    seconds = grid_of(parser().parse_args(["--seconds", "60"]))
    assert (arms(seconds)[0].specs[0].iterations, arms(seconds)[0].specs[0].seconds) == (None, 60.0)
    tokens = arms(grid_of(parser().parse_args(["--set", "tokens=9000"])))[0].specs[0]
    assert (tokens.iterations, tokens.tokens, tokens.seconds) == (None, 9000, None)


def test_an_agent_without_a_variant_runs_as_it_is():
    """So that variants of some agents cannot lose the control arm."""
    agents = ("reft", "nested-reft/uniform/none")
    variants = (Variant("half", "nested-reft/*", {"sampler.ratio": 0.5}),)
    assert [arm.label for arm in arms(Grid(agents=agents, variants=variants))] == ["reft", f"{agents[1]} half"]
    for name in ("corrections-two-ratios", "samplers", "paper"):
        assert any(arm.specs[0].agent["id"] == "reft" for arm in arms(preset(name)))


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        ("reft", {"lerning_rate": 1e-2}, "variant 'fast': agent 'reft' has no field 'lerning_rate': did you mean"),
        ("reft", {"lerning_rate": 1e-2, "group_size": 4}, "did you mean 'learning_rate'"),
        ("nested-reft/*", {"sampler.ration": 0.5}, "did you mean 'ratio'"),
        ("nestd-reft/*", {"group_size": 4}, "no agent id matches 'nestd-reft/\\*'"),
    ],
)
def test_a_typo_in_a_variant_is_refused(pattern, settings, message):
    grid = Grid(agents=("reft", "nested-reft/uniform/none"), variants=(Variant("fast", pattern, settings),))
    with pytest.raises(UsageError, match=message):
        arms(grid)


def test_what_a_variant_sets_and_an_agent_lacks_is_told():
    """With agents that it was not made for, and of what its own component makes a field of."""
    ids = ("reft", "nested-reft/uniform/none")
    made = arms(Grid(agents=ids, variants=(Variant("half", "*", {"sampler.ratio": 0.5, "group_size": 4}),)))
    assert [(arm.label, arm.missed) for arm in made] == [
        ("reft half", ("sampler.ratio=0.5",)),
        ("nested-reft/uniform/none half", ()),
    ]
    chosen = ["--preset", "samplers", "--agents", "reft", "nested-reft/full/none"]
    assert [arm.label for arm in arms(grid_of(parser().parse_args(chosen)))] == ["reft", "nested-reft/full/none"]
    stale = Variant("stale", "*", {"batch.iterations": 4})
    assert arms(Grid(set={"batch": "stale"}, variants=(stale,)))[0].specs[0].agent["batch"]["iterations"] == 4


def test_recipes_have_a_source_and_resolve():
    import tomllib

    for name, entry in tomllib.loads((PRESETS / "recipes.toml").read_text()).items():
        assert entry["source"] and entry["for"]
        assert arms(Grid(agents=("reft",), set=recipe(name)))[0].missed == ()
    with pytest.raises(UsageError, match="unknown recipe"):
        recipe("dr-grop")


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)


def test_cores_are_shared_out(cores):
    grid = Grid(threads=1)
    assert resources(parser().parse_args([]), grid) == (16, 1)
    assert resources(parser().parse_args(["--threads", "64"]), grid) == (1, 64)
    assert resources(parser().parse_args(["--jobs", "3"]), grid) == (3, 1)
    assert resources(parser().parse_args([]), Grid()) == (1, 16)


@pytest.mark.parametrize(
    ("count", "devices", "threads", "found"),
    [
        (0, {"cuda"}, 1, (1, 1)),
        (1, {"cuda"}, None, (1, 16)),
        (8, {"cuda"}, None, (8, 2)),
        (8, {"cuda"}, 4, (4, 4)),
        (64, {"cuda"}, None, (16, 1)),
        (8, {"cuda:1"}, 1, (1, 1)),
        (8, {"cuda:1", "cuda:3"}, 1, (2, 1)),
        (8, {"cpu"}, 1, (16, 1)),
    ],
)
def test_of_runs_on_gpus_there_is_one_a_card(cores, monkeypatch, count, devices, threads, found):
    monkeypatch.setattr(launch, "cards", lambda: [str(n) for n in range(count)])
    grid = Grid(threads=threads)
    assert resources(parser().parse_args([]), grid, devices) == found
    assert resources(parser().parse_args(["--jobs", "7"]), grid, devices) == (7, threads or 16)
    assert resources(parser().parse_args(["--launcher", "ray"]), grid, devices)[1] == (threads or 16)


@pytest.mark.parametrize(
    ("seen", "named", "found"),
    [
        (3, {}, ["0", "1", "2"]),
        (3, {"CUDA_VISIBLE_DEVICES": "4, 2,7"}, ["4", "2", "7"]),
        (2, {"CUDA_VISIBLE_DEVICES": "4,2,99"}, ["4", "2"]),
        (0, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        (1, {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, ["MIG-a", "MIG-b"]),
        (0, {"CUDA_VISIBLE_DEVICES": "MIG-a"}, []),
        (2, {"HIP_VISIBLE_DEVICES": "5,6"}, ["5", "6"]),
    ],
)
def test_cards_are_called_what_their_variable_calls_them(monkeypatch, seen, named, found):
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.setattr("torch.version.hip", "7.0" if "HIP_VISIBLE_DEVICES" in named else None)
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in named.items():
        monkeypatch.setenv(variable, value)
    assert launch.cards() == found and launch.visible_devices() == next(iter(named), "CUDA_VISIBLE_DEVICES")


def test_the_command_line_wins_over_the_variants_of_a_preset():
    compared = arms(grid_of(parser().parse_args(["--set", "sampler.ratio=0.25"])))
    assert [arm.specs[0].agent["sampler"].get("ratio") for arm in compared] == [None, 0.25, 0.25, 0.25]
    assert not any("of 12" in arm.label for arm in compared)
    compared = arms(grid_of(parser().parse_args(["--set", "evaluation.problems=8"])))
    assert [arm.label.partition(" ")[2] for arm in compared] == ["", "4 of 12", "6 of 12", "6 of 12"]


@pytest.mark.parametrize(
    "line",
    [
        ["--preset", "smollm2", "--set", "{}learning_rate=1e-3"],
        ["--preset", "smoke", "--set", "{}advantage=grpo"],
        ["--preset", "depth", "--set", "{}sampler.ratio=0.25"],
        ["--set", "{}iterations=5"],
        ["--start", "sft", "--start-set", "{}iterations=5"],
    ],
)
def test_a_setting_of_the_command_line_has_one_name(line):
    """``agent.`` before it changes nothing, whatever a preset and its variants set."""
    bare, prefixed = (grid_of(parser().parse_args([word.format(one) for word in line])) for one in ("", "agent."))
    assert prefixed == bare and arms(prefixed) == arms(bare)
    with pytest.raises(UsageError, match="has no field 'lr'"):
        arms(Grid(set={"agent.lr": 1}))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(set={"seed": 4}), "seed=4 .* give --seeds"),
        (Grid(set={"policy": "mine"}), "policy=mine .* give --policy"),
        (Grid(variants=(Variant("mine", "*", {"agent.policy": "mine"}),)), "give --policy"),
        (Grid(start=Start("sft", set={"seed": 4})), r"\[start\]"),
        (Grid(set={"sampler": "even"}), "sampler=even contradicts the agent 'reft', whose sampler is 'full'"),
        (Grid(agents=("nested-reft/even/none",), set={"correction": "retrace"}), "correction=retrace contradicts"),
    ],
)
def test_what_the_grid_decides_is_no_setting(grid, message):
    """It would be lost, or its arm called what it is not."""
    with pytest.raises(UsageError, match=message):
        [*arms(grid), *start_arms(grid)]


def test_a_preset_does_not_stand_in_the_way_of_what_is_chosen():
    (arm,) = arms(grid_of(parser().parse_args(["--agents", "sb3-ppo"])))  # has no advantage, groups or sampler
    assert arm.missed == () and arm.specs[0].agent["learning_rate"] == 1e-4
    compared = arms(grid_of(parser().parse_args(["--set", "advantage=rloo"])))  # has no field `keep`
    assert {arm.specs[0].agent["advantage"]["id"] for arm in compared} == {"rloo"}
    for asked in (
        ["--set", "advantage=rloo", "--set", "advantage.keep=2"],
        ["--agents", "sb3-ppo", "--recipe", "dapo-qwen2.5-32b"],
    ):
        with pytest.raises(UsageError, match=r"keep|field"):
            arms(grid_of(parser().parse_args(asked)))


def test_agents_chosen_of_a_named_preset_keep_what_it_sets_for_them():
    def chosen(*asked: str) -> list[Arm]:
        return arms(grid_of(parser().parse_args([*asked])))

    (whole,) = [arm for arm in chosen("--preset", "smollm2") if arm.label == "reft"]
    (alone,) = [arm for arm in chosen("--preset", "smollm2", "--agents", "reft") if arm.control is None]
    assert alone == whole and alone.specs[0].agent["lora_rank"] == 16
    ids = ["nested-reft/even/truncated-is", "nested-reft/uniform/truncated-is"]
    named = chosen("--preset", "smoke", "--agents", *ids)
    assert [arm.label for arm in named] == [f"{ids[0]} 4 of 12", f"{ids[1]} 6 of 12"]
    assert [arm.label for arm in chosen("--agents", *ids)] == ids  # of the preset that nobody named, no variants


def test_help_and_typos_in_options_need_no_torch():
    program = "import sys, benchmarks.run, benchmarks.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agents", "reftt"], "did you mean 'reft'"),
        (["--preset", "smok"], "did you mean 'smoke'"),
        (["--preset", "nowhere.toml"], "cannot be read"),
        (["--seeds", "many"], "neither a number"),
        (["--seeds", "0"], "at least 1"),
        (["--set", "learning_rte=1"], "did you mean 'learning_rate'"),
        (["--set", "learning_rate"], "no assignment"),
        (["--control", "random"], "did you mean 'random-reward'"),
        (["--env", "MathReason/gsm-v0"], "MathReason"),
        (["--jobs", "0"], "at least 1"),
        (["--iterations", "0"], "must be positive"),
        (["--baseline", "ref"], "is not compared: did you mean 'reft'"),
        (["--policy", "/nowhere"], "no such model folder"),
        (["--set", "env.template=chta"], "did you mean 'chat'"),
        (["--set", "env.problems=gsm9k"], "did you mean 'gsm8k'"),
        (["--set", "evaluation.sets=aime42"], "did you mean 'aime24'"),
        (["--set", "sampler.ratio=1.5"], "1.5"),
        (["--set", "device=cdua"], "is not a torch device"),
    ],
)
def test_bad_input_exits_2(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "/nowhere"], "no such model folder"),
        (["--set", "env.template=chta"], "did you mean 'chat'"),
        (["--set", "evaluation.sets=aime42"], "did you mean 'aime24'"),
        (["--set", "sampler.ratio=1.5"], "1.5"),
    ],
)
def test_a_dry_run_plans_nothing_that_cannot_run(tmp_path, capsys, arguments, message):
    test_bad_input_exits_2(tmp_path, capsys, [*arguments, "--dry-run"], message)


def test_preset_files_name_unknown_keys(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text('agent = ["reft"]\n')
    assert main(["--preset", str(tmp_path / "mine.toml")]) == 2
    assert "did you mean 'agents'" in capsys.readouterr().err


def test_dry_run_lists_and_starts_nothing(tmp_path, capsys):
    assert main(["--dry-run", "--runs", str(tmp_path), "--seeds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "8 runs" in shown and "to do" in shown and "0.6 GB" in shown  # what such a run has been seen to need
    assert "8 run(s): no finished run of this shape, and no budget of seconds: unknown" in shown
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_what_budgets_of_seconds_say(tmp_path, capsys):
    """A new user has no finished run to learn from."""
    line = ["--dry-run", "--runs", str(tmp_path), "--agents", "reft", "sft", "--seeds", "3", "--seconds", "90"]
    assert main([*line, "--jobs", "1", "--set", "problems=8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("1:30 + evaluation") == 6 and "unknown │ unknown" not in shown
    assert "at least 9:00 of training with 1 run(s) at a time" in shown
    assert "from budgets, evaluation left out" in shown and "no finished run" not in shown
    assert shown.count("0.6 GB") >= 3, "of reft; sft has no plan"


def test_dry_run_learns_from_finished_runs(tmp_path, capsys):
    finish(resolve("reft", settings=SMALL), tmp_path)
    line = ["--dry-run", "--runs", str(tmp_path), "--agents", "reft", "--seeds", "2", *options(SMALL)]
    assert main(line) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "from finished runs" in shown and "1.5 GB" in shown and "resolution: unknown" in shown
    assert main([*line, "--control", "random-reward"]) == 0
    assert "no finished run" not in capsys.readouterr().out, "a coin costs what a verdict does"


def test_dry_run_says_what_the_comparison_will_tell_apart(tmp_path, capsys):
    """By the formula for the mean squares of the made-up runs' differences."""
    ids = ("reft", "nested-reft/uniform/none")
    rights = []
    for id, last in zip(ids, (0.5, 0.7), strict=True):
        folders = [finish(resolve(id, settings=SMALL, seed=seed), tmp_path, last=last) for seed in (0, 1, 2)]
        rights.append([[int(bit) for bit in read_result(one / "result.json")["right_after"]] for one in folders])
    components = Components.of(np.array(rights[1]) - np.array(rights[0]))
    line = ["--dry-run", "--runs", str(tmp_path), "--agents", *ids, "--seeds", "5", *options(SMALL)]
    assert main(line) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"5 seeds of 4 questions tell an arm from another to about +-{100 * components.half_width(5, 4):.1f}" in shown
    )
    assert "over 100" in shown and "resolution: unknown" not in shown
    assert main([*line, "--set", "evaluation.problems=3"]) == 0  # other questions
    assert "resolution: unknown" in " ".join(capsys.readouterr().out.split())


def test_seeds_needed_is_the_first_that_is_enough():
    parts = Components(seeds=0.0004, questions=0.005, rest=0.2)
    for points in (1, 2, 3):
        count = seeds_needed(parts, 512, points)
        assert 100 * parts.half_width(count, 512) <= points < 100 * parts.half_width(count - 1, 512)
    assert seeds_needed(Components(0.0, 0.2, 0.1), 64, 1) is None  # more seeds do not make up for few questions


def test_the_cost_of_a_run_is_that_of_finished_ones_in_proportion(tmp_path):
    """By hand: 1.6 s and 100 tokens an iteration, 2 s an evaluation, 3 evaluations of 20 completions in all."""
    finish(resolve("reft", settings=SMALL), tmp_path)
    cost_of = FinishedRuns(tmp_path)
    twice = cost_of(resolve("reft", settings=SMALL | {"group_size": 4, "iterations": 6}))
    assert twice.seconds == pytest.approx(2 * 1.6 * 6 + 6.0 * 36 / 20) and twice.peak_bytes == PEAK_BYTES
    no_evaluations = {name: value for name, value in SMALL.items() if name != "iterations"} | {"evaluation.every": 0}
    by_tokens = cost_of(resolve("reft", settings=no_evaluations, tokens=250))
    assert by_tokens.seconds == pytest.approx(1.6 * 3 + 6.0 * 16 / 20)
    by_seconds = cost_of(resolve("reft", settings=no_evaluations, seconds=16.0))
    assert by_seconds.seconds == pytest.approx(16.0 + 6.0 * 16 / 20)


def test_runs_of_another_shape_say_nothing_of_cost_and_the_same_agent_says_most(tmp_path):
    finish(resolve("reft", settings=SMALL), tmp_path)
    fast = SMALL | {"learning_rate": 1e-5}
    finish(resolve("reft", settings=fast), tmp_path, pace=2.0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "result.json").write_text("{")
    cost_of = FinishedRuns(tmp_path)
    for other in (
        resolve("nested-reft/uniform/none", settings=SMALL),
        resolve("reft", settings=SMALL | {"env.max_new_tokens": 9}),
        resolve("reft", settings=SMALL, device="cuda"),
        resolve("reft", settings=SMALL, policy="owner/on-the-hub"),
    ):
        assert cost_of(other) is None
    slow, quick, new = (
        cost_of(resolve("reft", settings=settings, seed=7)).seconds
        for settings in (SMALL, fast, SMALL | {"learning_rate": 1e-6})
    )
    assert (slow, quick) == (pytest.approx(3.2 + 6.0), pytest.approx(1.6 + 6.0)) and new == (slow + quick) / 2


# Processes: a stand-in for benchmarks.run, so that nothing is trained

STAND_IN = """
import json, os, pathlib, sys, time
spec = pathlib.Path(sys.argv[sys.argv.index("--spec") + 1])
behaviour = (spec.parent.parent / "behaviour").read_text()
seed = json.loads(spec.read_text())["seed"]
rows = spec.parent / "metrics.jsonl"
if behaviour == "refuse" and seed == 1:
    print("error: no", file=sys.stderr)
    raise SystemExit(2)
with rows.open("a") as file:
    file.write(json.dumps({"iteration": 1, "time/iteration": 0.1, "rollout_tokens_per_second": 5.0}) + "\\n")
if behaviour == "hang":
    time.sleep(60)
if behaviour == "crash" and seed == 1:
    raise SystemExit("out of luck")
if behaviour == "die" and seed == 1:
    os.kill(os.getpid(), 9)
(spec.parent / "result.json").write_text("{}")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(launch, "PROGRAM", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)

    def prepared(behaviour: str, seeds: int = 3, jobs: int = 2, device: str = "cpu") -> Launcher:
        (tmp_path / "behaviour").write_text(behaviour)
        spec = replace(resolve("reft", settings=SMALL), device=device)
        specs = [replace(spec, seed=seed) for seed in range(seeds)]
        return Launcher(specs, tmp_path, jobs, threads=1, cards=("4", "7"))

    return prepared


@pytest.mark.parametrize(
    ("device", "seen"), [("cuda", ["4", "7", "4", "7"]), ("cpu", [None] * 4), ("cuda:1", [None] * 4)]
)
def test_runs_are_spread_over_the_gpus(stand_in, monkeypatch, device, seen):
    given = []

    def start(*arguments, env, **more):
        given.append(env.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.Popen(*arguments, env=env, **more)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": start}))
    launcher = stand_in("hang", seeds=4, jobs=4, device=device)
    states = iter(launcher)
    while not all(run.iteration == 1 for run in next(states)):
        pass
    states.close()
    assert given == seen


def test_all_runs_finish_and_are_reused(stand_in):
    launcher = stand_in("finish")
    most = max(sum(run.process is not None for run in state) for state in launcher)
    assert most <= 2 and [run.phase for run in launcher.watched] == ["finished"] * 3
    again = stand_in("crash")
    assert all(run.reused for run in again.watched) and not list(again)


@pytest.mark.parametrize(("behaviour", "why"), [("crash", "out of luck"), ("die", "killed by signal 9")])
def test_a_failed_run_is_reported_and_stops_no_other(stand_in, behaviour, why):
    launcher = stand_in(behaviour)
    list(launcher)
    assert [run.phase for run in launcher.watched] == ["finished", "failed", "finished"]
    assert launcher.watched[1].error == why
    assert (launcher.watched[1].folder / "metrics.jsonl").is_file()  # kept
    retried = stand_in("finish")
    list(retried)
    assert [run.phase for run in retried.watched] == ["finished"] * 3


def test_a_run_that_is_refused_before_its_first_row_leaves_no_folder(stand_in):
    launcher = stand_in("refuse")
    list(launcher)
    assert [run.phase for run in launcher.watched] == ["finished", "failed", "finished"]
    assert launcher.watched[1].error == "error: no" and not launcher.watched[1].folder.exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_impossible_value_is_refused_before_the_first_process(more, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "PROGRAM", ("/nowhere",))
    line = ["--agents", "reft", "nested-reft/uniform/none", "--runs", str(tmp_path / "runs"), "--set", "group_size=0"]
    assert main([*line, *more]) == 2 and "group_size=0 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_stopping_ends_the_processes(stand_in):
    launcher = stand_in("hang")
    states = iter(launcher)
    while not all(run.iteration == 1 for run in next(states)[:2]):
        pass
    processes = [run.process for run in launcher.watched if run.process is not None]
    states.close()
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)


def test_a_run_of_another_process_is_followed(stand_in):
    launcher = stand_in("finish", seeds=1)
    folder = launcher.watched[0].folder
    folder.mkdir()
    with locked(folder):
        states = iter(launcher)
        assert next(states)[0].phase == "elsewhere" and next(states)[0].process is None
    list(states)
    assert launcher.watched[0].phase == "finished"


def test_rows_of_a_resumed_run_are_read_again(tmp_path):
    spec = resolve("reft", settings=SMALL)
    folder = finish(spec, tmp_path)
    run = Watched(spec, folder)
    run.look()
    assert (run.iteration, run.phase) == (2, "training") and run.accuracy == 0.5
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "new").write_text("\n".join(lines[:2]) + "\n{half a li")
    (folder / "new").replace(folder / "metrics.jsonl")
    run.look()
    assert run.iteration == 1


def test_time_left_and_clock():
    spec = resolve("reft", settings={"iterations": 10})
    runs = [Watched(spec, folder=None, iteration=5, phase="training", _times=[2.0]), Watched(spec, folder=None)]
    assert seconds_left(runs, jobs=1) == 5 * 2 + 10 * 2 and seconds_left(runs, jobs=2) == 20
    assert seconds_left([Watched(spec, folder=None)], 1) is None
    timed = resolve("reft", settings={"seconds": 30})
    assert seconds_left([Watched(timed, folder=None, iteration=5, _times=[2.0])], 1) == 20
    counted = resolve("reft", settings={"tokens": 300})
    assert seconds_left([Watched(counted, folder=None, iteration=5, tokens=100, _times=[2.0])], 1) == 20
    assert clock(187.4) == "3:07" and clock(8100) == "2:15:00"


# The whole command


def _command(runs, *more: str) -> list[str]:
    agents = ["--agents", "reft", "nested-reft/uniform/token-is", "--seeds", "1", "--jobs", "2"]
    settings = options(SMALL | {"env.reward": "random"})
    return [sys.executable, "-m", "benchmarks.compare", *agents, "--runs", str(runs), *settings, *more]


def _numbers(folder) -> dict:
    """What of results.json no clock decides."""
    results = json.loads((folder / "results.json").read_text())
    kept = ("label", "seeds", "before", "after", "gain", "sampled_after", "tokens", "kl", "ess", "layers_kept", "runs")
    return {"arms": [{k: arm[k] for k in kept} for group in results["groups"] for arm in group["arms"]]}


def test_the_whole_command_and_again(tmp_path):
    done = subprocess.run(_command(tmp_path / "runs", "--out", str(tmp_path / "out")), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy before" in done.stdout and "nested-reft/uniform/token-is" in done.stdout
    files = {"report.html", "report.md", "results.json", "outcomes.json", "curves.png"}
    assert files == set(os.listdir(tmp_path / "out"))
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = _numbers(tmp_path / "out")
    again = subprocess.run(_command(tmp_path / "runs", "--out", str(tmp_path / "out"), "--quiet"), capture_output=True)
    assert again.returncode == 0 and again.stdout == again.stderr == b""
    assert _numbers(tmp_path / "out") == before


STARTED = """
title = "Two agents from one start"
agents = ["reft", "nested-reft/uniform/token-is"]
seeds = [0]
threads = 1

[set]
iterations = 1
"evaluation.every" = 1
{common}

[start]
agent = "{agent}"
seed = 5
set = {{ iterations = 2, slots = {slots} }}
"""


def _started(folder, agent="reft", slots=4) -> str:
    common = "\n".join(
        f'"{name}" = {json.dumps(value)}'
        for name, value in SMALL.items()
        if name not in ("iterations", "evaluation.every")
    )
    (folder / "mine.toml").write_text(STARTED.format(agent=agent, slots=slots, common=common))
    return str(folder / "mine.toml")


def test_all_arms_start_from_the_model_of_one_run(tmp_path, capsys):
    runs = tmp_path / "runs"
    line = ["--preset", _started(tmp_path), "--runs", str(runs), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*line, "--dry-run"]) == 0 and not runs.exists()
    assert "3 runs" in capsys.readouterr().out  # two agents, and what they start from
    assert main(line) == 0
    results = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/result.json")}
    (start,) = [result for result in results.values() if result["seed"] == 5]
    assert len(results) == 3 and start["iterations"] == 2
    for result in results.values():
        if result is not start:
            assert result["right_before"] == start["right_after"]
            assert Path(result["policy"]) == runs / start["hash"] / "model"
    written = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    assert main(line) == 0  # everything is there already, the start included
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")} == written
    (group,) = json.loads((tmp_path / "out" / "results.json").read_text())["groups"]
    assert group["name"] == "tiny on MathReason-v0"
    assert (
        "All arms start from one run of reft on tiny (seed 5, 2 iterations" in (tmp_path / "out/report.md").read_text()
    )


def test_a_start_is_given_on_the_command_line(tmp_path):
    line = ["--agents", "reft", "--start", "sft", "--start-set", "iterations=3", "--set", "env.max_new_tokens=40"]
    (start,) = start_arms(grid_of(parser().parse_args([*line, "--set", "learning_rate=1e-5"]))).values()
    spec = start.specs[0]
    assert (spec.agent["id"], spec.iterations, spec.env["max_new_tokens"]) == ("sft", 3, 40)
    assert spec.agent["learning_rate"] != 1e-5  # what is set for the arms is not the start's
    changed = grid_of(parser().parse_args(["--preset", "smollm2", "--start-set", "problems=7"])).start
    assert changed.set["problems"] == "7" and changed.set["gradient_steps"] == 4


def test_a_start_that_fails_or_is_misspelt_is_told(tmp_path, capsys):
    assert main(["--preset", _started(tmp_path, agent="reff"), "--runs", str(tmp_path / "runs")]) == 2
    assert "did you mean 'reft'" in capsys.readouterr().err
    assert main(["--start-set", "problems=7", "--dry-run"]) == 2
    assert "--start-set problems=7 is of nothing" in capsys.readouterr().err
    assert main(["--start", "sft", "--start-set", "problms=7", "--dry-run"]) == 2
    assert "did you mean 'problems'" in capsys.readouterr().err
    broken = _started(tmp_path, slots=-1)
    assert main(["--preset", broken, "--runs", str(tmp_path / "runs"), "--quiet"]) == 2
    assert "slots=-1 must be from 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_comparison_goes_on_to_the_same_numbers(tmp_path, how):
    subprocess.run(_command(tmp_path / "whole", "--out", str(tmp_path / "a"), "--quiet"), check=True)
    process = subprocess.Popen(_command(tmp_path / "runs", "--quiet"), stderr=subprocess.PIPE, text=True)
    while not any(len(path.read_text().splitlines()) >= 2 for path in tmp_path.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate()
    if how != signal.SIGKILL:
        assert process.returncode == 130 and "goes on" in errors
    subprocess.run(_command(tmp_path / "runs", "--out", str(tmp_path / "b"), "--quiet"), check=True)
    assert _numbers(tmp_path / "a") == _numbers(tmp_path / "b")


@pytest.mark.slow
def test_default_settings_learn_and_a_random_reward_does_not(tmp_path):
    """The default comparison's settings: at least 15 points for each seed, and nothing from a coin."""
    line = ["--agents", "reft", "--control", "random-reward", "--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*line, "--quiet"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    reft, random_reward = results["groups"][0]["arms"]
    assert random_reward["label"] == "reft random reward"
    assert min(reft["gain_by_seed"]) >= 0.15
    # "Nothing" is within the interval: two runs of 256 questions tell five points from none no better than that.
    _, low, high = random_reward["gain"]
    assert low <= 0 <= high and max(random_reward["gain_by_seed"]) < min(reft["gain_by_seed"]) / 3
