"""What a comparison will cost, before it runs: time and memory of each run, as far as finished runs tell.

A run's shape is its policy, environment but for the reward, device and agent id. Finished runs of the same shape give
seconds and tokens per completion, which are scaled to the completions of an iteration and to the budgets; where there
are some with the very same agent, these alone count. Of a shape that no run has finished it is known how long it may
train, where its budget is one of seconds, and what memory it needs, where there is a plan of that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.comparison.arms import Arm
from benchmarks.comparison.board import clock
from benchmarks.comparison.resolution import UNKNOWN as UNKNOWN_RESOLUTION
from benchmarks.comparison.resolution import Answers, components_of, resolution
from benchmarks.experiment.memory import planned_bytes
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.summary import read_result
from benchmarks.experiment.training import RESULT
from benchmarks.measuring.table import Table

UNKNOWN = "no finished run of this shape, and no budget of seconds: unknown"


@dataclass(frozen=True)
class Cost:
    """Of one run: seconds of training and evaluation, and the largest memory of its process in bytes."""

    seconds: float
    peak_bytes: float


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run says of others like it. ``seconds`` and ``tokens`` are of one iteration; ``right`` is what it
    got right in the end, 0 or 1 for each question."""

    spec: RunSpec
    seconds: float
    tokens: float
    evaluation_seconds: float
    iterations: int
    peak_bytes: float
    right: str = ""

    def cost_of(self, spec: RunSpec) -> Cost:
        """The cost of ``spec``, whose shape is the same: in proportion to the completions it trains and evaluates."""
        share = completions(spec) / completions(self.spec)
        seconds, tokens = self.seconds * share, self.tokens * share
        count = iterations(spec, seconds, tokens)
        one_evaluated = self.evaluation_seconds / evaluation_completions(self.spec, self.iterations)
        return Cost(seconds * count + one_evaluated * evaluation_completions(spec, count), self.peak_bytes)


class FinishedRuns:
    """All finished runs below the folder ``runs``. Called with a spec it gives the spec's cost: the mean time, and the
    largest memory, of the runs of its shape; None without such a run."""

    def __init__(self, runs: Path) -> None:
        self.runs = list(_read(runs))

    def __call__(self, spec: RunSpec) -> Cost | None:
        same_shape = [run for run in self.runs if _shape(run.spec) == _shape(spec)]
        same_agent = [run for run in same_shape if run.spec.agent == spec.agent]
        costs = [run.cost_of(spec) for run in same_agent or same_shape]
        if not costs:
            return None
        return Cost(float(np.mean([cost.seconds for cost in costs])), max(cost.peak_bytes for cost in costs))

    def answers(self, specs: Sequence[RunSpec]) -> list[Answers]:
        """Of the finished runs that have a shape of ``specs`` and were measured on the questions of the first."""
        shapes = {_shape(spec) for spec in specs}
        asked = _questions(specs[0])
        return [
            Answers(json.dumps(run.spec.agent, sort_keys=True), run.spec.seed, run.right)
            for run in self.runs
            if _shape(run.spec) in shapes and _questions(run.spec) == asked
        ]


def _questions(spec: RunSpec) -> str:
    """What the held-out questions depend on."""
    chosen = {name: value for name, value in spec.evaluation.items() if name not in ("every", "samples", "sets")}
    return json.dumps([spec.env, chosen], sort_keys=True)


def _shape(spec: RunSpec) -> tuple[str, str, str, str]:
    env = {name: value for name, value in spec.env.items() if name != "reward"}  # a coin costs what a verdict does
    return spec.policy, json.dumps(env, sort_keys=True), spec.device, spec.agent["id"]


