"""Early signs: thresholds of some runs, judged on others, from the files that runs leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.comparison.signs import Early, judge
from benchmarks.early_signs import main
from benchmarks.experiment.resolve import resolve
from registry import UsageError
from tests.oracles.finished_runs import finish

SET = {"iterations": 4, "evaluation.every": 2, "evaluation.samples": 4}
NESTED = "nested-reft/uniform/none"


def runs(values: list[tuple[float, float]], fitted: bool) -> list[Early]:
    """By D and the share of the gain; the overlap says nothing, the effective sample size what D says."""
    return [
        Early(f"arm {n}", 0, fitted, share, {"D": d, "ess_sequence": 1 / (1 + d), "overlap_q05": 0.5})
        for n, (d, share) in enumerate(values)
    ]


def test_a_sign_that_orders_runs_has_an_area_of_one_and_one_that_says_nothing_a_half() -> None:
    signs = judge(runs([(0.1, 1.0), (0.4, 0.9), (2.0, 0.3), (3.0, 0.1)], True) + runs([(0.2, 1.0), (2.5, 0.2)], False))
    assert [sign.metric for sign in signs] == ["D", "ess_sequence", "overlap_q05"]
    assert [sign.auc for sign in signs] == [(1.0, 1.0), (1.0, 1.0), (0.5, 0.5)]
    assert signs[0].threshold == pytest.approx(1.2)  # midway between .4 and 2
    assert signs[1].threshold == pytest.approx((1 / 1.4 + 1 / 3) / 2)
    assert signs[0].right == signs[1].right == (1.0, 1.0)


def test_runs_that_did_not_make_the_threshold_may_be_on_its_wrong_side() -> None:
    fitted = runs([(0.1, 1.0), (2.0, 0.3)], True)
    (sign, *_) = judge(fitted + runs([(0.2, 0.1), (3.0, 1.0), (4.0, 0.2), (0.3, 0.9)], False))
    assert sign.auc == (1.0, 0.5) and sign.right == (1.0, 0.5)
    assert judge(fitted)[0].auc == (1.0, None)


def test_a_threshold_needs_runs_of_both_kinds() -> None:
    with pytest.raises(UsageError, match="of the 2 runs that --fit chooses 0 collapse"):
        judge(runs([(0.1, 1.0), (0.4, 0.9)], True) + runs([(3.0, 0.0)], False))


def finished(place: Path, agent: str, seed: int, last: float, d: float, **settings: float) -> None:
    spec = resolve(agent, settings={**SET, **settings}, seed=seed)
    folder = finish(spec, place, 0.25, last)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "D" in row:
            row["D"] = d if row["iteration"] <= 3 else 99.0  # what comes later is not read
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_command_reads_what_runs_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, told, picture = tmp_path / "runs", tmp_path / "signs.json", tmp_path / "signs.png"
    for seed in (0, 1):
        finished(place, "reft", seed, 0.75, 0.0)
        finished(place, NESTED, seed, 0.75, 0.3, **{"sampler.ratio": 0.2})
        finished(place, NESTED, seed, 0.3, 4.0, **{"sampler.ratio": 0.6})
        finished(place, "nested-reft/even/none", seed, 0.25, 3.0)
    line = [str(place), "--json", str(told), "--picture", str(picture)]
    assert main(line) == 0
    said = json.loads(told.read_text())
    first = said["signs"][0]
    assert first["metric"] == "D" and first["threshold"] == pytest.approx((0.3 + 4) / 2)
    assert first["auc"] == [1.0, None] and first["right"] == [1.0, 1.0]
    shares = {(run["arm"], run["seed"]): run["share"] for run in said["runs"]}
    assert sorted(shares.values()) == pytest.approx([0, 0, 0.1, 0.1, 1, 1]) and len(shares) == 6
    assert picture.stat().st_size > 1000 and "D (KL of a completion)" in capsys.readouterr().out
    assert main([*line, "--baseline", "refd"]) == 2 and "did you mean 'reft'" in capsys.readouterr().err
    assert main([*line, "--iterations", "0"]) == 2
    assert main([*line, "--fit", "nested-reft/even/*"]) == 2 and "2 collapse" in capsys.readouterr().err
