"""Reports: sentences follow from intervals, numbers from runs, the page stands alone, damage is named."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison.arms import arms
from benchmarks.comparison.differences import Difference, NoPair, Pair, against
from benchmarks.comparison.grid import Grid
from benchmarks.comparison.outcomes import AXIS_WORDS, ArmLine, Outcome, describe, shared_axes
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.summary import summarise
from benchmarks.measuring.durable import json_text
from benchmarks.measuring.statistics import Interval
from benchmarks.report.comparison import Comparison, group_of
from benchmarks.report.files import as_json, write
from benchmarks.report.sections import report
from benchmarks.report.words import conclusion, summary
from registry import UsageError
from tests.oracles.finished_runs import QUESTIONS, finish

AGENTS = ("reft", "nested-reft/uniform/retrace", "nested-reft/uniform/none")
SET = {"iterations": 4, "evaluation.every": 2, "evaluation.samples": 4}
STORED = Path(__file__).parents[3] / "benchmarks" / "results"


def compared(tmp_path, last: dict[str, float], pace: dict[str, float] | None = None, seeds=(0, 1), failed=None):
    """A comparison of made-up runs whose arms end at ``last`` and run at ``pace``."""
    grid = Grid(title="A <title> & more", agents=AGENTS, seeds=seeds, set=SET)
    made = arms(grid)
    for arm in made:
        for spec in arm.specs:
            finish(spec, tmp_path, 0.25, last.get(arm.label, 0.5), (pace or {}).get(arm.label, 1.0))
    return Comparison.read(grid, made, tmp_path, failed or {}, "python -m benchmarks.compare")


def html(comparison: Comparison) -> str:
    return report(comparison).html()


def markdown(comparison: Comparison) -> str:
    return report(comparison).markdown()


def test_better_worse_and_not_distinguishable(tmp_path):
    found = compared(tmp_path, {"reft": 0.5, AGENTS[1]: 0.95, AGENTS[2]: 0.5})
    text = " ".join(summary(found))
    assert f"{AGENTS[1]} is better than reft at equal steps" in text
    assert f"{AGENTS[2]} is not distinguishable from reft at equal steps" in text  # the very same answers, but 40
    worse = " ".join(summary(compared(tmp_path / "worse", {"reft": 0.9, AGENTS[1]: 0.3})))
    assert f"{AGENTS[1]} is worse than reft at equal steps" in worse
    assert "reft gained +65.0 points" in worse


def difference(value: float, p: float, p_holm: float, p_equivalent: float) -> Difference:
    return Difference(1.0, Interval(value, value - 0.01, value + 0.01), p, p_holm, p_equivalent)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (difference(0.05, 0.001, 0.004, 0.9), "better than reft"),
        (difference(-0.05, 0.001, 0.004, 0.9), "worse than reft"),
        (difference(0.05, 0.03, 0.12, 0.9), "better than reft, taken alone but not among 4 arms (Holm),"),
        (difference(0.01, 0.001, 0.004, 0.01), "better than reft by less than 2 points"),
        (difference(0.0, 0.9, 1.0, 0.01), "equivalent to reft within 2 points"),
        (difference(0.01, 0.4, 1.0, 0.2), "not distinguishable from reft"),
    ],
)
def test_what_is_concluded_of_p_values(one, said):
    assert conclusion(one, "reft", 0.02, 4) == said


def test_verdicts_allow_for_the_number_of_arms(tmp_path):
    """Holm by hand over the two pairs, in the table, in results.json and with the margin that was asked for."""
    found = compared(tmp_path, {"reft": 0.5, AGENTS[1]: 0.6, AGENTS[2]: 0.55}, seeds=range(5))
    pairs = found.groups[0].pairs
    small, large = sorted(pair.at_equal["tokens"].p for pair in pairs)
    assert sorted(pair.at_equal["tokens"].p_holm for pair in pairs) == [2 * small, max(2 * small, large)]
    text = markdown(found)
    assert "What may be concluded against reft" in text and "p among 2" in text and "within 2 points" in text
    stored = as_json(found)["groups"][0]
    assert stored["margin"] == 0.02
    for pair in stored["pairs"]:
        one = pair["tokens"]
        assert one["verdict"] == ("better" if one["p"] < 0.05 else "not distinguishable")
        assert one["verdict_holm"] == ("better" if one["p_holm"] < 0.05 else "not distinguishable")
        assert one["equivalent"] == (one["p_equivalent"] < 0.05)
    grid = Grid(agents=AGENTS, seeds=range(5), set=SET, margin=20.0)
    wide = Comparison.read(grid, arms(grid), tmp_path, {}, "command")
    assert all(pair.at_equal["tokens"].equivalent for pair in wide.groups[0].pairs)


def test_runs_with_nothing_to_learn_from_are_named_with_the_cause(tmp_path):
    found = compared(tmp_path, {})
    assert "nothing to learn from" not in " ".join(summary(found))
    for row in found.groups[0].arms[1].runs[1].training[1:]:
        row |= {"sequences_used": 0.0, "rollout_accuracy": 0.0, "finish/length": 1.0, "mean_length": 2.0}
    said = [line for line in summary(found) if "nothing to learn from" in line]
    assert len(said) == 1 and "max_new_tokens" in said[0]
    assert "in 1 of 2 runs (seed 1: iterations 2 to 4 of 4" in said[0]


def test_no_gain_is_not_called_one(tmp_path):
    text = " ".join(summary(compared(tmp_path, dict.fromkeys(AGENTS, 0.25))))
    assert "reft did not measurably change" in text and " gained " not in text


@pytest.mark.parametrize("last", [0.1, 0.25, 0.5])
def test_times_are_taken_to_what_the_baseline_gained(tmp_path, last):
    """Where it lost, all arms had its accuracy from the start."""
    found = compared(tmp_path, dict.fromkeys(AGENTS, last)).groups[0]
    assert (found.target is not None) == (last > 0.25)
    assert all(bool(line.seconds_to_target) == (last > 0.25) for line in found.lines)


def test_few_seeds_are_said(tmp_path):
    assert "There is one seed" in " ".join(summary(compared(tmp_path, {}, seeds=(0,))))
    assert "2 seeds say little" in " ".join(summary(compared(tmp_path, {})))
    assert "say little" not in " ".join(summary(compared(tmp_path, {}, seeds=range(5))))


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ((5, 1, 5), f"There is one seed of {AGENTS[1]}: "),
        ((5, 5, 2), f"2 seeds of {AGENTS[2]} say little"),
        ((1, 5, 1), f"There is one seed of reft and of {AGENTS[2]}: "),
        ((5, (0, 1, 2, 3), 5), None),
        (((0, 1, 2, 3), (3, 4, 5, 6), 7), f"There is one seed of {AGENTS[1]} against reft: "),
    ],
)
def test_few_seeds_of_one_arm_are_said(tmp_path, kept, said):
    """Runs that failed leave an arm with fewer than others have."""
    found = compared(tmp_path, {}, seeds=range(7)).groups[0]
    parts = [arm.of(range(one) if isinstance(one, int) else one) for arm, one in zip(found.arms, kept, strict=True)]
    group = group_of(found.name, parts, parts[0], [], 0.02)
    cautions = [line for line in summary(Comparison("", "", (group,), (), "")) if "of how runs differ" in line]
    assert len(cautions) == (said is not None) and all(line.startswith(said) for line in cautions)


def test_a_busy_machine_is_said(tmp_path):
    found = compared(tmp_path, {})
    assert "busy" not in " ".join(summary(found))
    found.groups[0].arms[0].runs[0].result["cpu_seconds"] /= 2
    assert "The machine was busy: runs had 48.4 % to 96.8 % of a processor" in " ".join(summary(found))


def test_runs_of_two_versions_are_said(tmp_path):
    found = compared(tmp_path, {})
    assert "versions of the code" not in " ".join(summary(found))
    found.groups[0].arms[0].runs[0].provenance["commit"] = "def"
    assert "2 versions of the code (abc, def)" in " ".join(summary(found))


def test_numbers_follow_from_the_runs(tmp_path):
    found = compared(tmp_path, {"reft": 0.75})
    arm = found.groups[0].arms[0]
    line = describe(arm, target=0.5)
    right = np.array([[bit == "1" for bit in run.result["right_after"]] for run in arm.runs])
    assert right.shape == (2, QUESTIONS) and line.after.value == right.mean() == 0.75
    assert line.gain.value == pytest.approx(0.5) and line.seeds == [0, 1]
    assert line.seconds_to_target == pytest.approx([3.2, 3.2])  # half of 4 iterations of 1.6 s
    assert line.pass_at[4] == (0.25, 0.75)
    assert (line.kl, line.ess, line.layers_kept) == (0.0, 1.0, [4])


def test_gains_and_differences_are_of_what_is_possible(tmp_path):
    """Two seeds that end far apart: t(1) alone would reach beyond a hundred points."""
    low, high = (compared(tmp_path / str(last), {AGENTS[1]: last}).groups[0].arms for last in (0.25, 1.0))
    apart = replace(low[1], runs=(low[1].runs[0], high[1].runs[1]))
    assert describe(apart, None).gain[1:] == (-1, 1)
    assert all(one.difference[1:] == (-1, 1) for one in against(apart, low[0]).at_equal.values())


def test_cost_shares_are_shown_apart(tmp_path):
    found = compared(tmp_path, {"reft": 0.75})
    parts = found.groups[0].lines[0].parts
    assert parts == pytest.approx({"rollout": 3.6, "reward": 0.4, "update": 2.0, "evaluation": 6.0})  # 4 iterations
    assert "| 56/6/31 |" in markdown(found) and "reward" in html(found)


def test_what_the_target_s_layers_wrote_is_an_axis_where_it_differs_from_tokens(tmp_path):
    """An arm that skips a quarter of the layers has spent less at the end than the baseline at its end."""
    found = compared(tmp_path, {"reft": 0.75, AGENTS[1]: 0.75})
    pair = next(pair for pair in found.groups[0].pairs if pair.label == AGENTS[1])
    assert pair.at_equal["tokens"].difference.value == 0
    assert pair.at_equal["target_tokens"].budget == 300 and pair.at_equal["target_tokens"].difference.value == 0.125
    assert "equal target-model tokens" in markdown(found) and "target-model tokens" in html(found)
    nested = [arm for arm in found.groups[0].arms if arm.label in AGENTS[1:]]
    assert shared_axes(nested) == ("iteration", "tokens", "target_tokens", "seconds")
    assert shared_axes(found.groups[0].arms[:1]) == ("iteration", "tokens", "seconds")
    for row in nested[0].runs[0].training:
        del row["target_tokens"]
    old = summarise(resolve(AGENTS[1], settings=SET), nested[0].runs[0].rows)
    assert all("target_tokens" not in point and "tokens" in point for point in old["curve"])


def test_equal_budgets_are_the_largest_common_ones(tmp_path):
    """An arm of twice the pace is compared, at equal wall-clock, with the baseline's half-way accuracy."""
    found = compared(tmp_path, {"reft": 0.75, AGENTS[1]: 0.75}, pace={AGENTS[1]: 2.0})
    pair = next(pair for pair in found.groups[0].pairs if pair.label == AGENTS[1])
    assert pair.at_equal["iteration"].difference.value == 0 and pair.at_equal["tokens"].difference.value == 0
    assert pair.at_equal["seconds"].budget == pytest.approx(3.2)
    assert pair.at_equal["seconds"].difference.value == pytest.approx(0.25)
    assert pair.speed_up == pytest.approx(2.0) and pair.speed_up_rollout == pytest.approx(2.0)
    assert pair.probability_of_improvement == 0.5
    assert pair.time_ratio.ratio.value == pytest.approx(0.5) and pair.time_ratio.missing == "few seeds"
    assert "| 2.00x | 2.00x | 0.50 |" in markdown(found)
    four = compared(tmp_path / "four", {"reft": 0.75, AGENTS[1]: 0.75}, pace={AGENTS[1]: 2.0}, seeds=range(4))
    assert "Its time to 62.5 % is 0.50 [0.50, 0.50] of reft's." in " ".join(summary(four))


