"""Comparisons of what is there already: run folders, other trainers' outcomes, and what is wrong with either."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.compare import main
from benchmarks.comparison.arms import arms
from benchmarks.comparison.grid import Grid
from benchmarks.comparison.stored import read
from benchmarks.measuring.durable import json_text
from benchmarks.report.comparison import Comparison
from benchmarks.report.files import as_json, write
from registry import UsageError
from tests.oracles.finished_runs import finish

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
AGENTS = ("reft", "nested-reft/uniform/retrace")
SET = {"iterations": 4, "evaluation.every": 2, "evaluation.samples": 4}
NUMBERS = (
    "seeds",
    "before",
    "after",
    "gain",
    "iqm",
    "pass_at",
    "tokens_per_second",
    "seconds",
    "kl",
)


def finished(folder, seeds=(0, 1, 2, 3), controls=(), **settings):
    """Made-up runs in ``folder``, and what a comparison says of them."""
    grid = Grid(agents=AGENTS, seeds=seeds, set={**SET, "sampler.ratio": 0.25, **settings}, controls=controls)
    made = arms(grid)
    for arm in made:
        for spec in arm.specs:
            nested = arm.label == AGENTS[1]
            finish(spec, folder, 0.25, 0.75 if nested else 0.6, pace=2.0 if nested else 1.0)
    return Comparison.read(grid, made, folder, {}, "command")


def group(folder) -> dict:
    return json.loads((folder / "results.json").read_text())["groups"][0]


def test_outcomes_that_a_comparison_writes_give_its_figures_again(tmp_path):
    write(finished(tmp_path / "runs", controls=("fewer",)), tmp_path / "one")
    source = str(tmp_path / "one" / "outcomes.json")
    assert main(["--from", source, "--out", str(tmp_path / "two"), "--quiet"]) == 0
    names = {"report.html", "report.md", "results.json", "curves.png", "outcomes.json"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    one, two = group(tmp_path / "one"), group(tmp_path / "two")
    assert one["pairs"] == two["pairs"] and one["rivals"] == two["rivals"] and len(two["rivals"]) == 1
    assert (one["name"], one["baseline"], one["target"]) == (two["name"], two["baseline"], two["target"])
    for before, after in zip(one["arms"], two["arms"], strict=True):
        assert {name: before[name] for name in NUMBERS} == {name: after[name] for name in NUMBERS}
        assert before["seconds_to_target"] == after["seconds_to_target"] and all(before["seconds_to_target"])
    first, second = (json.loads((tmp_path / name / "outcomes.json").read_text()) for name in ("one", "two"))
    assert first == second and one["pairs"][0]["time_ratio"]["missing"] == ""


def cut_off(run, rows, tail=""):
    """What a run that was killed leaves: the first rows of its metrics, perhaps half of one more, and no result."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:rows]) + tail)
    (run / "result.json").unlink()


