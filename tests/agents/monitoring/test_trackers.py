"""Trackio and W&B, the real packages: what stable-baselines3's logger records arrives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Figure, FormatUnsupportedError, Logger

from agents.monitoring.trackers import WRITERS_OF_NUMBERS, Completions, TrackioWriter, WandbWriter
from registry import UsageError
from tests.oracles.trackers import trackio_points, wandb_points, wandb_records


def record(writer: Any, folder: Path) -> None:
    """Two steps by stable-baselines3's logger."""
    logger = Logger(str(folder), [writer])
    table = Completions([{"question": "<b>1 + 1?</b>", "completion": "a lone \ud800", "tokens": 3}])
    logger.record("train/loss", torch.tensor(0.5))
    logger.record("train/share", np.float32(0.25))
    logger.record("note", "x < y")
    logger.record("hidden", 1.0, exclude=(writer.kind,))
    logger.record("completions", table, exclude=WRITERS_OF_NUMBERS)
    logger.dump(step=10)
    logger.record("train/loss", 0.125)
    logger.dump(step=20)
    logger.close()


def test_trackio_has_what_the_logger_records(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    record(TrackioWriter("mine", project="recorded", group="g", config={"lr": 1e-3}), tmp_path)
    first, second = trackio_points("recorded", "mine")
    assert (first["step"], first["train/loss"], first["train/share"]) == (10, 0.5, 0.25)
    assert first["note"] == "x &lt; y" and "hidden" not in first
    assert first["completions"]["_type"] == "trackio.table"
    (row,) = first["completions"]["_value"]
    assert row == {"question": "&lt;b&gt;1 + 1?&lt;/b&gt;", "completion": "a lone \\ud800", "tokens": 3}
    assert (second["step"], second["train/loss"]) == (20, 0.125)


def test_wandb_has_what_the_logger_records(offline: Path) -> None:
    record(WandbWriter("mine", project="recorded", group="g", config={"lr": 1e-3}, id="abc"), offline)
    deadline = time.monotonic() + 60
    while len(wandb_points(offline)) < 2 and time.monotonic() < deadline:  # W&B's own process may still be writing
        time.sleep(0.5)
    first, second = wandb_points(offline)
    assert (first["timesteps"], first["train/loss"], first["train/share"]) == (10, 0.5, 0.25)
    assert first["note"] == "x < y" and "hidden" not in first
    (table,) = offline.glob("wandb/offline-run-*/files/media/table/completions*.table.json")
    stored = json.loads(table.read_text())
    assert stored["columns"] == ["question", "completion", "tokens"]
    assert stored["data"] == [["<b>1 + 1?</b>", "a lone \\ud800", 3]]
    assert (second["timesteps"], second["train/loss"]) == (20, 0.125)
    run = next(one.run for one in wandb_records(offline) if one.HasField("run"))
    assert (run.run_id, run.display_name, run.project, run.run_group) == ("abc", "mine", "recorded", "g")


def test_a_value_that_a_tracker_cannot_show_is_refused(offline: Path) -> None:
    writer = WandbWriter(project="refused")
    with pytest.raises(FormatUnsupportedError, match="exclude"):
        writer.write({"picture": Figure(None, close=False)}, {"picture": ()})
    writer.close()


def test_wandb_without_a_login_is_told_with_the_remedy(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.\nMore.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match=r"No API key configured.; run 'wandb login', or set WANDB_MODE=offline"):
        WandbWriter()
