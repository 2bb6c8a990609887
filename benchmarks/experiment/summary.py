"""The result of a run, from its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from agents.monitoring.watch import SILENT, explain_silence, longest_silence
from benchmarks.experiment.spec import RunSpec
from registry import UsageError

TIMES = ("time/rollout", "time/reward", "time/update", "time/iteration")
NOT_AVERAGED = {"iteration", "timesteps", "layers", "learning_rate", *TIMES, "time/cpu"}


def training_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of iterations."""
    return [row for row in rows if "evaluation" not in row]


def evaluation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of held-out evaluations, the one before training first."""
    return [row for row in rows if "evaluation" in row]


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers by the names that trackers know them by: its own after ``train/`` or ``evaluation/``."""
    kind, values = ("evaluation", row["evaluation"]) if "evaluation" in row else ("train", row)
    return {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}


def seconds_spent(rows: list[dict[str, Any]]) -> float:
    """Wall-clock seconds of training, evaluations left out."""
    return float(sum(row["time/iteration"] for row in training_rows(rows)))


def silence(train: list[dict[str, Any]]) -> str | None:
    """Where a run, by its rows of iterations, had no gradient for long, and why; None where it never was so."""
    rows = longest_silence(train)
    if len(rows) < min(SILENT, max(len(train), 1)):
        return None
    first, last = rows[0]["iteration"], rows[-1]["iteration"]
    return f"iterations {first} to {last} of {len(train)} had no gradient of the reward: {explain_silence(rows)}"


def summarise(spec: RunSpec, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy before and after (with every question's outcome), cost, the learning curve, and the means over
    iterations of everything else that was measured. Of a run that is not over, what is known from its first evaluation
    on: its last one has no sampled completions and no further sets."""
    evaluations, train = evaluation_rows(rows), training_rows(rows)
    first, last = evaluations[0]["evaluation"], evaluations[-1]["evaluation"]
    whole = "sampled" in last
    seconds = {name: float(sum(row.get(name, 0.0) for row in train)) for name in TIMES}
    tokens = sum(row["tokens"] for row in train)
    wrote = seconds["time/rollout"] + seconds["time/reward"]
    return {
        "agent": spec.agent["id"],
        "seed": spec.seed,
        "hash": spec.hash,
        "policy": spec.policy,
        "env": spec.env["id"],
        "iterations": len(train),
        "accuracy_before": first["greedy"],
        "accuracy_after": last["greedy"],
        "sampled_before": first["sampled"],
        "sampled_after": last.get("sampled"),
        "right_before": first["right"],
        "right_after": last["right"],
        "sampled_right_before": first["sampled_right"],
        "sampled_right_after": last.get("sampled_right"),
        "samples": spec.evaluated.samples if whole else 0,
        "sets_before": first.get("sets", {}) if whole else {},
        "sets_after": last.get("sets", {}),
        "tokens": tokens,
        "rollout_tokens_per_second": tokens / wrote if wrote else None,  # None: nothing is rolled out
        "seconds": seconds["time/iteration"],
        "seconds_rollout": seconds["time/rollout"],
        "seconds_reward": seconds["time/reward"],
        "seconds_update": seconds["time/update"],
        "seconds_evaluation": float(sum(row.get("time/evaluation", 0.0) for row in evaluations)),
        "cpu_seconds": float(sum(row.get("time/cpu", 0.0) for row in rows)),
        "curve": _curve(rows),
        "means": _means(train),
        "silence": silence(train),
    }


def _curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each evaluation with the iterations, tokens and training seconds spent until then; and the tokens by the whole
    target that would have cost as much to write, unless the rows are of before that was counted."""
    counted = all("target_tokens" in row or (not row.get("skip_ratio") and "draft/proposed" not in row) for row in rows)
    curve, seconds, by_target = [], 0.0, 0.0
    for row in rows:
        if "evaluation" in row:
            point = {"iteration": row["iteration"], "tokens": row["timesteps"], "seconds": seconds}
            known = {"target_tokens": by_target} if counted else {}
            curve.append({**point, **known, "greedy": row["evaluation"]["greedy"]})
        else:
            seconds += row["time/iteration"]
            by_target += target_tokens(row)
    return curve


def target_tokens(row: dict[str, Any]) -> float:
    """Of an iteration: the metric, or all tokens of an agent without it, whose target writes them."""
    return row.get("target_tokens", row.get("tokens", 0))


def _means(train: list[dict[str, Any]]) -> dict[str, float]:
    names = sorted({name for row in train for name in row} - NOT_AVERAGED)
    numeric = {name: [row[name] for row in train if isinstance(row.get(name), int | float)] for name in names}
    return {name: float(np.mean(values)) for name, values in numeric.items() if values}


def read_result(path: Path) -> dict[str, Any]:
    """A finished run's result; raises UsageError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): remove that file's folder, and the run is done again") from None
