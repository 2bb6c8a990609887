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

    @property
    def weighed(self) -> list[dict[str, Any]]:
        """Those that measured the correction's weights."""
        return [row for row in self.training if "weight_q50" in row]

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

    def of(self, seeds: Sequence[int]) -> ArmOutcome:
        """The runs of some seeds alone."""
        return ArmOutcome(self.label, tuple(run for run in self.runs if run.result["seed"] in seeds))

    def at(self, axis: str, budget: float) -> NDArray[np.float64]:
        """[S, Q] greedy outcomes at a budget."""
        return np.stack([at_budget(budget, run.spent(axis), run.right()) for run in self.runs])

    def ends(self, which: int) -> NDArray[np.float64]:
        """[S, Q] greedy outcomes of the first (0) or last (-1) evaluation."""
        return np.stack([run.right()[which] for run in self.runs])

    def mean(self, name: str) -> float | None:
        """Mean over runs and iterations of a metric."""
        values = [value for run in self.runs if (value := run.mean(name)) is not None]
        return float(np.mean(values)) if values else None

    def over_runs(self, name: str) -> float:
        """Mean over runs of a number of the result; 0 for one that runs of an older version did not measure."""
        return float(np.mean([run.result.get(name, 0.0) for run in self.runs]))

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over runs of the speed of rollouts with their verdicts; None for an agent without rollouts."""
        speeds = [speed for run in self.runs if (speed := run.result.get("rollout_tokens_per_second")) is not None]
        return float(np.mean(speeds)) if speeds else None

    def pass_at(self, when: str, k: int) -> float:
        """pass@k of sampled completions, ``before`` or ``after``, over questions and runs; k = 1 is avg@n."""
        return float(
            np.mean([pass_at_k(r.result[f"sampled_right_{when}"], r.result["samples"], k).mean() for r in self.runs])
        )


@dataclass(frozen=True)
class ArmLine:
    """What a comparison says of one arm; means are over its runs. The fields are those of results.json.

    Attributes:
        label: of the arm.
        seeds: of its finished runs.
        before, after: greedy accuracy on the held-out questions, 0 to 1, at the first and at the last evaluation.
        gain: the difference of the two, question by question.
        gain_by_seed: the same for each run.
        iqm: interquartile mean of the runs' last greedy accuracies.
        sampled_before, sampled_after: share of sampled completions that are right (avg@n).
        pass_at: k -> pass@k of sampled completions, before and after.
        samples: n, sampled completions a question.
        sets: further problem set -> greedy accuracy, before and after.
        tokens: of completions rolled out, or trained on where nothing is rolled out, a run.
        tokens_per_second: of rollouts with their verdicts; None where nothing is rolled out.
        seconds: of training a run, evaluations left out.
        seconds_rollout, seconds_reward, seconds_update: the parts of these.
        seconds_evaluation: of a run's evaluations.
        kl: KL(mu || pi) per token, nats; None where it was not measured, as the next three.
        ess: effective sample size of whole completions under exact reweighting, as a fraction.
        D: KL(mu || pi) of a whole completion, nats.
        skip_ratio: share of the layers that rollouts leave out.
        layers_kept: the numbers of layers that rollouts were written with, in rising order.
        seconds_to_target: of each run, training seconds until its greedy accuracy is the target; None if it never is.
    """

    label: str
    seeds: list[int]
    before: Interval
    after: Interval
    gain: Interval
    gain_by_seed: list[float]
    iqm: float
    sampled_before: float
    sampled_after: float
    pass_at: dict[int, tuple[float, float]]
    samples: int
    sets: dict[str, tuple[float, float]]
    tokens: float
    tokens_per_second: float | None
    seconds: float
    seconds_rollout: float
    seconds_reward: float
    seconds_update: float
    seconds_evaluation: float
    kl: float | None
    ess: float | None
    D: float | None
    skip_ratio: float | None
    layers_kept: list[float]
    seconds_to_target: list[float | None]

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a run by what they are spent on."""
        return {
            "rollout": self.seconds_rollout,
            "reward": self.seconds_reward,
            "update": self.seconds_update,
            "evaluation": self.seconds_evaluation,
        }


@dataclass(frozen=True)
class Difference:
    """Two arms at an equal budget.

    Attributes:
        budget: iterations, rollout tokens or training seconds; the largest that all runs of both arms reached.
        difference: of greedy accuracy, 0 to 1, paired by question and by seed.
    """

    budget: float
    difference: Interval


