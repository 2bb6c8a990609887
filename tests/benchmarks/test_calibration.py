"""The intervals and tests of comparisons hold what they say, on simulated outcomes whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.calibration import (
    CELLS,
    MARGIN,
    SHAPES,
    Cell,
    arm_curves,
    family_errors,
    main,
    measure,
    satterthwaite,
    times_apart,
)
from benchmarks.measuring.statistics import MeanSquares

SEED_EFFECTS = (0.0, 0.01, 0.03)


def test_the_simulated_truth_is_what_it_says():
    """Means and seed effects of many questions, against the probit formula's promise."""
    rng = np.random.default_rng(0)
    [table] = Cell(400, 2000, seed_sd=0.03, effect=0.05, accuracy=0.6).differences(rng)
    assert table.mean() == pytest.approx(0.05, abs=0.015)
    assert table.mean(1).std(ddof=1) == pytest.approx(np.sqrt(0.03**2 + table.var() / 2000), rel=0.15)
    [shares] = Cell(3, 4000, completions=4).differences(rng)
    assert set(np.unique(4 * shares)) <= set(range(-4, 5)) and len(np.unique(shares)) > 5


def test_satterthwaite_of_the_seeds_alone_is_their_number():
    assert satterthwaite(MeanSquares(1.0, 0.0, 0.0), 5, 100) == pytest.approx(4)
    assert satterthwaite(MeanSquares(1.0, 1.0, 1.0), 5, 100) == pytest.approx(1 / (1 / 4 + 1 / 99 + 1 / 396))


@pytest.mark.parametrize("seed_sd", SEED_EFFECTS)
@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_intervals_hold_the_truth(seeds, seed_sd):
    """In the bands that are asked for, but for what so few repeats may miss."""
    measured = measure(Cell(seeds, 100, seed_sd, effect=0.03), repeats=600)
    assert measured.coverage > stats.binom.ppf(0.001, 600, 0.90 if seeds == 2 else 0.93) / 600
    if seeds > 2:
        assert measured.coverage < stats.binom.ppf(0.999, 600, 0.97) / 600
        assert measured.half / measured.best < 1.25  # 1.15, and what 600 repeats may miss


def test_time_ratio_of_equal_arms_is_rarely_called_apart():
    false, missing = times_apart("flattens", 5, 0.011, 1.0, repeats=120)
    assert false <= stats.binom.ppf(0.999, 120, 0.05) / 120 and missing < 0.1
    right, _ = times_apart("flattens", 8, 0.011, 1.5, repeats=30)
    assert right > 0.9


def test_curves_of_a_faster_arm_are_the_same_sooner():
    for shape in SHAPES:
        slow, fast = (arm_curves(shape, 2, 0.01, speed, np.random.default_rng(1)) for speed in (1.0, 2.0))
        for (spent, accuracy), (sooner, same) in zip(slow, fast, strict=True):
            assert np.array(spent) == pytest.approx(2 * np.array(sooner)) and accuracy == same


def test_holm_keeps_false_claims_rare():
    alone, corrected = family_errors(Cell(8, 100, 0.01), arms=10, repeats=150)
    assert alone > 0.15 and corrected <= stats.binom.ppf(0.999, 150, 0.05) / 150


def test_equivalence_is_false_in_few_at_the_margin_and_found_at_zero():
    at_margin = measure(Cell(8, 1000, effect=MARGIN, taste=0.0), repeats=150)
    assert at_margin.equivalent <= stats.binom.ppf(0.999, 150, 0.05) / 150
    assert measure(Cell(8, 1000, taste=0.0), repeats=60).equivalent > 0.6


def test_the_command_writes_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.calibration.CELLS", CELLS[:2])
    monkeypatch.setattr("benchmarks.calibration.TIMES", [("flattens", 4, 0.011)])
    monkeypatch.setattr("benchmarks.calibration.FAMILIES", [(Cell(3, 20), 2)])
    monkeypatch.setattr("benchmarks.calibration.EQUIVALENCES", [Cell(3, 20)])
    assert main(["--repeats", "8", "--jobs", "1", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n## ") == 4 and text.count("\n| greedy | 2 | 100 |") == 2


@pytest.mark.slow
def test_every_cell_of_the_table_holds():
    """.93 to .97 from three seeds on, .90 with two, at no more than 1.15 times the best width."""
    for cell in CELLS:
        measured = measure(replace(cell, effect=0.02), repeats=2000, seed=1)
        assert measured.coverage > (0.90 if cell.seeds == 2 else 0.93) - 0.012, cell
        if cell.seeds > 2:
            assert measured.coverage < 0.97 + 0.012, cell
            assert measured.half / measured.best < 1.15 + 0.05, cell  # the best is known to 2 % of itself