def test_runs_that_are_not_over_are_compared_by_what_they_have_done(tmp_path, capsys):
    compared = finished(tmp_path / "runs", seeds=(0, 1))
    (group_of_all,) = compared.groups
    hashes = [[run.result["hash"] for run in arm.runs] for arm in group_of_all.arms]
    cut_off(tmp_path / "runs" / hashes[0][0], 5)  # of 0, 1, 2, evaluation, 3, 4, evaluation: iteration 3
    cut_off(tmp_path / "runs" / hashes[0][1], 4, tail='{"iteration": 3, "tok')
    assert main(["--from", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "2 of 4 runs are not over (iteration 2 to 3)" in " ".join(capsys.readouterr().out.split())
    assert "not over (iteration 2 to 3)" in (tmp_path / "out" / "report.md").read_text()
    here = group(tmp_path / "out")
    whole = group_of_all.lines
    assert here["arms"][0]["after"][0] == pytest.approx(0.425, abs=0.02)  # half of the way from .25 to .6
    assert here["arms"][1]["after"][0] == pytest.approx(whole[1].after.value)
    assert here["pairs"][0]["iteration"]["budget"] == 2  # the last that all have reached
    again = ["--from", str(tmp_path / "out" / "outcomes.json"), "--out", str(tmp_path / "again"), "--quiet"]
    assert main(again) == 0 and group(tmp_path / "again")["arms"][0]["after"] == here["arms"][0]["after"]
    assert "2 of 4 runs are not over" in (tmp_path / "again" / "report.md").read_text()


def test_run_folders_are_compared_as_they_are(tmp_path):
    compared = finished(tmp_path / "runs")
    assert main(["--from", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert group(tmp_path / "out")["pairs"] == json.loads(json_text(as_json(compared)["groups"][0]["pairs"]))
    finish_other = finished(tmp_path / "more", learning_rate=1e-5)
    assert len(finish_other.groups[0].arms) == 2
    labels = [arm.label for arm in read([tmp_path / "runs", tmp_path / "more"]).arms]
    assert len(labels) == 4 and "reft learning_rate=1e-05" in labels


def test_arms_of_one_folder_stand_by_name_and_the_numbers_in_it(tmp_path):
    rates = (1e-3, 2e-5, 3e-4)
    for rate in rates:
        finished(tmp_path / "runs", learning_rate=rate)
    labels = [arm.label for arm in read([tmp_path / "runs"]).arms]
    assert [label for label in labels if label.startswith("reft")] == [
        f"reft learning_rate={rate}" for rate in sorted(rates)
    ]
    given = sorted(spec.parent for spec in (tmp_path / "runs").glob("*/spec.json"))[::-1]
    places = [min(given.index(tmp_path / "runs" / run.result["hash"]) for run in arm.runs) for arm in read(given).arms]
    assert places == sorted(places), "folders given one by one stay as they are"


def test_what_the_runs_started_from_is_no_arm_of_theirs(tmp_path):
    """A grid with a start keeps that run's folder beside the others."""
    finished(tmp_path / "runs", seeds=(0, 1))
    expected = [arm.label for arm in read([tmp_path / "runs"]).arms]
    folders = [spec.parent for spec in (tmp_path / "runs").glob("*/spec.json")]
    first = folders[0].name
    for folder in folders[1:]:
        fields = json.loads((folder / "spec.json").read_text())
        fields["policy"] = f"/elsewhere/runs/{first}/model"
        (folder / "spec.json").write_text(json.dumps(fields))
    arms = read([tmp_path / "runs"]).arms
    assert sum(len(arm.runs) for arm in arms) == len(folders) - 1
    assert {arm.label for arm in arms} <= set(expected)
    assert [len(arm.runs) for arm in read([tmp_path / "runs" / first]).arms] == [1], "asked for by name it is there"
    begun = read([tmp_path / "runs"]).task, read([tmp_path / "runs" / first]).task
    assert begun == ("model on MathReason-v0", "tiny on MathReason-v0"), (
        "of a folder that is elsewhere nothing is known"
    )
    for folder in folders[1:]:
        fields["policy"] = str(tmp_path / "runs" / first / "model")
        fields |= {name: json.loads((folder / "spec.json").read_text())[name] for name in ("agent", "seed")}
        (folder / "spec.json").write_text(json.dumps(fields))
    assert read([tmp_path / "runs"]).task == "tiny on MathReason-v0"


def test_a_baseline_is_named_by_what_its_label_begins_with(tmp_path):
    finished(tmp_path / "runs", seeds=(0, 1), controls=("random-reward",))
    stored = read([tmp_path / "runs"])
    labels = {arm.label for arm in stored.arms}
    assert {"reft env.reward=verified", "reft env.reward=random"} < labels
    for given in (None, "reft", "reft env.reward=verified"):
        compared = Comparison.of_stored(stored, "Comparison", given, 0.02, "command").groups[0]
        assert compared.baseline == "reft env.reward=verified"
    assert Comparison.of_stored(stored, "", "reft env.reward=random", 0.02, "").groups[0].baseline.endswith("random")
    finished(tmp_path / "more", seeds=(0, 1), learning_rate=1e-5)
    several = read([tmp_path / "runs", tmp_path / "more"])
    with pytest.raises(UsageError, match=r"is one of 'reft .*give that label whole"):
        Comparison.of_stored(several, "Comparison", "reft", 0.02, "command")
    with pytest.raises(UsageError, match="not compared"):
        Comparison.of_stored(several, "Comparison", "ref", 0.02, "command")


def write_outcomes(path, table: dict[str, list[list[float]]], **more) -> str:
    """Arms by their label, [S][Q] outcomes each, of one evaluation."""
    listed = [
        {"label": label, "runs": [{"seed": n, "evaluations": [{"outcomes": row}]} for n, row in enumerate(rows)]}
        for label, rows in table.items()
    ]
    path.write_text(json.dumps({"arms": listed, **more}))
    return str(path)


def test_outcomes_of_another_trainer_without_what_was_spent(tmp_path, capsys):
    """One seed: the paired t test of scipy."""
    rng = np.random.default_rng(0)
    theirs = rng.random(200)
    ours = np.clip(theirs + rng.normal(0.05, 0.1, 200), 0, 1)
    table = {"trl": [theirs.tolist()], "verl": [ours.tolist()]}
    source = write_outcomes(tmp_path / "theirs.json", table, task="gsm8k", baseline="trl")
    assert main(["--from", source, "--out", str(tmp_path / "out")]) == 0
    assert "verl is better than trl at the end" in " ".join(capsys.readouterr().out.split())
    one = group(tmp_path / "out")["pairs"][0]["end"]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval()
    assert one["difference"] == pytest.approx([np.mean(ours - theirs), low, high]) and one["budget"] is None
    report = (tmp_path / "out" / "report.md").read_text()
    assert "nan" not in report.lower() and "None" not in report


def test_questions_may_be_named_in_any_order(tmp_path):
    one = {"q1": 1, "q2": 0, "q3": 0.5}
    other = {"q3": 0.5, "q1": 1, "q2": 0}
    source = tmp_path / "named.json"
    write_outcomes(source, {"a": [one], "b": [other]})
    first, second = read([source]).arms
    assert first.ends(-1).tolist() == second.ends(-1).tolist() == [[1, 0, 0.5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": []}, "arms is empty"),
        ({"arm": []}, "did you mean 'arms'"),
        ({"baseline": "trll"}, "did you mean 'trl'"),
        ({"baseline": 3}, "baseline must be an arm's label"),
        ([], "must be an object"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, change, message):
    source = tmp_path / "theirs.json"
    write_outcomes(source, {"trl": [[1, 0]], "verl": [[0, 1]]})
    loaded = json.loads(source.read_text())
    source.write_text(json.dumps({**loaded, **change} if isinstance(change, dict) else change))
    with pytest.raises(UsageError, match=message) as raised:
        read([source])
    assert "theirs.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"evaluations": [{"outcomes": "01"}]}], r"runs\[0\] has no 'seed'"),
        ([{"seed": "0", "evaluations": [{"outcomes": "01"}]}], r"seed must be a whole number"),
        ([{"seed": 0, "evaluations": [{"outcomes": [0, 1.5]}]}], r"outcomes\[1\] is 1.5: it must lie from 0"),
        ([{"seed": 0, "evaluations": [{"outcomes": [0, None]}]}], r"outcomes\[1\] is None"),
        ([{"seed": 0, "evaluations": [{"outcomes": "02"}]}], "may hold 0 and 1 alone"),
        ([{"seed": 0, "evaluations": [{"outcomes": []}]}], "must be a list of numbers"),
        ([{"seed": 0, "evaluations": []}], "evaluations is empty"),
        ([{"seed": 0, "evaluations": [{"outcomes": "01"}, {"outcomes": "011"}]}], "the same questions in each"),
        ([{"seed": 0, "evaluations": [{"outcomes": {"a": 1}}, {"outcomes": {"b": 1}}]}], "question 'a' is not in all"),
        ([{"seed": 0, "evaluations": [{"outcomes": "01", "second": 1}]}], "did you mean 'seconds'"),
        (
            [{"seed": 0, "evaluations": [{"outcomes": "01", "seconds": 2}, {"outcomes": "01", "seconds": 1}]}],
            "seconds is 1: it must be a number, and not fall from 2",
        ),
        (
            [{"seed": 0, "evaluations": [{"outcomes": "01", "seconds": 2}, {"outcomes": "01", "seconds": 2}]}],
            "seconds is 2: it must rise",
        ),
        (
            [{"seed": 0, "evaluations": [{"outcomes": "01", "tokens": -1}]}],
            "tokens is -1: it must be a number, and not fall from 0",
        ),
        (
            [{"seed": 0, "evaluations": [{"outcomes": "01", "seconds": 2}, {"outcomes": "01"}]}],
            "first does: seconds",
        ),
        ([{"seed": 0, "evaluations": [{"outcomes": "01"}]}] * 2, "has seed 0 twice"),
        ([{"seed": 0, "evaluations": [{"outcomes": "011"}]}], "outcomes of 2 questions.*of 3"),
    ],
)
def test_what_is_wrong_in_a_run_is_named(tmp_path, runs, message):
    source = tmp_path / "theirs.json"
    other = {"label": "other", "runs": [{"seed": 0, "evaluations": [{"outcomes": "01"}]}]}
    source.write_text(json.dumps({"arms": [{"label": "one", "runs": runs}, other]}))
    with pytest.raises(UsageError, match=message) as raised:
        read([source])
    assert "theirs.json" in str(raised.value) and "\n" not in str(raised.value)


def test_an_iteration_of_stored_completions_costs_no_tokens(tmp_path):
    source = tmp_path / "theirs.json"
    spent = [{"tokens": 0, "seconds": 0}, {"tokens": 9, "seconds": 1}, {"tokens": 9, "seconds": 2}]
    right = ["01", "01", "11"]
    runs = [{"seed": 0, "evaluations": [{"outcomes": one, **at} for one, at in zip(right, spent, strict=True)]}]
    source.write_text(json.dumps({"arms": [{"label": "replay", "runs": runs}], "baseline": "replay"}))
    arms = read([source]).arms
    assert arms[0].runs[0].spent("tokens") == [0, 9, 9] and arms[0].runs[0].greedy == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("source", sorted(RESULTS.rglob("outcomes.json")), ids=lambda path: path.parent.name)
def test_committed_outcomes_are_read(source):
    """What a comparison has written another one takes."""
    stored, written = read([source]), json.loads(source.read_text())
    assert stored.baseline == written["baseline"]
    assert [(arm.label, list(arm.seeds)) for arm in stored.arms] == [
        (arm["label"], [run["seed"] for run in arm["runs"]]) for arm in written["arms"]
    ]


def test_bad_files_and_folders_exit_2(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    write_outcomes(tmp_path / "few.json", {"reft": [[1, 0], [0, 1]], "b": [[1, 1]]})
    write_outcomes(tmp_path / "other.json", {"c": [[1, 0]]}, task="svamp")
    write_outcomes(tmp_path / "another.json", {"d": [[1, 0]]}, task="gsm8k")
    unfinished = finished(tmp_path / "runs", seeds=(0,))
    folder = tmp_path / "runs" / unfinished.groups[0].arms[0].runs[0].result["hash"]
    (folder / "result.json").unlink()
    (folder / "metrics.jsonl").write_text("")
    finished(tmp_path / "mixed", seeds=(0,))
    finished(tmp_path / "mixed", seeds=(0,), **{"evaluation.problems": 7})
    for arguments, message in (
        (["broken.json"], "is not JSON"),
        (["nowhere.json"], "cannot be read"),
        (["empty"], "is no run folder"),
        (["runs"], "has not been evaluated yet: let the run go on, or move it elsewhere"),
        (["mixed"], "evaluation.problems is"),
        (["other.json", "another.json"], "one task at a time"),
        (["few.json"], "arm 'b' has no run of seed 1: add it or take those that all have, --seeds 0"),
        (["other.json"], "--baseline 'reft' is not compared"),
        (["few.json", "--agents", "reft"], "leave out --agents"),
    ):
        line = [str(tmp_path / arguments[0]), *(str(tmp_path / one) if "." in one else one for one in arguments[1:])]
        assert main(["--from", *line, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["--from", str(tmp_path / "few.json"), "--seeds", "1", "--out", str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.parametrize("count, panels", [(2, 1), (7, 2)])
def test_a_picture_has_room_for_the_names_of_its_arms(tmp_path, count, panels):
    names = [letter * 120 for letter in "abcdefg"[:count]]
    write_outcomes(tmp_path / "many.json", {name: [[1, 0, 1, 1], [0, 1, 0, 1]] for name in names})
    line = ["--from", str(tmp_path / "many.json"), "--baseline", names[0], "--out", str(tmp_path / "out"), "--quiet"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="constrained_layout")
        assert main(line) == 0
    width = int.from_bytes((tmp_path / "out" / "curves.png").read_bytes()[16:20], "big")
    assert width > 130 * (panels * 4.2 + 120 * 0.05)  # panels and a line of small letters, at 130 dots an inch


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"secnods": 5}, "did you mean 'seconds'"),
        ({"seconds": "61.5"}, ".result.seconds must be a number"),
        ({"policy": 5}, ".result.policy must be a text"),
        ({"hash": 5}, ".result.hash must be a text"),
        ({"means": {"kl_k1": "x"}}, ".result.means.kl_k1 must be a number"),
        ({"samples": 4}, "has no 'sampled_right_before'"),
        ({"samples": 4, "sampled_right_before": [5, 0], "sampled_right_after": [0, 0]}, "from 0 to 4"),
        ({"sets_before": {"x": {"greedy": 1}}}, ".sets_after has no 'x'"),
    ],
)
def test_a_result_that_no_report_can_take_is_named(tmp_path, capsys, result, words):
    run = {"seed": 0, "evaluations": [{"outcomes": "01"}], "result": result}
    (tmp_path / "theirs.json").write_text(json.dumps({"arms": [{"label": "reft", "runs": [run]}]}))
    assert main(["--from", str(tmp_path / "theirs.json"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "result",
    [{"seconds": 61.5}, {"seconds": 61.5, "cpu_seconds": 60}, {"means": None}, {"rollout_tokens_per_second": 9}],
)
def test_a_result_may_know_some_of_it(tmp_path, result):
    runs = [{"seed": n, "evaluations": [{"outcomes": "01"}], "result": known} for n, known in enumerate((result, {}))]
    (tmp_path / "theirs.json").write_text(json.dumps({"arms": [{"label": "reft", "runs": runs}]}))
    assert main(["--from", str(tmp_path / "theirs.json"), "--out", str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.parametrize("rivals", [[1], [["a"]], [["a", "a"]], [["a", "b", "a"]], [[["a"], "b"]]])
def test_rivals_are_pairs_of_labels(tmp_path, rivals):
    source = write_outcomes(tmp_path / "theirs.json", {"a": [[0, 1]], "b": [[1, 1]]}, rivals=rivals)
    with pytest.raises(UsageError, match=r"pairs of two arms' labels|is no arm's label"):
        read([Path(source)])
