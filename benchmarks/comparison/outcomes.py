"""Finished runs read back, and what a comparison says of them: each arm alone, and against the baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment.summary import evaluation_rows, read_result, training_rows
from benchmarks.experiment.training import METRICS, RESULT
from benchmarks.measuring.durable import read_rows
from benchmarks.measuring.statistics import (
    Interval,
    at_budget,
    interquartile_mean,
    mean_interval,
    pass_at_k,
    probability_of_improvement,
    time_ratio,
    time_to_target,
)
from registry import UsageError

AXES = ("iteration", "tokens", "seconds")
AXIS_WORDS = {"iteration": "equal steps", "tokens": "equal tokens", "seconds": "equal wall-clock"}


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    Attributes:
        result: result.json.
        rows: metrics.jsonl.
        provenance: provenance.json.
    """

    result: dict[str, Any]
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Outcome:
        """Raises UsageError where a file of the folder is missing or damaged."""
        if not (folder / RESULT).is_file():
            raise UsageError(f"{folder} has no {RESULT}: the run is not finished")
        result = read_result(folder / RESULT)
        rows, damaged = read_rows(folder / METRICS)
        if damaged is not None or len(evaluation_rows(rows)) != len(result["curve"]):
            where = f"line {damaged} of {METRICS} is damaged" if damaged else f"{METRICS} has lost rows"
            raise UsageError(f"{folder}: {where}; remove that folder, and the run is done again")
        try:
            provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder / 'provenance.json'} cannot be read ({error}); remove that folder") from None
        return Outcome(result, rows, provenance)

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows of iterations."""
        return training_rows(self.rows)

    def spent(self, axis: str) -> list[float]:
        """The budget used at each evaluation, on one of ``AXES``."""
        return [float(point[axis]) for point in self.result["curve"]]

    @property
    def greedy(self) -> list[float]:
        """Greedy accuracy at each evaluation."""
        return [float(point["greedy"]) for point in self.result["curve"]]

    def right(self) -> NDArray[np.float64]:
        """[N, Q] greedy outcomes at each evaluation."""
        bits = [row["evaluation"]["right"] for row in evaluation_rows(self.rows)]
        return np.array([[bit == "1" for bit in text] for text in bits], dtype=float)

    def mean(self, name: str) -> float | None:
        """Mean over iterations of a metric, None if it was not measured."""
        return self.result["means"].get(name)


@dataclass(frozen=True)
class ArmOutcome:
    """The finished runs of one arm, in the order of their seeds."""

    label: str
    runs: tuple[Outcome, ...]

    @property
    def seeds(self) -> list[int]:
        """Of the finished runs."""
        return [run.result["seed"] for run in self.runs]

    def at(self, axis: str, budget: float, seeds: Sequence[int] | None = None) -> NDArray[np.float64]:
        """[S, Q] greedy outcomes at a budget."""
        chosen = [run for run in self.runs if seeds is None or run.result["seed"] in seeds]
        return np.stack([at_budget(budget, run.spent(axis), run.right()) for run in chosen])

    def ends(self, which: int, seeds: Sequence[int] | None = None) -> NDArray[np.float64]:
        """[S, Q] greedy outcomes of the first (0) or last (-1) evaluation."""
        return np.stack([run.right()[which] for run in self.runs if seeds is None or run.result["seed"] in seeds])

    def mean(self, name: str) -> float | None:
        """Mean over runs and iterations of a metric."""
        values = [value for run in self.runs if (value := run.mean(name)) is not None]
        return float(np.mean(values)) if values else None

    def over_runs(self, name: str) -> float:
        """Mean over runs of a number of the result; 0 for one that runs of an older version did not measure."""
        return float(np.mean([run.result.get(name, 0.0) for run in self.runs]))

    def sampled(self, when: str, k: int) -> float:
        """pass@k of sampled completions, ``before`` or ``after``, over questions and runs; k = 1 is avg@n."""
        return float(
            np.mean([pass_at_k(r.result[f"sampled_right_{when}"], r.result["samples"], k).mean() for r in self.runs])
        )


def describe(arm: ArmOutcome, target: float) -> dict[str, Any]:
    """One arm's line: accuracy with intervals, cost, divergence; times to the accuracy ``target``."""
    before, after = arm.ends(0), arm.ends(-1)
    finals = after.mean(1)
    samples = arm.runs[0].result["samples"]
    reached = [time_to_target(target, run.spent("seconds"), run.greedy) for run in arm.runs]
    layers = {row.get("layers_kept", len(row["layers"])) for run in arm.runs for row in run.training if "layers" in row}
    return {
        "label": arm.label,
        "seeds": arm.seeds,
        "before": mean_interval(before),
        "after": mean_interval(after),
        "gain": mean_interval(after - before),
        "gain_by_seed": (after.mean(1) - before.mean(1)).tolist(),
        "iqm": interquartile_mean(finals),
        "sampled_before": arm.sampled("before", 1),
        "sampled_after": arm.sampled("after", 1),
        "pass_at": {k: (arm.sampled("before", k), arm.sampled("after", k)) for k in (1, 2, 4, 8) if k <= samples},
        "samples": samples,
        "sets": _sets(arm),
        "tokens": arm.over_runs("tokens"),
        "tokens_per_second": arm.over_runs("rollout_tokens_per_second"),
        "seconds": arm.over_runs("seconds"),
        "seconds_rollout": arm.over_runs("seconds_rollout"),
        "seconds_reward": arm.over_runs("seconds_reward"),
        "seconds_update": arm.over_runs("seconds_update"),
        "seconds_evaluation": arm.over_runs("seconds_evaluation"),
        "kl": arm.mean("kl_k1"),
        "ess": arm.mean("ess_sequence"),
        "D": arm.mean("D"),
        "skip_ratio": arm.mean("skip_ratio"),
        "layers_kept": sorted(layers),
        "seconds_to_target": reached,
    }