def test_a_nested_arm_meets_its_rival_of_fewer_completions(tmp_path):
    grid = Grid(
        agents=AGENTS[:2], seeds=(0, 1), set={**SET, "sampler.ratio": 0.25}, controls=("fewer", "random-reward")
    )
    made = arms(grid)
    labels = [*AGENTS[:2], rival := "reft 6 of 8 completions", "reft random reward"]
    assert [arm.label for arm in made] == labels
    for arm in made:
        for spec in arm.specs:
            finish(spec, tmp_path, 0.25, 0.95 if arm.label == AGENTS[1] else 0.5)
    found = Comparison.read(grid, made, tmp_path, {}, "command")
    (pair,) = found.groups[0].rivals
    assert (pair.label, pair.baseline) == (AGENTS[1], rival) and pair.at_equal["seconds"].difference.low > 0
    assert f"{AGENTS[1]} is better than {rival} at equal steps" in " ".join(summary(found))
    assert f"{AGENTS[1]} against {rival}" in markdown(found) and f"{AGENTS[1]} against {rival}" in html(found)


def test_a_control_does_not_stand_in_for_a_baseline_without_runs(tmp_path):
    grid = Grid(agents=AGENTS[:2], seeds=(0,), set=SET, controls=("random-reward",))
    compared = arms(grid)
    for arm in compared[1:]:
        finish(arm.specs[0], tmp_path)
    (group,) = Comparison.read(grid, compared, tmp_path, {}, "command").groups
    assert [arm.label for arm in group.arms] == [AGENTS[1], "reft random reward"]
    assert group.baseline is None and group.pairs == ()


