"""A run's rows in Trackio and W&B, the real packages: each once, after kills too, and no credential is stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.monitoring.trackers import KV_WRITERS
from benchmarks.comparison.arms import arms
from benchmarks.comparison.grid import Grid
from benchmarks.experiment.logs import LOGGED, RunLog, run_name
from benchmarks.run import main
from tests.oracles.finished_runs import rows_of
from tests.oracles.trackers import trackio_points, wandb_points

SPEC = arms(Grid(agents=("reft",), seeds=(0,), set={"iterations": 4, "evaluation.every": 2}))[0].specs[0]
SECRET = "0123456789abcdef0123456789abcdef01234567"


def test_a_missing_package_is_told_with_the_remedy(tmp_path, capsys, monkeypatch):
    for name in KV_WRITERS:
        monkeypatch.setitem(sys.modules, name, None)
        assert main(["--log", name, "--runs", str(tmp_path)]) == 2
        assert "pip install 'nested-reft[logging]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def points_of(rows: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """Step, name and value of some numbers that each kind of row must arrive with."""
    said = []
    for row in rows:
        kind, values = ("evaluation/greedy", row["evaluation"]["greedy"]) if "evaluation" in row else (None, None)
        said.append((row["timesteps"], kind or "train/kl_k1", values if kind else row["kl_k1"]))
    return said


def arrived(points: list[dict[str, Any]], step: str) -> list[tuple[int, str, float]]:
    names = ("train/kl_k1", "evaluation/greedy")
    return [(point[step], name, point[name]) for point in points for name in names if name in point]


WRITE = """
import json, os, signal, sys
from pathlib import Path
from benchmarks.experiment.logs import RunLog
from benchmarks.experiment.spec import RunSpec
folder, names, count = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
log = RunLog(RunSpec.read(folder / "spec.json"), folder, names).__enter__()
for n in range(1, count + 1):
    log.write(rows[n - 1], n)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", list(KV_WRITERS))
def test_each_point_arrives_once_though_the_run_is_killed(name: str, offline: Path, monkeypatch) -> None:
    """A process is killed; the next has lost the last rows, does them again, and goes on; then a finished run."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    folder = offline / SPEC.hash
    folder.mkdir()
    SPEC.write(folder / "spec.json")
    rows = rows_of(SPEC, 0.25, 0.75)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "killed")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", WRITE, str(folder), name, "4"]
    assert subprocess.run(command, env=environment, timeout=300).returncode == -9
    for made in ([2, 3, 4, 5], [len(rows)], [len(rows)]):
        with RunLog(SPEC, folder, [name]) as log:
            for written in made:
                log.write(rows[written - 1], written)
    if name == "trackio":
        found = arrived(trackio_points("killed", run_name(SPEC)), "step")
    else:
        found = arrived(wandb_points(offline), "timesteps")
    assert found == points_of(rows)
    assert json.loads((folder / LOGGED).read_text()) == {name: len(rows)}


def test_a_run_is_logged_and_no_credential_is_stored(offline: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    for variable in ("WANDB_API_KEY", "HF_TOKEN", "TRACKIO_WRITE_TOKEN"):
        monkeypatch.setenv(variable, SECRET)
    settings = ("group_size=2", "problems_per_batch=2", "evaluation.problems=4", "evaluation.samples=1")
    command = ["--iterations", "1", "--runs", str(offline / "runs"), *(f"--set={setting}" for setting in settings)]
    for _ in range(2):  # of a finished run nothing is logged again
        assert main([*command, "--log", "trackio", "--log", "wandb"]) == 0
    (folder,) = (offline / "runs").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (name,) = {run_name(SPEC).replace(SPEC.hash, folder.name)}
    for points in (trackio_points("nested-reft", name), wandb_points(offline)):
        greedy = [point["evaluation/greedy"] for point in points if "evaluation/greedy" in point]
        assert greedy == [row["evaluation"]["greedy"] for row in rows if "evaluation" in row]
        assert sum("completions" in point or "completions._type" in point for point in points) == 2
    for path in folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in "".join(capsys.readouterr())
