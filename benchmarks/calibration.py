"""Simulates whether the statistics of comparisons hold what they say: ``python -m benchmarks.calibration --out DIR``.

Intervals: two arms answer Q questions with S seeds. A model of arm a and seed s is right on question q where

    ability_a + seed_as + difficulty_q + taste_aq + luck_asq > 0,

all of them normal, luck with variance 1 (drawn anew for each of k sampled completions). So answers are binary, some
questions are hard for all, and the true difference is known: an accuracy is Phi(ability / sqrt(1 + the variances)).

Times: learning curves of runs, in three shapes, whose paces, progress and evaluations vary from run to run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.measuring.durable import storage_errors, write_whole
from benchmarks.measuring.provenance import command_line
from benchmarks.measuring.statistics import (
    SIGNIFICANCE,
    Curve,
    MeanSquares,
    holm,
    mean_estimate,
    mean_squares,
    time_ratio,
)
from benchmarks.measuring.table import Table
from registry.command import command
from registry.paths import WriteFolder

Array = NDArray[np.float64]
MARGIN = 0.02
ALIKE = (
    "Outcomes that do not differ at all are no certainty: their error is of the exact binomial bound on what so many "
    "questions would miss (Clopper and Pearson 1934; the rule of three), so that equivalence within 2 points takes 153 "
    "questions at least."
)


@dataclass(frozen=True)
class Cell:
    """One setting of simulated comparisons.

    Attributes:
        seeds, questions: S and Q.
        seed_sd: of the difference of the arms' accuracies between pairs of seeds, 0 to 1.
        completions: k, sampled a question; 1 for greedy accuracy.
        effect: true difference of the arms' accuracies.
        taste: standard deviation of what an arm finds easier or harder than the other arm does, against luck's 1.
        difficulty: standard deviation of the questions' difficulties, against luck's 1.
        accuracy: of their arm.
    """

    seeds: int
    questions: int
    seed_sd: float = 0.0
    completions: int = 1
    effect: float = 0.0
    taste: float = 0.5
    difficulty: float = 2.0
    accuracy: float = 0.65

    def differences(self, rng: np.random.Generator, arms: int = 1) -> Array:
        """[arms, S, Q] paired differences of the outcomes of some arms from a baseline's."""
        shape = (self.seeds, self.questions)
        level = np.sqrt(1 + self.difficulty**2 + self.taste**2)
        # A shift of the seed moves the accuracy by this much; each arm has half of the variance.
        slope = stats.norm.pdf(stats.norm.ppf(self.accuracy)) / level
        seed_sd = self.seed_sd / np.sqrt(2) / slope
        hard = self.difficulty * rng.standard_normal(self.questions)
        outcomes = []
        for accuracy in (self.accuracy, *(self.accuracy + self.effect for _ in range(arms))):
            ability = stats.norm.ppf(accuracy) * np.sqrt(level**2 + seed_sd**2)
            score = ability + hard + self.taste * rng.standard_normal(self.questions)
            score = score + seed_sd * rng.standard_normal((self.seeds, 1))
            right = score + rng.standard_normal((self.completions, *shape)) > 0
            outcomes.append(right.mean(0))
        return np.stack(outcomes[1:]) - outcomes[0]


@dataclass(frozen=True)
class Measured:
    """What a cell's intervals did.

    Attributes:
        cell: the setting.
        coverage: share of the 95 % intervals that hold the true difference.
        half: their mean half-width.
        best: half-width of an interval that knows the variance of the mean, and has the degrees of freedom that the
            unbiased estimate of that variance has (Satterthwaite's, of the expected mean squares).
        known: half-width of an interval that is told this variance and need not estimate it.
        equivalent: share that is called equivalent within ``MARGIN``.
    """

    cell: Cell
    coverage: float
    half: float
    best: float
    known: float
    equivalent: float


