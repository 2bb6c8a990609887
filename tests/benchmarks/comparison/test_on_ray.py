"""Runs on a Ray cluster of two nodes with a processor each, their workers killed in mid-run."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from benchmarks.comparison.launch import Launcher
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.training import run

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = {"iterations": 8, "checkpoint_every": 2, "problems_per_batch": 2, "group_size": 2, "env.max_new_tokens": 8}
SMALL |= {"env.reward": "random", "evaluation.problems": 4, "evaluation.every": 2, "evaluation.samples": 1}
CLOCKED = ("seconds", "time", "peak_bytes", "per_second", "means", "curve")


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    from benchmarks.comparison.on_ray import connect

    with pytest.MonkeyPatch.context() as patch:
        # Ray gives a worker up that takes a minute to start, as it does where others have the processors.
        patch.setenv("RAY_worker_register_timeout_seconds", "600")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", nodes.address)
        connect()
        yield
    ray.shutdown()
    nodes.shutdown()


def workers() -> list[int]:
    """Processes that train."""
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] and "ray::_train" in p.info["cmdline"][0]
    ]


def numbers(result: dict) -> dict:
    """What no clock decides."""
    return {k: v for k, v in result.items() if not any(word in k for word in CLOCKED)}


def test_a_killed_worker_is_replaced_and_the_numbers_stay(cluster, tmp_path):
    from benchmarks.comparison.on_ray import ray_task

    specs = [resolve("nested-reft/uniform/token-is", settings=SMALL, seed=seed) for seed in (0, 1)]
    launcher = Launcher(specs, tmp_path / "ray", jobs=2, threads=1, start=ray_task)
    most, killed = 0, None
    for state in launcher:
        alive = workers()
        most = max(most, len(alive))
        if killed is None and alive and (state[0].folder / "checkpoint").exists():
            killed = alive
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
    assert killed and most == 2
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2  # with one processor each: a run on either
    assert [watched.phase for watched in launcher.watched] == ["finished", "finished"], launcher.watched
    for spec in specs:
        alone = run(spec, tmp_path / "alone", threads=1)
        there = json.loads((tmp_path / "ray" / spec.hash / "result.json").read_text())
        assert numbers(there) == numbers(alone)


def test_a_run_that_fails_is_reported(cluster, tmp_path):
    from benchmarks.comparison.on_ray import ray_task

    spec = resolve("reft", settings=SMALL, policy="/nowhere")
    launcher = Launcher([spec], tmp_path, jobs=1, threads=1, start=ray_task)
    list(launcher)
    assert launcher.watched[0].phase == "failed" and "nowhere" in launcher.watched[0].error
