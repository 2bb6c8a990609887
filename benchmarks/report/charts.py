"""What the page's script draws of a group: lines by arm against every budget, as one JSON value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison.outcomes import AXES, END, ArmOutcome, Outcome
from benchmarks.experiment.summary import target_tokens
from benchmarks.measuring.plots import style
from benchmarks.report.comparison import Comparison, Group

AXIS_LABELS = {
    "iteration": "iterations",
    "tokens": "rollout tokens",
    "target_tokens": "target-model tokens",
    "seconds": "training seconds",
    END: "evaluations",
}
MOST_POINTS = 150  # of a line; longer runs are averaged over neighbouring iterations
DIGITS = 5
CUT_OFF = "finish/length"  # of a rollout's completions, the share; not among the metrics where it is 0

Line = NDArray[np.float64]  # [N]


@dataclass(frozen=True)
class Chart:
    """A metric of iterations against what was spent.

    Attributes:
        key: names it in the page.
        label: of the vertical axis.
        metric: of metrics.jsonl.
        band: metrics of the edges of a band about it, or none.
        scale: what the values are multiplied by.
    """

    key: str
    label: str
    metric: str
    band: tuple[str, ...] = ()
    scale: float = 1.0


TAIL = (
    Chart("overlap", "overlap of completions, 5th percentile", "overlap_q05"),
    Chart("overlap-token", "overlap of tokens, 5th percentile", "overlap_token_q05"),
    Chart(
        "log-ratio", "log ratio of a token: median, 1 % to 99 %", "log_ratio_q50", ("log_ratio_q01", "log_ratio_q99")
    ),
)
LENGTH = (
    Chart("length", "tokens of a rollout's completion, mean", "mean_length"),
    Chart("cut-off", "rollout completions cut off, %", CUT_OFF, scale=100.0),
)
WEIGHTS = (Chart("weight", "weight of a token: median, 1 % to 99 %", "weight_q50", ("weight_q01", "weight_q99")),)
HELD_OUT = Chart("greedy", "held-out accuracy, %", "greedy", scale=100.0)
HELD_OUT_LENGTH = Chart("greedy-length", "tokens of a held-out completion, mean", "mean_length")


def page_data(comparison: Comparison) -> list[dict[str, Any]]:
    """The groups' arms, budgets and charts, JSON-able."""
    return [_group(group) for group in comparison.groups]


def script_json(value: Any) -> str:
    """JSON that can stand inside of a ``script`` element: no text in it can end that, nor open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: a lone surrogate is an escape, too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _group(group: Group) -> dict[str, Any]:
    charts = [_held_out(group, HELD_OUT, [[run.greedy for run in arm.runs] for arm in group.arms])]
    lengths = [[_held_out_lengths(run) for run in arm.runs] for arm in group.arms]
    if all(length for arm in lengths for length in arm):
        charts.append(_held_out(group, HELD_OUT_LENGTH, lengths))
    charts += [_of_iterations(group, chart) for chart in (*TAIL, *LENGTH, *WEIGHTS)]
    return {
        "axes": {axis: AXIS_LABELS[axis] for axis in group.axes},
        "arms": [{"label": arm.label, **_look(n)} for n, arm in enumerate(group.arms)],
        "charts": {chart["key"]: chart for chart in charts if chart["lines"]},
    }


def _look(n: int) -> dict[str, Any]:
    how = style(n)
    return {"colour": ink(how["color"]), "dashed": how["linestyle"] != "-"}


def ink(colour: str) -> str:
    """The colour, black as the page's ink, which a dark theme turns light."""
    return "var(--ink)" if colour == "#000000" else colour


def _held_out_lengths(run: Outcome) -> list[float]:
    """Mean tokens of a held-out completion at each evaluation; empty where one of them did not measure it."""
    rows = [row["evaluation"] for row in run.rows if "evaluation" in row]
    return [row["mean_length"] for row in rows] if all("mean_length" in row for row in rows) else []


def _held_out(group: Group, chart: Chart, values: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """A line each run, and a thick one of an arm's mean."""
    lines = []
    for n, (arm, of_runs) in enumerate(zip(group.arms, values, strict=True)):
        for axis in group.axes:
            runs = [(run.spent(axis), chart.scale * np.array(one)) for run, one in zip(arm.runs, of_runs, strict=True)]
            if len(runs) > 1:
                lines += [_line(n, axis, x, y, seed=seed) for seed, (x, y) in zip(arm.seeds, runs, strict=True)]
            lines.append(_line(n, axis, *mean_line(runs)))
    return {"key": chart.key, "label": chart.label, "lines": lines}


def _of_iterations(group: Group, chart: Chart) -> dict[str, Any]:
    """A line each arm: the mean of its runs that measured the metric."""
    lines = []
    for n, arm in enumerate(group.arms):
        for axis in (axis for axis in group.axes if axis in AXES):
            parts = [_means(arm, axis, metric, chart) for metric in (chart.metric, *chart.band)]
            if all(len(x) for x, _ in parts):
                (x, y), *band = parts
                line = _line(n, axis, x, y)
                lines.append(line | {name: _short(one) for name, (_, one) in zip(("low", "high"), band, strict=False)})
    return {"key": chart.key, "label": chart.label, "lines": lines}


def _means(arm: ArmOutcome, axis: str, metric: str, chart: Chart) -> tuple[Line, Line]:
    runs = [one for run in arm.runs if len((one := _metric(run, axis, metric, chart))[0])]
    return thinned(*mean_line(runs)) if runs else (np.zeros(0), np.zeros(0))


def _metric(run: Outcome, axis: str, metric: str, chart: Chart) -> tuple[Line, Line]:
    """What was spent until the end of each iteration that measured the metric, and its value."""
    spent = dict.fromkeys(AXES, 0.0)
    x, y = [], []
    for row in run.training:
        spent["iteration"], spent["tokens"] = row["iteration"], row.get("timesteps", 0)
        spent["target_tokens"] += target_tokens(row)
        spent["seconds"] += row.get("time/iteration", 0.0)
        if (value := value_of(row, metric)) is not None:
            x.append(spent[axis])
            y.append(chart.scale * value)
    return np.array(x, float), np.array(y, float)


def value_of(row: dict[str, Any], metric: str) -> float | None:
    """An iteration's value, None where it did not measure the metric."""
    finished = metric == CUT_OFF and any(name.startswith("finish/") for name in row)
    return row.get(metric, 0.0 if finished else None)


def cut_off(run: Outcome) -> list[float]:
    """The share of each iteration's completions that the budget of tokens ended."""
    return [share for row in run.training if (share := value_of(row, CUT_OFF)) is not None]


def thinned(x: Line, y: Line) -> tuple[Line, Line]:
    """[N] points as at most ``MOST_POINTS``: means over neighbours."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def mean_line(runs: Sequence[tuple[Sequence[float] | Line, Sequence[float] | Line]]) -> tuple[Line, Line]:
    """The mean of some runs' lines, each straight between its points, as far as all of them go."""
    end = min(x[-1] for x, _ in runs)
    grid = np.unique([at for x, _ in runs for at in x if at <= end])
    return grid, np.mean([np.interp(grid, x, y) for x, y in runs], axis=0)


def _line(arm: int, axis: str, x: Any, y: Any, seed: int | None = None) -> dict[str, Any]:
    """A line as the page's script takes it; ``seed`` is that of a single run's line."""
    return {"arm": arm, "axis": axis} | ({} if seed is None else {"seed": seed}) | {"x": _short(x), "y": _short(y)}


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