def test_only_common_seeds_are_paired(tmp_path):
    found = compared(tmp_path, {"reft": 0.75})
    one, two = found.groups[0].arms[:2]
    assert against(two.of([0]), one).seeds == [0]
    assert against(two.of([0]), one.of([1])) == NoPair(two.label, one.label)


def test_failed_and_damaged_runs_are_reported_and_left_out(tmp_path):
    grid = Grid(agents=AGENTS, seeds=(0, 1), set=SET)
    made = arms(grid)
    folders = [finish(spec, tmp_path) for arm in made for spec in arm.specs]
    lines = (folders[2] / "metrics.jsonl").read_text().splitlines()
    (folders[2] / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    (folders[3] / "result.json").unlink()
    (folders[4] / "result.json").write_text("{")
    found = Comparison.read(grid, made, tmp_path, {folders[5].name: "out of memory"}, "command")
    assert [arm.label for arm in found.groups[0].arms] == ["reft"]
    errors = [failure.error for failure in found.failures]
    assert "line 4 of metrics.jsonl is damaged" in errors[0] and "has no result.json: finish the run" in errors[1]
    assert "result.json is damaged" in errors[2] and errors[3] == "out of memory"
    page, text = html(found), markdown(found)
    assert "Failed runs" in page and "out of memory" in page and "out of memory" in text


def test_lost_rows_are_damage(tmp_path):
    folder = finish(arms(Grid(set=SET))[0].specs[0], tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UsageError, match="has lost rows"):
        Outcome.read(folder)


class Page(HTMLParser):
    """Checks nesting and collects what would be fetched."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#" and v != "data:,"
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone_and_escapes(tmp_path):
    page = Page(text := html(compared(tmp_path, {"reft": 0.75})))
    assert page.open == [] and page.fetched == []
    assert not re.search(r"url\((?!#|&quot;#|\"#)", text)
    assert "A &lt;title&gt; &amp; more" in text and "<b>&</b>" not in text
    for heading in ("Learning curves", "Against reft", "Correction weights", "Skipped layers", "Completions"):
        assert heading in text
    assert "Failed runs" not in text and "Further problem sets" not in text  # there are none
    assert "width=device-width" in text and "python -m benchmarks.compare" in text


def test_files_are_written_and_repeat_bit_for_bit(tmp_path):
    found = compared(tmp_path / "runs", {"reft": 0.75})
    for out in ("a", "b"):
        write(found, tmp_path / out)
    for name in ("report.html", "report.md", "results.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["groups"][0]["arms"][0]["after"][0] == 0.75
    assert len(results["groups"][0]["arms"][0]["runs"]) == 2


def test_results_json_says_what_it_always_said(tmp_path):
    """Every key and every number of made-up runs, to 12 digits, as when the reports in results/ were made."""
    grid = Grid(agents=AGENTS[:2], seeds=(0, 1), set={**SET, "sampler.ratio": 0.25}, controls=("fewer",))
    compared = arms(grid)
    for arm, last in zip(compared, (0.75, 0.95, 0.5), strict=True):
        for spec in arm.specs:
            finish(spec, tmp_path, 0.25, last, pace=2.0 if last == 0.95 else 1.0)
    text = json_text(as_json(Comparison.read(grid, compared, tmp_path, {}, "command"))["groups"][0])
    group, before = (
        json.loads(one, parse_float=lambda digits: float(f"{float(digits):.12g}"))
        for one in (text, (Path(__file__).parent / "group.json").read_text())
    )
    for arm in group["arms"]:
        assert len(arm.pop("runs")) == 2
    assert group == before


@pytest.mark.parametrize("stored", sorted(STORED.glob("**/results.json")), ids=lambda path: path.parent.name)
def test_committed_results_have_the_fields_of_the_dataclasses(stored):
    """Older ones may lack what was not yet measured, and have nothing else."""
    pair_fields = {field.name for field in fields(Pair)} - {"at_equal"}
    for group in json.loads(stored.read_text())["groups"]:
        for line in group["arms"]:
            assert {field.name for field in fields(ArmLine)} - {"seconds_reward"} <= set(line) - {"runs"}
            assert set(line) - {"runs"} <= {field.name for field in fields(ArmLine)}
        for pair in (*group["pairs"], *group.get("rivals", ())):
            axes = [axis for axis in AXIS_WORDS if axis in pair]
            assert set(pair) | {"time_ratio", "baseline"} >= pair_fields >= set(pair) - set(axes)
            assert axes and all({"budget", "difference"} <= set(pair[axis]) for axis in axes)


def test_markdown_tables_have_one_width(tmp_path):
    lines = markdown(compared(tmp_path, {"reft": 0.75})).splitlines()
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert tables and "reft" in "\n".join(lines)
    for one, two in pairwise(lines):
        if one.startswith("|") and two.startswith("|"):
            assert one.count("|") == two.count("|") or set(two) <= set("|-: ")


def test_tensorboard_logs_hold_the_rows(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from benchmarks.tensorboard import main

    folder = finish(arms(Grid(set=SET))[0].specs[0], tmp_path / "runs", 0.25, 0.75)
    for _ in range(2):  # of a running run, and later again: each point once
        assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "logs")]) == 0
    log = EventAccumulator(capsys.readouterr().out.splitlines()[-1])
    log.Reload()
    assert folder.name in str(log.path)
    assert [(event.step, event.value) for event in log.Scalars("evaluation/greedy")] == [
        (0, 0.25),
        (200, 0.5),
        (400, 0.75),
    ]
    assert len(log.Scalars("train/kl_k1")) == 4
    (tmp_path / "nothing").mkdir()
    assert main([str(tmp_path / "nothing")]) == 2 and "holds no run" in capsys.readouterr().err


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def test_results_are_strict_json_and_what_is_undefined_is_a_dash(tmp_path):
    """Nobody gains: there is no accuracy to take times to."""
    found = compared(tmp_path / "runs", dict.fromkeys(AGENTS, 0.25))
    assert np.isnan(found.groups[0].pairs[0].time_ratio.ratio.value)
    write(found, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse_constant)
    nothing = {"ratio": [None, None, None], "target": None, "missing": "no gain"}
    assert stored["groups"][0]["pairs"][0]["time_ratio"] == nothing
    assert "never [" not in markdown(found) and "nan" not in markdown(found).lower()


@pytest.mark.parametrize("stored", sorted(STORED.glob("**/*.json")), ids=lambda path: path.parent.name)
def test_committed_json_is_strict(stored):
    json.loads(stored.read_text(), parse_constant=refuse_constant)
