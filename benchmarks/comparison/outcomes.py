"""Runs read back, and what a comparison says of each arm alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.summary import evaluation_rows, read_result, summarise, training_rows
from benchmarks.experiment.training import METRICS, RESULT
from benchmarks.measuring.durable import read_rows
from benchmarks.measuring.statistics import (
    Interval,
    at_budget,
    interquartile_mean,
    mean_interval,
    pass_at_k,
    time_to_target,
)
from registry import UsageError

AXES = ("iteration", "tokens", "target_tokens", "seconds")
END = "end"  # where runs of elsewhere do not say what they spent
AXIS_WORDS = {
    "iteration": "equal steps",
    "tokens": "equal tokens",
    "target_tokens": "equal target-model tokens",
    "seconds": "equal wall-clock",
    END: "the end",
}


@dataclass(frozen=True)
class Outcome:
    """One run; of one from elsewhere (``benchmarks.comparison.stored``) less may be known.

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
            raise UsageError(f"{folder} has no {RESULT}: finish the run, or move it elsewhere")
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

    @staticmethod
    def so_far(folder: Path) -> Outcome | None:
        """Of a run that may not be over: its result then says at which iteration it is, in ``unfinished``, and there is
        no provenance; None before its first evaluation."""
        if (folder / RESULT).is_file():
            return Outcome.read(folder)
        rows, _ = read_rows(folder / METRICS)
        if not evaluation_rows(rows):
            return None
        spec = RunSpec.read(folder / "spec.json")
        return Outcome(summarise(spec, rows) | {"unfinished": len(training_rows(rows))}, rows, {})

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows of iterations."""
        return training_rows(self.rows)

    @property
    def weighed(self) -> list[dict[str, Any]]:
        """Those that measured the correction's weights."""
        return [row for row in self.training if "weight_q50" in row]

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of ``AXES`` on which it is known what was spent."""
        return tuple(axis for axis in AXES if all(axis in point for point in self.result["curve"]))

    def spent(self, axis: str) -> list[float]:
        """The budget used at each evaluation, on one of ``axes``; the number of the evaluation at ``END``."""
        if axis == END:
            return [float(n) for n in range(1, len(self.result["curve"]) + 1)]
        return [float(point[axis]) for point in self.result["curve"]]

    @property
    def greedy(self) -> list[float]:
        """Greedy accuracy at each evaluation."""
        return [float(point["greedy"]) for point in self.result["curve"]]

    def right(self) -> NDArray[np.float64]:
        """[N, Q] outcomes at each evaluation: greedy ones, of 0 and 1, or shares of sampled completions."""
        return np.array([[float(one) for one in row["evaluation"]["right"]] for row in evaluation_rows(self.rows)])

    def mean(self, name: str) -> float | None:
        """Mean over iterations of a metric, None if it was not measured."""
        return self.result["means"].get(name)


@dataclass(frozen=True)
class ArmOutcome:
    """The runs of one arm, in the order of their seeds."""

    label: str
    runs: tuple[Outcome, ...]

    @property
    def seeds(self) -> list[int]:
        """Of the runs."""
        return [run.result["seed"] for run in self.runs]

    def of(self, seeds: Sequence[int]) -> ArmOutcome:
        """The runs of some seeds alone."""
        return ArmOutcome(self.label, tuple(run for run in self.runs if run.result["seed"] in seeds))

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of all runs; ``END`` without any."""
        return tuple(axis for axis in AXES if all(axis in run.axes for run in self.runs)) or (END,)

    @property
    def learned(self) -> bool:
        """Whether each run was evaluated more than once."""
        return all(len(run.result["curve"]) > 1 for run in self.runs)

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

    def over_runs(self, name: str) -> float | None:
        """Mean over runs of a number of the result; None if none of them measured it."""
        values = [value for run in self.runs if (value := run.result.get(name)) is not None]
        return float(np.mean(values)) if values else None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over runs of the speed of rollouts with their verdicts; None for an agent without rollouts."""
        return self.over_runs("rollout_tokens_per_second")

    @property
    def samples(self) -> int:
        """n, sampled completions a question; 0 where none were."""
        return min(int(run.result.get("samples", 0)) for run in self.runs)

    def pass_at(self, when: str, k: int) -> float | None:
        """pass@k of sampled completions, ``before`` or ``after``, over questions and runs; k = 1 is avg@n. None where
        so many were not sampled."""
        if k > self.samples:
            return None
        return float(
            np.mean([pass_at_k(r.result[f"sampled_right_{when}"], r.result["samples"], k).mean() for r in self.runs])
        )


def shared_axes(arms: Sequence[ArmOutcome]) -> tuple[str, ...]:
    """On which arms can be compared; ``END`` where there is none. The target's tokens are all tokens, and no axis of
    their own, where it wrote all of them."""
    axes = [axis for axis in AXES if all(axis in arm.axes for arm in arms)]
    if "tokens" in axes and "target_tokens" in axes:
        runs = [run for arm in arms for run in arm.runs]
        if all(run.spent("tokens") == run.spent("target_tokens") for run in runs):
            axes.remove("target_tokens")
    return tuple(axes) or (END,)


@dataclass(frozen=True)
class ArmLine:
    """What a comparison says of one arm; means are over its runs. The fields are those of results.json.

    Attributes:
        label: of the arm.
        seeds: of its finished runs.
        before, after: greedy accuracy on the held-out questions, 0 to 1, at the first and at the last evaluation;
            before is None, as the gain is, where there is one evaluation.
        gain: the difference of the two, question by question.
        gain_by_seed: the same for each run.
        iqm: interquartile mean of the runs' last greedy accuracies.
        sampled_before, sampled_after: share of sampled completions that are right (avg@n); None where none were drawn.
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
    before: Interval | None
    after: Interval
    gain: Interval | None
    gain_by_seed: list[float]
    iqm: float
    sampled_before: float | None
    sampled_after: float | None
    pass_at: dict[int, tuple[float | None, float | None]]
    samples: int
    sets: dict[str, tuple[float, float]]
    tokens: float | None
    tokens_per_second: float | None
    seconds: float | None
    seconds_rollout: float | None
    seconds_reward: float | None
    seconds_update: float | None
    seconds_evaluation: float | None
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
            "rollout": self.seconds_rollout or 0.0,
            "reward": self.seconds_reward or 0.0,
            "update": self.seconds_update or 0.0,
            "evaluation": self.seconds_evaluation or 0.0,
        }