def measure(cell: Cell, repeats: int, seed: int = 0) -> Measured:
    """Simulate ``repeats`` comparisons of a cell."""
    rng = np.random.default_rng([seed, cell.seeds, cell.questions])
    estimates, squares = [], []
    for _ in range(repeats):
        [table] = cell.differences(rng)
        estimates.append(mean_estimate(table))
        squares.append(mean_squares(table))
    intervals = [one.interval() for one in estimates]
    deviation = float(np.std([one.mean for one in estimates]))
    expected = MeanSquares(*np.mean(squares, axis=0).tolist())
    return Measured(
        cell,
        coverage=float(np.mean([low <= cell.effect <= high for _, low, high in intervals])),
        half=float(np.mean([(high - low) / 2 for _, low, high in intervals])),
        best=float(stats.t.ppf(0.975, satterthwaite(expected, cell.seeds, cell.questions)) * deviation),
        known=float(stats.norm.ppf(0.975) * deviation),
        equivalent=float(np.mean([one.p_equivalent(MARGIN) < SIGNIFICANCE for one in estimates])),
    )


def satterthwaite(squares: MeanSquares, seeds: int, questions: int) -> float:
    """Degrees of freedom of MS_s + MS_q - MS_rest."""
    known_to = (seeds - 1, questions - 1, (seeds - 1) * (questions - 1))
    total = squares.seeds + squares.questions - squares.rest
    return total**2 / sum(square**2 / df for square, df in zip(squares, known_to, strict=True))


def family_errors(cell: Cell, arms: int, repeats: int, seed: int = 0) -> tuple[float, float]:
    """Share of comparisons of equal arms in which some arm is called better or worse: each alone, and by Holm."""
    rng = np.random.default_rng([seed, arms])
    alone = corrected = 0
    for _ in range(repeats):
        p_values = [mean_estimate(table).p_different for table in cell.differences(rng, arms)]
        alone += min(p_values) < SIGNIFICANCE
        corrected += min(holm(p_values)) < SIGNIFICANCE
    return alone / repeats, corrected / repeats


# Progress, 0 to 1, to the gain in the end: what a run has after a share of its budget, in three shapes.
SHAPES: dict[str, Callable[[Array], Array]] = {
    "flattens": lambda x: 1 - np.exp(-4 * x),
    "still rises": lambda x: x**0.8,
    "starts late": lambda x: 1 / (1 + np.exp(-10 * (x - 0.5))),
}


def arm_curves(shape: str, seeds: int, noise: float, speed: float, rng: np.random.Generator) -> list[Curve]:
    """Runs of nine evaluations that gain 40 points: paces and progress vary by 8 % between runs, evaluations by
    ``noise``."""
    share = np.linspace(0, 1, 9)
    curves = []
    for pace, progress in np.exp(0.08 * rng.standard_normal((seeds, 2))):
        accuracy = 0.33 + 0.4 * SHAPES[shape](share * progress)
        accuracy[1:] += noise * rng.standard_normal(8)
        curves.append(((share * pace / speed).tolist(), accuracy.tolist()))
    return curves


def times_apart(shape: str, seeds: int, noise: float, speed: float, repeats: int, seed: int = 0) -> tuple[float, float]:
    """Shares of comparisons whose interval of the time ratio excludes 1, and that have no interval."""
    rng = np.random.default_rng([seed, seeds])
    apart = none = 0
    for _ in range(repeats):
        ours, theirs = (arm_curves(shape, seeds, noise, pace, rng) for pace in (speed, 1.0))
        measured = time_ratio(ours, theirs)
        none += bool(measured.missing)
        apart += not measured.missing and not measured.ratio.low <= 1 <= measured.ratio.high
    return apart / repeats, none / repeats


CELLS = [
    Cell(seeds, questions, seed_sd, completions)
    for completions, seeds, questions, seed_sd in product((1, 4), (2, 3, 5, 10), (100, 300, 1000), (0.0, 0.01, 0.03))
]
FAMILIES = [(Cell(seeds, 256, 0.01), arms) for seeds, arms in product((3, 8), (4, 16))]
TIMES = list(product(SHAPES, (4, 5, 8), (0.011, 0.03)))
EQUIVALENCES = [
    Cell(seeds, questions, 0.005, effect=effect)
    for seeds, questions, effect in product((3, 5, 10), (300, 1000), (MARGIN, 0.0))
]


