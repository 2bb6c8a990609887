"""Runs as tasks of a Ray cluster: ``python -m benchmarks.compare --launcher ray`` (the optional extra ``ray``).

Ray schedules, and starts a task again whose worker died; the run then goes on from its checkpoint. The ``--runs``
folder has to be one that all workers see. ``RAY_ADDRESS`` names a cluster; without it one is started on this machine.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.comparison.launch import Watched
from registry import UsageError

RETRIES = 3  # of a run whose worker died


def connect() -> None:
    """Join the cluster, or start a local one. Raises UsageError where Ray is not installed or not reachable."""
    try:
        import ray
    except ImportError:
        raise UsageError("--launcher ray needs Ray: pip install 'nested-reft[ray]'") from None
    if ray.is_initialized():
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "local")
        raise UsageError(f"the Ray cluster at {address!r} cannot be joined: {error}") from error


def _train(spec: str, runs: str, threads: int, trackers: Sequence[str]) -> None:
    """In a worker: one run, whole."""
    from benchmarks.experiment.spec import RunSpec
    from benchmarks.experiment.training import run

    run(RunSpec.read(Path(spec)), Path(runs), threads=threads, log=trackers)


class RayTask:
    """A task with the interface of a process."""

    def __init__(self, reference: Any, log: Path) -> None:
        self.reference = reference
        self.log = log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The status, None while it runs."""
        import ray

        if self.returncode is None and ray.wait([self.reference], timeout=0)[0]:
            try:
                ray.get(self.reference)
                self.returncode = 0
            except ray.exceptions.RayError as error:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(f"{error}\n")
                self.returncode = 1
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The status at its end; raises ``subprocess.TimeoutExpired`` as a process would."""
        import ray

        if not ray.wait([self.reference], timeout=timeout)[0]:
            raise subprocess.TimeoutExpired("ray task", timeout or 0.0)
        return self.poll() or 0

    def terminate(self) -> None:
        """End its worker at once; the run's checkpoint stays."""
        import ray

        ray.cancel(self.reference, force=True)

    kill = terminate


def ray_task(run: Watched, threads: int, log: IO[bytes], trackers: Sequence[str] = ()) -> RayTask:
    """Submit a run; it takes as many of the cluster's processors as it has threads, and a GPU if it trains on one.
    ``trackers`` get its rows."""
    import ray

    fresh = ray.remote(max_calls=1)(_train)  # a worker for each run, as a process of its own would be
    remote = fresh.options(
        num_cpus=threads,
        num_gpus=1 if run.spec.device.startswith("cuda") else 0,
        max_retries=RETRIES,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    reference = remote.remote(str(run.folder / "spec.json"), str(run.folder.parent), threads, list(trackers))
    return RayTask(reference, Path(log.name))