def describe(arm: ArmOutcome, target: float | None) -> ArmLine:
    """One arm's line; ``target`` is the accuracy that times are taken to, None for none."""
    before, after = arm.ends(0), arm.ends(-1)
    timed = arm.runs if target is not None and "seconds" in arm.axes else ()
    layers = {row.get("layers_kept", len(row["layers"])) for run in arm.runs for row in run.training if "layers" in row}
    return ArmLine(
        label=arm.label,
        seeds=arm.seeds,
        before=mean_interval(before, least=0).within(0, 1) if arm.learned else None,
        after=mean_interval(after, least=0).within(0, 1),
        gain=mean_interval(after - before).within(-1, 1) if arm.learned else None,
        gain_by_seed=(after.mean(1) - before.mean(1)).tolist() if arm.learned else [],
        iqm=interquartile_mean(after.mean(1)),
        sampled_before=arm.pass_at("before", 1),
        sampled_after=arm.pass_at("after", 1),
        pass_at={k: (arm.pass_at("before", k), arm.pass_at("after", k)) for k in (1, 2, 4, 8) if k <= arm.samples},
        samples=arm.samples,
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
        seconds_to_target=[time_to_target(target or 0.0, run.spent("seconds"), run.greedy) for run in timed],
    )


def _sets(arm: ArmOutcome) -> dict[str, tuple[float, float]]:
    """Greedy accuracy on the further problem sets, before and after."""
    names = arm.runs[0].result.get("sets_before", {})

    def mean(name: str, when: str) -> float:
        return float(np.mean([run.result[f"sets_{when}"][name]["greedy"] for run in arm.runs]))

    return {name: (mean(name, "before"), mean(name, "after")) for name in names}
