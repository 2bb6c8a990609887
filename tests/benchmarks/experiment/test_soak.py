"""A soak: a busy run is killed again and again, ends in the numbers of an undisturbed one to the bit, and its memory
stays flat.

SOAK_SECONDS=3600 python -m pytest -m slow -s tests/benchmarks/experiment/test_soak.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec
from benchmarks.measuring.durable import read_rows
from tests.oracles.small_world import numbers

SECONDS = float(os.environ.get("SOAK_SECONDS", "75"))  # about what the killed run takes
BETWEEN_KILLS = min(50.0, max(30.0, SECONDS / 4))  # seconds, on average
PART_OF_WORK = 0.4  # of those seconds; the rest goes into starts and into what kills throw away
FLAT = 32e6  # bytes that memory may grow by over the last two thirds of a run
BUSY = {
    "patch": "heal",
    "problem_sampler": "curriculum",
    "minibatches": 2,
    "epochs": 2,
    "consistency": 0.1,
    "problems_per_batch": 8,
    "group_size": 4,
    "learning_rate": 2e-5,
    "checkpoint_every": 2,
    "evaluation.every": 5,
    "evaluation.problems": 64,
    "evaluation.samples": 2,
}
CLOCKS = {"time", "seconds", "cpu", "per", "peak"}  # a name with one of these words is of a clock or of a machine


def busy(iterations: int) -> RunSpec:
    """A run whose sampler, problem sampler, patch and optimizer all carry a state."""
    return resolve("nested-reft/budget/defensive*ppo-clip", settings={**BUSY, "iterations": iterations})


def untimed(value: Any) -> Any:
    if isinstance(value, list):
        return [untimed(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: untimed(one) for name, one in value.items() if not CLOCKS & set(name.replace("/", "_").split("_"))}


def rows_of(folder: Path) -> int:
    return len(read_rows(folder / "metrics.jsonl")[0])


class Process:
    """``benchmarks.run`` of a spec, in a process group of its own."""

    def __init__(self, spec: RunSpec, runs: Path) -> None:
        self.folder = runs / spec.hash
        spec.write(runs / "spec.json")
        command = [sys.executable, "-m", "benchmarks.run", "--quiet", "--threads", "1"]
        command += ["--spec", str(runs / "spec.json"), "--runs", str(runs)]
        self.log = (runs / "log").open("ab")
        self.process = subprocess.Popen(command, start_new_session=True, stdout=self.log, stderr=self.log)
        self.memory = psutil.Process(self.process.pid)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def bytes(self) -> int:
        """Resident, of the process and all that it started; 0 once it has ended."""
        try:
            return sum(one.memory_info().rss for one in [self.memory, *self.memory.children(recursive=True)])
        except psutil.Error:
            return 0

    def kill(self) -> None:
        """SIGKILL to the whole group; nothing of it is left."""
        started = self.memory.children(recursive=True) if not self.ended() else []
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert not psutil.wait_procs(started, timeout=10)[1]
        self.log.close()

    def check(self) -> None:
        assert self.process.wait() == 0, (self.log.name, Path(self.log.name).read_text()[-2000:])
        self.log.close()


def iterations_within(seconds: float, runs: Path) -> int:
    """As many as an undisturbed process does in ``seconds`` on this machine."""
    run = Process(busy(1_000), runs)
    while not run.ended() and rows_of(run.folder) < 5:
        time.sleep(0.1)
    before, began = rows_of(run.folder), time.perf_counter()
    time.sleep(10.0)
    pace = (rows_of(run.folder) - before) / (time.perf_counter() - began)
    run.kill()
    return max(int(pace * seconds), 10)


def until_done(spec: RunSpec, runs: Path, rng: random.Random) -> Iterator[int]:
    """Kill a run at random moments and start it again until it has finished; each item, about twice a second, is the
    number of kills so far."""
    kills, run = 0, Process(spec, runs)
    while True:
        due = time.perf_counter() + BETWEEN_KILLS * rng.uniform(0.1, 1.9)
        while not run.ended() and time.perf_counter() < due:
            time.sleep(min(0.5, max(due - time.perf_counter(), 0.0)))
            yield kills
        if run.ended():
            run.check()
            return
        run.kill()
        kills, run = kills + 1, Process(spec, runs)


def growth(samples: np.ndarray) -> float:
    """Bytes that the line of least squares rises by over the last two thirds of ``samples`` [N]."""
    late = samples[len(samples) // 3 :]
    return float(np.polyfit(np.linspace(0.0, 1.0, len(late)), late, 1)[0])


def test_growth_is_of_the_last_two_thirds() -> None:
    start, rest = np.linspace(0.0, 900.0, 100), np.linspace(900.0, 960.0, 200)
    assert growth(np.concatenate([start, rest])) == pytest.approx(60.0)


@pytest.mark.slow
@pytest.mark.timeout(20 * SECONDS + 600)
def test_soak(tmp_path: Path) -> None:
    for name in ("pace", "calm", "killed"):
        (tmp_path / name).mkdir()
    spec = busy(iterations_within(PART_OF_WORK * SECONDS, tmp_path / "pace"))
    began = time.perf_counter()
    calm, kills, memory = Process(spec, tmp_path / "calm"), 0, []
    for so_far in until_done(spec, tmp_path / "killed", random.Random(0)):
        kills = so_far
        if rows_of(calm.folder) > 1:
            memory.append(calm.bytes())
    seconds = time.perf_counter() - began
    while not calm.ended():
        memory.append(calm.bytes())
        time.sleep(0.5)
    calm.check()
    samples = np.array([one for one in memory if one])
    print(f"\n{spec.iterations} iterations in {seconds:.0f} s, {kills} kills")
    print("memory, MB:", *(f"{part.mean() / 1e6:.0f}" for part in np.array_split(samples, 12)), end=", ")
    print(f"growth over the last two thirds {growth(samples) / 1e6:+.1f} MB")

    folders = [tmp_path / name / spec.hash for name in ("calm", "killed")]
    one, other = (numbers(folder) for folder in folders)
    assert len(one) > spec.iterations and one == other
    one, other = (untimed(json.loads((folder / "result.json").read_text())) for folder in folders)
    assert one == other
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    assert kills >= SECONDS / BETWEEN_KILLS / 3
    assert growth(samples) < FLAT