def _read(runs: Path) -> Iterator[FinishedRun]:
    """Runs whose folder is of another version or damaged say nothing of cost."""
    for path in sorted(runs.glob(f"*/{RESULT}")):
        try:
            spec, result = RunSpec.read(path.parent / "spec.json"), read_result(path)
            count = int(result["iterations"])
            yield FinishedRun(
                spec=spec,
                seconds=result["seconds"] / count,
                tokens=result["tokens"] / count,
                evaluation_seconds=result["seconds_evaluation"],
                iterations=count,
                peak_bytes=result["peak_bytes"],
                right=result["right_after"],
            )
        except (ValueError, KeyError):
            continue


def completions(spec: RunSpec) -> int:
    """Completions of one iteration, written or demonstrated."""
    if "gradient_steps" in spec.agent:
        return int(spec.agent["batch_size"]) * int(spec.agent["gradient_steps"])
    return int(spec.agent.get("group_size", 1)) * int(spec.agent.get("problems_per_batch", 64))


def iterations(spec: RunSpec, seconds: float, tokens: float) -> int:
    """Iterations of a run, if each takes as many seconds and tokens."""
    return math.ceil(1 / spec.used(1, max(1, round(tokens)), max(seconds, 1e-6)))


def evaluation_completions(spec: RunSpec, count: int) -> int:
    """Completions of all evaluations of a run of ``count`` iterations."""
    chosen = spec.evaluated
    glances = count // chosen.every if chosen.every else 1
    return chosen.problems * (1 + glances + 2 * chosen.samples + 2 * len(chosen.sets))


def print_plan(arms: Sequence[Arm], runs: Path, jobs: int, threads: int) -> None:
    """The runs of a comparison with their time and memory, on standard output."""
    cost_of = FinishedRuns(runs)
    console = Console()
    rows: list[list[str]] = []
    measured: list[float] = []  # seconds of runs to do, by finished ones
    budgeted: list[float] = []  # by their own budgets, evaluation not among them
    sizes: list[float] = []
    unknown = 0
    for arm in arms:
        for spec in arm.specs:
            is_done = (runs / spec.hash / RESULT).is_file()
            state = "finished" if is_done else "half-done" if (runs / spec.hash / "checkpoint").exists() else "to do"
            cost = cost_of(spec)
            size = cost.peak_bytes if cost else planned_bytes(spec)
            if is_done:
                seconds = ""
            elif cost:
                seconds = clock(cost.seconds)
                measured.append(cost.seconds)
            elif spec.seconds:
                seconds = f"{clock(spec.seconds)} + evaluation"
                budgeted.append(spec.seconds)
            else:
                seconds = "unknown"
                unknown += 1
            sizes += [size] if size and not is_done else []
            memory = "unknown" if size is None else f"{size / 1e9:.1f} GB"
            rows.append([arm.label, str(spec.seed), spec.hash, state, seconds, memory])
    heads = ["agent", "seed", "folder", "state", "time", "memory"]
    console.print(Table(heads, rows, title=f"{len(rows)} runs", left=(0, 2, 3)))
    if measured or budgeted:
        memory = f", {jobs * max(sizes) / 1e9:.1f} GB of memory" if sizes else ""
        known = "from budgets, evaluation left out" if budgeted else "from finished runs"
        console.print(
            f"{'at least' if budgeted else 'about'} {clock(sum(measured + budgeted) / jobs)} of training"
            f"{' and evaluation' if measured else ''} with {jobs} run(s) at a time of {threads} thread(s){memory}; "
            f"{known}",
            highlight=False,
        )
    if unknown:
        console.print(f"{unknown} run(s): {UNKNOWN}", highlight=False)
    _print_resolution(arms, cost_of, console)


def _print_resolution(arms: Sequence[Arm], finished: FinishedRuns, console: Console) -> None:
    """What the comparison will tell apart."""
    compared = [arm.specs[0] for arm in arms if arm.control is None]
    components = components_of(finished.answers(compared))
    if components is None:
        console.print(UNKNOWN_RESOLUTION, highlight=False)
        return
    said, needed = resolution(components, max(len(arm.specs) for arm in arms), compared[0].evaluated.problems)
    console.print(said, highlight=False)
    console.print(needed)
