"""Run folders as a finished run leaves them, made up, so that comparisons can be tested without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.summary import summarise

QUESTIONS = 40
PEAK_BYTES = 1.5e9
SECONDS = {"time/rollout": 0.9, "time/reward": 0.1, "time/update": 0.5, "time/iteration": 1.6, "time/cpu": 1.5}


def evaluation(iteration: int, right: np.ndarray, tokens: int) -> dict:
    """A row of an evaluation; every sampled completion agrees with the greedy one."""
    bits = "".join("1" if r else "0" for r in right)
    measured = {"greedy": float(right.mean()), "right": bits, "statuses": {"right": int(right.sum())}}
    measured |= {"sampled": float(right.mean()), "sampled_right": [4 * int(r) for r in right], "sets": {}}
    measured |= {
        "shown": [dict.fromkeys(("question", "answer", "completion", "extracted"), "<b>&") | {"status": "wrong"}]
    }
    return {
        "iteration": iteration,
        "timesteps": tokens,
        "evaluation": measured,
        "time/evaluation": 2.0,
        "time/cpu": 2.0,
    }


def rows_of(spec: RunSpec, first: float, last: float, pace: float = 1.0) -> list[dict]:
    """Rows of a run whose accuracy goes in a line from ``first`` to ``last``; ``pace`` divides its times."""
    rng = np.random.default_rng([spec.seed, 5])
    luck = rng.permutation(QUESTIONS) / QUESTIONS  # the same for all agents of a seed: paired
    rows = [evaluation(0, luck < first, 0)]
    for n in range(1, spec.iterations + 1):
        nested = spec.agent["id"] != "reft"
        row = {"iteration": n, "tokens": 100, "timesteps": 100 * n, "rollout_accuracy": 0.5}
        row |= {name: seconds / pace for name, seconds in SECONDS.items()}
        row |= {"layers": [0, 1, 3] if nested else [0, 1, 2, 3], "skip_ratio": 0.25 if nested else 0.0}
        row |= {"target_tokens": 75.0 if nested else 100.0}
        row |= {"kl_k1": 0.02 if nested else 0.0, "ess_sequence": 0.8 if nested else 1.0, "D": 0.2 if nested else 0.0}
        row |= {"weight_q01": 0.5, "weight_q50": 1.0, "weight_q99": 1.5, "weight_mean": 1.0, "weight_zero": 0.0}
        rows.append(row | {"rollout_tokens_per_second": 100 * pace})
        if n % spec.evaluated.every == 0 or n == spec.iterations:
            rows.append(evaluation(n, luck < first + (last - first) * n / spec.iterations, 100 * n))
    return rows


def finish(spec: RunSpec, runs: Path, first: float = 0.25, last: float = 0.5, pace: float = 1.0) -> Path:
    """Write the folder of a finished run."""
    folder = runs / spec.hash
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(spec, first, last, pace)
    spec.write(folder / "spec.json")
    (folder / "provenance.json").write_text(json.dumps({"python": "3", "packages": {"torch": "2"}, "commit": "abc"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps({**summarise(spec, rows), "peak_bytes": PEAK_BYTES}))
    return folder