def _sets(arm: ArmOutcome) -> dict[str, tuple[float, float]]:
    """Greedy accuracy on the further problem sets, before and after."""
    names = arm.runs[0].result["sets_before"]

    def mean(name: str, when: str) -> float:
        return float(np.mean([run.result[f"sets_{when}"][name]["greedy"] for run in arm.runs]))

    return {name: (mean(name, "before"), mean(name, "after")) for name in names}


def against(arm: ArmOutcome, baseline: ArmOutcome) -> dict[str, Any]:
    """Paired differences of an arm from the baseline at the largest budgets that all of their runs reached.

    The same seed deals the same problems to both and both are measured on the same questions, so differences are taken
    question by question and seed by seed.
    """
    seeds = [seed for seed in arm.seeds if seed in baseline.seeds]
    found: dict[str, Any] = {"label": arm.label, "baseline": baseline.label, "seeds": seeds}
    if not seeds:
        return found
    for axis in AXES:
        budget = min(run.spent(axis)[-1] for run in (*arm.runs, *baseline.runs))
        difference: Interval = mean_interval(arm.at(axis, budget, seeds) - baseline.at(axis, budget, seeds))
        found[axis] = {"budget": budget, "difference": difference}
    found["probability_of_improvement"] = probability_of_improvement(
        arm.ends(-1, seeds).mean(1), baseline.ends(-1, seeds).mean(1)
    )
    found["speed_up_rollout"] = arm.over_runs("rollout_tokens_per_second") / baseline.over_runs(
        "rollout_tokens_per_second"
    )
    ours, theirs = (
        [(run.spent("seconds"), run.greedy) for run in one.runs if run.result["seed"] in seeds]
        for one in (arm, baseline)
    )
    found["time_ratio"] = time_ratio(ours, theirs)
    found["speed_up"] = baseline.over_runs("seconds") / arm.over_runs("seconds")
    return found