@dataclass(frozen=True)
class Pair:
    """An arm against a baseline, over the seeds that both have. The fields are those of results.json.

    Attributes:
        label, baseline: of the two arms.
        seeds: those in common.
        iteration, tokens, seconds: the arm's accuracy less the baseline's, at equal budgets on each of ``AXES``.
        probability_of_improvement: chance that a run of the arm ends above a run of the baseline.
        speed_up_rollout: rollout tokens a second, the arm's over the baseline's; None where one of the two writes none.
        time_ratio: seconds until the arm has the baseline's last accuracy, over the seconds that the baseline takes.
        speed_up: training seconds of a run, the baseline's over the arm's.
    """

    label: str
    baseline: str
    seeds: list[int]
    iteration: Difference
    tokens: Difference
    seconds: Difference
    probability_of_improvement: float
    speed_up_rollout: float | None
    time_ratio: Interval
    speed_up: float

    def at_equal(self, axis: str) -> Difference:
        """The difference on one of ``AXES``."""
        return {"iteration": self.iteration, "tokens": self.tokens, "seconds": self.seconds}[axis]


@dataclass(frozen=True)
class NoPair:
    """Two arms without a seed in common: nothing can be said of their difference."""

    label: str
    baseline: str
    seeds: tuple[()] = ()


def describe(arm: ArmOutcome, target: float) -> ArmLine:
    """One arm's line; ``target`` is the accuracy that times are taken to."""
    before, after = arm.ends(0), arm.ends(-1)
    samples = arm.runs[0].result["samples"]
    layers = {row.get("layers_kept", len(row["layers"])) for run in arm.runs for row in run.training if "layers" in row}
    return ArmLine(
        label=arm.label,
        seeds=arm.seeds,
        before=mean_interval(before),
        after=mean_interval(after),
        gain=mean_interval(after - before),
        gain_by_seed=(after.mean(1) - before.mean(1)).tolist(),
        iqm=interquartile_mean(after.mean(1)),
        sampled_before=arm.pass_at("before", 1),
        sampled_after=arm.pass_at("after", 1),
        pass_at={k: (arm.pass_at("before", k), arm.pass_at("after", k)) for k in (1, 2, 4, 8) if k <= samples},
        samples=samples,
        sets=_sets(arm),
        tokens=arm.over_runs("tokens"),
        tokens_per_second=arm.tokens_per_second,
        seconds=arm.over_runs("seconds"),
        seconds_rollout=arm.over_runs("seconds_rollout"),
        seconds_reward=arm.over_runs("seconds_reward"),
        seconds_update=arm.over_runs("seconds_update"),
        seconds_evaluation=arm.over_runs("seconds_evaluation"),
        kl=arm.mean("kl_k1"),
        ess=arm.mean("ess_sequence"),
        D=arm.mean("D"),
        skip_ratio=arm.mean("skip_ratio"),
        layers_kept=sorted(layers),
        seconds_to_target=[time_to_target(target, run.spent("seconds"), run.greedy) for run in arm.runs],
    )


def _sets(arm: ArmOutcome) -> dict[str, tuple[float, float]]:
    """Greedy accuracy on the further problem sets, before and after."""
    names = arm.runs[0].result["sets_before"]

    def mean(name: str, when: str) -> float:
        return float(np.mean([run.result[f"sets_{when}"][name]["greedy"] for run in arm.runs]))

    return {name: (mean(name, "before"), mean(name, "after")) for name in names}


def against(arm: ArmOutcome, baseline: ArmOutcome) -> Pair | NoPair:
    """Paired differences of an arm from the baseline at the largest budgets that all of their runs reached.

    The same seed deals the same problems to both and both are measured on the same questions, so differences are taken
    question by question and seed by seed.
    """
    seeds = [seed for seed in arm.seeds if seed in baseline.seeds]
    if not seeds:
        return NoPair(arm.label, baseline.label)
    ours, theirs = arm.of(seeds), baseline.of(seeds)

    def difference(axis: str) -> Difference:
        budget = min(run.spent(axis)[-1] for run in (*arm.runs, *baseline.runs))
        return Difference(budget, mean_interval(ours.at(axis, budget) - theirs.at(axis, budget)))

    our_speed, their_speed = arm.tokens_per_second, baseline.tokens_per_second
    our_curves, their_curves = ([(run.spent("seconds"), run.greedy) for run in one.runs] for one in (ours, theirs))
    return Pair(
        label=arm.label,
        baseline=baseline.label,
        seeds=seeds,
        iteration=difference("iteration"),
        tokens=difference("tokens"),
        seconds=difference("seconds"),
        probability_of_improvement=probability_of_improvement(ours.ends(-1).mean(1), theirs.ends(-1).mean(1)),
        speed_up_rollout=our_speed / their_speed if our_speed and their_speed else None,
        time_ratio=time_ratio(our_curves, their_curves),
        speed_up=baseline.over_runs("seconds") / arm.over_runs("seconds"),
    )
