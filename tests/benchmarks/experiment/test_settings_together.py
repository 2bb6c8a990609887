"""All settings of the loop at once: a run that is killed goes on to the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.training import Training
from registry import UsageError
from tests.oracles.reft_agents import numbers

SETTINGS = {
    "group_size": "2",
    "problems_per_batch": "3",
    "iterations": "4",
    "checkpoint_every": "1",
    "evaluation.problems": "4",
    "evaluation.samples": "1",
    "minibatches": "2",
    "env.reward": "random",
    "env.reward_parts": "overlong,length-penalty",
    "env.reward_parts.overlong.free_tokens": "20",
    "env.reward_parts.overlong.max_tokens": "48",
    "env.reward_parts.length-penalty.weight": "0.002",
    "schedule": "cosine",
    "schedule.warmup": "2",
    "schedule.floor": "0.1",
    "adam_betas": "0.9,0.95",
    "anchor": "kl",
    "anchor.beta": "0.1",
    "anchor.every": "2",
    "anchor.corrected": "true",
    "entropy_bonus": "0.01",
    "correction.dual_clip": "3",
    "mask_truncated": "true",
    "refill_tokens": "60",
    "ema_decay": "0.9",
}


WHOLE = {"batch": "replay", "batch.share": "1", "batch.window": "1"}
GROUPS = {"batch": "replay", "batch.share": "0.4", "batch.by": "group"}
CONTRAST = {"batch": "contrast", "env.problem_options.limit": "4"}  # problems that come again
MIXTURE = {**CONTRAST, "batch": "replay*stale*contrast*expert", "batch.by": "group", "batch.solutions": "2"}
OTHERS = {"anchor": "kl-convex", "anchor.estimator": "k2", "anchor.restart": "2", "reward": "reasoning-gain"}


def train(folder: Path, batch: dict[str, str], stop: int | None = None) -> tuple[list[dict[str, Any]], str]:
    spec = resolve("nested-reft/uniform/truncated-is*ppo-clip", settings={**SETTINGS, **batch})
    training = Training(spec, folder / spec.hash)
    for row in training:
        if row["iteration"] == stop and "evaluation" not in row:
            break
    return [numbers(row) for row in training.rows], str(training.folder)


@pytest.mark.parametrize(
    "batch",
    [{}, WHOLE, GROUPS, {"batch": "stale"}, CONTRAST, {**MIXTURE, **OTHERS}],
    ids=["fresh", "whole", "groups", "stale", "contrast", "mixture"],
)
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, batch: dict[str, str]) -> None:
    whole, one = train(tmp_path / "whole", batch)
    train(tmp_path / "cut", batch, stop=3)
    resumed, other = train(tmp_path / "cut", batch)
    assert len(whole) == 6 and resumed == whole
    trained = [row for row in whole if "evaluation" not in row]
    assert sum(row["tokens"] for row in trained) == trained[-1]["timesteps"]
    assert [row["tokens"] > 0 for row in trained] == [True, batch != WHOLE] * 2
    assert ("age" in trained[-1]) == bool(batch) and ("borrowed_share" in trained[-1]) == ("contrast" in str(batch))
    assert any(row.get("refill_groups", 0) > 0 for row in whole)
    assert {"kl_reference", "entropy", "refill_tokens"} <= set(whole[1])
    for name in ("model/model.safetensors", "model/average.safetensors", "model/references.safetensors"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "cosine", "schedule.warmpu": "1"}, "did you mean 'warmup'"),
        ({"anchor": "kl", "anchor.estimator": "k1"}, "0 in expectation"),
        ({"anchor.beta": "1"}, "no field 'beta'"),
        ({"adam_betas": "0.9"}, "adam_betas"),
        ({"ema_decay": "often"}, "ema_decay='often'"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from benchmarks.experiment.training import make_agent

        make_agent(resolve("reft", settings=settings))
