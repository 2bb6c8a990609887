"""Runs as local processes: a few at a time, each watched through the rows that it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.training import METRICS, RESULT
from benchmarks.measuring.durable import in_use, storage_errors

PROGRAM = (sys.executable, "-m", "benchmarks.run")
POLL_SECONDS = 0.25
END_SECONDS = 10.0
LOG = "log.txt"
BAD_INPUT = 2  # the exit status of a command that refuses what it was given


class Process(Protocol):
    """What runs a run; ``subprocess.Popen`` is one."""

    returncode: Any

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass
class Watched:
    """One run as seen from outside.

    Attributes:
        phase: waiting, starting, training, evaluating, finished, failed, or elsewhere (another process has it).
        reused: it was finished before this comparison began.
        evaluations: rows of evaluations seen.
        error: why it failed.
        card: the GPU that it has, as ``visible_devices`` names it; None where that is not the launcher's to say.
    """

    spec: RunSpec
    folder: Path
    phase: str = "waiting"
    reused: bool = False
    iteration: int = 0
    tokens: int = 0
    accuracy: float | None = None
    tokens_per_second: float | None = None
    evaluations: int = 0
    error: str = ""
    process: Process | None = None
    card: str | None = None
    _read: int = 0
    _file: int = 0
    _times: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.phase in ("finished", "failed")

    @property
    def seconds_an_iteration(self) -> float | None:
        """Mean wall-clock seconds of the iterations seen."""
        return sum(self._times) / len(self._times) if self._times else None

    def look(self) -> None:
        """Read the rows written since the last look."""
        path = self.folder / METRICS
        if not path.is_file():
            return
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._file:  # a resumed run replaces the file
                self._file, self._read, self.evaluations = inode, 0, 0
            file.seek(self._read)
            chunk = file.read()
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except ValueError:
                continue  # the run itself will find the damaged line, and say so

    def _take(self, row: dict[str, Any]) -> None:
        self.iteration = int(row["iteration"])
        if "evaluation" in row:
            self.accuracy = row["evaluation"]["greedy"]
            self.evaluations += 1
        else:
            self.tokens_per_second = row.get("rollout_tokens_per_second")
            self.tokens = row.get("timesteps", 0)
            self._times.append(row["time/iteration"])
        every = self.spec.evaluated.every
        over = self.spec.used(self.iteration, self.tokens, sum(self._times)) >= 1
        due = "evaluation" not in row and (over or (every and self.iteration % every == 0))
        if not self.over:
            self.phase = "evaluating" if due else "training"


def visible_devices() -> str:
    """The environment variable that says which GPUs a process may use: on AMD's either will do, and theirs wins."""
    import torch

    own = "HIP_VISIBLE_DEVICES"
    return own if torch.version.hip is not None and os.environ.get(own) else "CUDA_VISIBLE_DEVICES"


def cards() -> list[str]:
    """The GPUs that this process may use, as ``visible_devices`` names them."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get(visible_devices())
    names = [name.strip() for name in named.split(",")] if named else [str(n) for n in range(count)]
    return names if count and named and "MIG-" in named else names[:count]  # of such parts CUDA counts the first alone


Start = Callable[[Watched, int, IO[bytes]], Process]  # a run, its threads, its log


def local_process(run: Watched, threads: int, log: IO[bytes], trackers: Sequence[str] = ()) -> Process:
    """A process of this machine, which ends when this one does; ``trackers`` get its rows."""
    command = [*PROGRAM, "--spec", str(run.folder / "spec.json"), "--quiet", "--threads", str(threads)]
    command += ["--runs", str(run.folder.parent), "--parent", str(os.getpid())]
    command += [f"--log={name}" for name in trackers]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if run.card is not None:
        environment[visible_devices()] = run.card
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    )


class Launcher:
    """Runs every spec that has no result yet, ``jobs`` at a time.

    ``start`` makes a run's process, by default on this machine. A run that fails is kept and reported and stops no
    other. A run that another process holds is followed, and taken over if that process ends without a result. Runs with
    ``device=cuda`` are spread over ``cards``, if there are any.
    """

    def __init__(
        self,
        specs: Sequence[RunSpec],
        runs: Path,
        jobs: int,
        threads: int,
        start: Start | None = None,
        cards: Sequence[str] = (),
    ) -> None:
        self.jobs = jobs
        self.threads = threads
        self.start = start or local_process
        self.cards = cards
        self.watched = [Watched(spec, runs / spec.hash) for spec in specs]
        for run in self.watched:
            if (run.folder / RESULT).is_file():
                run.phase, run.reused, run.iteration = "finished", True, run.spec.iterations or 0
                run.look()

    def __iter__(self) -> Iterator[list[Watched]]:
        """The runs' states, again and again, until all are over."""
        try:
            while not all(run.over for run in self.watched):
                self._advance()
                yield self.watched
                time.sleep(POLL_SECONDS)
        finally:
            self.stop()

    def _advance(self) -> None:
        for run in self.watched:
            if run.over:
                continue
            run.look()
            if run.process is not None and run.process.poll() is not None:
                self._close(run)
            elif run.process is None and (run.folder / RESULT).is_file():
                run.phase = "finished"
        running = sum(run.process is not None for run in self.watched)
        for run in self.watched:
            if running >= self.jobs:
                break
            if run.process is None and not run.over:
                if in_use(run.folder):
                    run.phase = "elsewhere"
                    continue
                self._start(run)
                running += 1

    def _start(self, run: Watched) -> None:
        with storage_errors(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            run.spec.write(run.folder / "spec.json")
            log = (run.folder / LOG).open("ab")
        if self.cards and run.spec.device == "cuda":
            taken = [other.card for other in self.watched if other.process is not None]
            run.card = min(self.cards, key=taken.count)
        with log:
            run.process = self.start(run, self.threads, log)
        run.phase = "starting"

    def _close(self, run: Watched) -> None:
        assert run.process is not None
        status, run.process = run.process.returncode, None
        if status == 0 and (run.folder / RESULT).is_file():
            run.phase = "finished"
        elif in_use(run.folder):
            run.phase = "elsewhere"
        else:
            run.phase = "failed"
            run.error = _last_line(run.folder / LOG) or f"ended with status {status}"
            if status < 0:
                run.error = f"killed by signal {-status}"
            rows = run.folder / METRICS
            if status == BAD_INPUT and not (rows.is_file() and rows.stat().st_size):
                shutil.rmtree(run.folder, ignore_errors=True)  # what is refused before its first row is no run

    def stop(self) -> None:
        """End the processes that are still running; their checkpoints stay."""
        running = [run.process for run in self.watched if run.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else ""