def tables(repeats: int, jobs: int) -> list[tuple[str, Table]]:
    """What the simulations say, under its heading."""
    with ProcessPoolExecutor(jobs) as pool:
        timed = [pool.submit(_times_row, *setting, repeats // 4) for setting in TIMES]
        families = [pool.submit(_family_row, *setting, repeats) for setting in FAMILIES]
        cells = [pool.submit(measure, cell, repeats) for cell in CELLS]
        equivalences = [pool.submit(measure, cell, repeats) for cell in EQUIVALENCES]
        times_heads = ["curve", "seeds", "noise, points", "false alarms", "no interval", "a ratio of 0.8 is seen"]
        family_heads = ["arms", "seeds", "a false claim, each alone", "by Holm"]
        return [
            ("Intervals of paired differences", _interval_table([cell.result() for cell in cells])),
            ("Many arms", Table(family_heads, [row.result() for row in families], left=())),
            ("Times to an accuracy", Table(times_heads, [row.result() for row in timed])),
            ("Equivalence", _equivalence_table([cell.result() for cell in equivalences])),
        ]


def _interval_table(measured: Sequence[Measured]) -> Table:
    columns: dict[str, Callable[[Measured], str]] = {
        "outcomes": lambda one: "greedy" if one.cell.completions == 1 else f"avg@{one.cell.completions}",
        "seeds": lambda one: str(one.cell.seeds),
        "questions": lambda one: str(one.cell.questions),
        "seed effect, points": lambda one: f"{100 * one.cell.seed_sd:g}",
        "coverage": lambda one: f"{one.coverage:.3f}",
        "half-width, points": lambda one: f"{100 * one.half:.1f}",
        "over the best": lambda one: f"{one.half / one.best:.2f}",
        "over a told variance's": lambda one: f"{one.half / one.known:.2f}",
    }
    return Table.of(measured, columns)


def _family_row(cell: Cell, arms: int, repeats: int) -> list[str]:
    alone, corrected = family_errors(cell, arms, repeats)
    return [str(arms), str(cell.seeds), f"{alone:.3f}", f"{corrected:.3f}"]


def _times_row(shape: str, seeds: int, noise: float, repeats: int) -> list[str]:
    false, none = times_apart(shape, seeds, noise, 1.0, repeats)
    right, _ = times_apart(shape, seeds, noise, 1.25, repeats)
    return [shape, str(seeds), f"{100 * noise:g}", f"{false:.3f}", f"{none:.3f}", f"{right:.2f}"]


def _equivalence_table(measured: Sequence[Measured]) -> Table:
    columns: dict[str, Callable[[Measured], str]] = {
        "seeds": lambda one: str(one.cell.seeds),
        "questions": lambda one: str(one.cell.questions),
        "true difference, points": lambda one: f"{100 * one.cell.effect:g}",
        f"called equivalent within {100 * MARGIN:g}": lambda one: f"{one.equivalent:.3f}",
    }
    return Table.of(measured, columns, left=())


NOTES = {
    "Intervals of paired differences": (
        "Equal arms; seed effect: standard deviation, between pairs of seeds, of the difference of the arms' "
        "accuracies. The best: an interval that knows the true variance of the mean, with the degrees of freedom that "
        "its unbiased estimate has. A told variance needs no estimate: that is what few seeds cost."
    ),
    "Many arms": "Equal arms against one baseline, 256 questions, seed effect 1 point: comparisons with a false claim.",
    "Times to an accuracy": "Equal arms, but in the last column; nine evaluations, paces and progress vary by 8 %.",
    "Equivalence": "At a true difference of the margin at most .05 may be called equivalent; seed effect half a point.",
}


@command()
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=2000, help="simulated comparisons a setting (default: 2000)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", action=WriteFolder, required=True, help="folder for README.md")
    given = parser.parse_args(arguments)
    error = (0.05 * 0.95 / given.repeats) ** 0.5
    parts = [
        "# What the statistics of comparisons hold",
        f"Simulated, {given.repeats} comparisons a row (a quarter as many for times); a share near .05 or .95 is known "
        f"to {error:.3f}. The model of the outcomes is in [benchmarks/calibration.py](../../calibration.py). {ALIKE}",
        f"    {command_line()}",
    ]
    for heading, table in tables(given.repeats, given.jobs):
        parts += [f"## {heading}", NOTES[heading], table.markdown()]
    with storage_errors(given.out, "--out"):
        given.out.mkdir(parents=True, exist_ok=True)
        write_whole(given.out / "README.md", "\n\n".join(parts) + "\n")
    print(given.out / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
