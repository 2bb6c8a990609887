"""One run on disk: iterate, evaluate, write as it goes, resume from the last checkpoint to the same numbers."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from agents import ReFT
from agents.arguments import check_groups
from agents.distributed import Ranks, join
from agents.environments import make_by_id, slots_of
from agents.memory import NotEnoughMemory, fitting_slots, peak_bytes
from agents.saving import checkpoint
from agents.saving.folder import clear_partial
from agents.schedules import Spent
from benchmarks.experiment import BUDGETS, follows
from benchmarks.experiment.data import fingerprint_data
from benchmarks.experiment.evaluation import Evaluator
from benchmarks.experiment.held_out import SLOTS
from benchmarks.experiment.logs import METRICS, RunLog
from benchmarks.experiment.progress import RunProgress
from benchmarks.experiment.spec import RunSpec, agent_arguments
from benchmarks.experiment.summary import evaluation_rows, read_result, seconds_spent, summarise, training_rows
from benchmarks.measuring.durable import json_text, locked, read_rows, storage_errors, strict, write_whole
from benchmarks.measuring.provenance import provenance
from envs.task import TaskSpec
from policies.pretrained.architecture import read_architecture
from policies.pretrained.fingerprint import fingerprint
from policies.pretrained.load import load_config
from registry import UsageError
from registry.memory import return_freed

RESULT = "result.json"
AVERAGED = "model-averaged"  # of a run with ema_decay, whose accuracy is of that
FINISHED = -1


class Training:
    """Iterating over it trains; each item is a row of metrics.jsonl as it is written.

    A run is a function of its spec: what an interruption leaves half-done (rows after the last checkpoint, partial
    files) is dropped and done again. Rows live on disk alone, so that memory does not grow with a run's length.

    Attributes:
        written: how many rows there are.
        seconds: of training so far, evaluations left out.
        result: of the finished run; of processes that do not lead, empty.
    """

    def __init__(self, spec: RunSpec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.written = 0
        self.seconds = 0.0
        self.result: dict[str, Any] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of metrics.jsonl."""
        return read_rows(self.folder / METRICS)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.ranks = self._ranks()
        # The same numbers again, on several threads too. CUDA lacks some deterministic kernels: there it warns.
        torch.use_deterministic_algorithms(True, warn_only=self.spec.device != "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        is_new = not self.folder.exists()
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder) if self.ranks.leader else nullcontext():
            try:
                yield from self._run()
            except UsageError:
                if is_new and self.ranks.leader and not self.written:  # what is refused before its first row is no run
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def _run(self) -> Iterator[dict[str, Any]]:
        iteration = self.ranks.agree(self._prepare() if self.ranks.leader else 0)
        if iteration == FINISHED:
            self.result = json.loads((self.folder / RESULT).read_text())
            return
        self._count()
        agent = self._agent(iteration)
        if self.ranks.leader:
            self._check_room(agent)
        with storage_errors(self.folder):
            self._file = (self.folder / METRICS if self.ranks.leader else Path(os.devnull)).open("a", encoding="utf-8")
        with self._file:
            yield from self._train(agent)
        self._finish(agent)

    def _count(self) -> None:
        """``written`` and ``seconds`` of the rows that are there."""
        rows = self.rows
        self.written, self.seconds = len(rows), seconds_spent(rows)

    def _ranks(self) -> Ranks:
        ranks = join(self.spec.device)
        if ranks.size > 1 and not getattr(agent_arguments(self.spec.agent)[0], "parallel", False):
            raise UsageError(f"agent {self.spec.agent['id']!r} trains in one process: start it without torchrun")
        return ranks

    def _prepare(self) -> int:
        """Make the folder ready; returns the iteration that its checkpoint goes on from, 0 to start, or FINISHED."""
        if (self.folder / RESULT).is_file():  # another process finished it while this one waited
            return FINISHED
        with storage_errors(self.folder):
            self._clear_partial()
            self.spec.write(self.folder / "spec.json")
            about = provenance() | ({"processes": self.ranks.size} if self.ranks.size > 1 else {})
            write_whole(self.folder / "provenance.json", json_text(about, indent=2) + "\n")
            iteration, rows = self._resume_point()
            write_whole(self.folder / METRICS, "".join(json_text(row) + "\n" for row in rows))
        return iteration

    def _clear_partial(self) -> None:
        """Drop what a kill left half-written."""
        for name in ("checkpoint", "model"):
            clear_partial(self.folder / name)
        for scratch in self.folder.glob(".*.partial"):
            scratch.unlink()

    def _resume_point(self) -> tuple[int, list[dict[str, Any]]]:
        """The checkpoint's iteration and rows; 0 and none without a checkpoint whose rows are all there."""
        saved = self.folder / "checkpoint"
        if not saved.is_dir():
            return 0, []
        fault = checkpoint.fault(saved)
        if fault:
            warnings.warn(f"{fault}, so the run starts again from the beginning", stacklevel=4)
            shutil.rmtree(saved)
            return 0, []
        iteration = int(json.loads((saved / checkpoint.STATE).read_text())["iteration"])
        rows, damaged = read_rows(self.folder / METRICS)
        rows = [row for row in rows if row["iteration"] <= iteration]
        if self._complete(rows, iteration):
            return iteration, rows
        where = f"line {damaged} of {METRICS} is damaged" if damaged else f"{METRICS} has lost rows"
        warnings.warn(f"{self.folder}: {where}, so the run starts again from the beginning", stacklevel=4)
        shutil.rmtree(saved)
        return 0, []

    def _agent(self, iteration: int) -> Any:
        """The agent, at the checkpoint or at the start."""
        if not iteration:
            return make_agent(self.spec)
        saved = self.folder / "checkpoint"
        agent = make_agent(self.spec, str(saved))
        checkpoint.restore(agent, saved)
        return agent

    def _check_room(self, agent: Any) -> None:
        """Refuse a disk too full for a checkpoint beside the one that it replaces, before it costs any training."""
        saved = checkpoint.least_bytes(agent)
        beside = self.spec.iterations is None or self.spec.iterations > self.spec.checkpoint_every
        needed = saved * (2 if beside and not (self.folder / "checkpoint").is_dir() else 1)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UsageError(
                f"run folder {str(self.folder)!r} lies on a disk with {free / 1e6:,.0f} MB free, and checkpoints of "
                f"this agent take {needed / 1e6:,.0f} MB more: free some space, or choose another --runs folder"
            )

    def _complete(self, rows: list[dict[str, Any]], iteration: int) -> bool:
        trained = [row["iteration"] for row in training_rows(rows)]
        every = self.spec.evaluated.every
        due = [n for n in range(iteration + 1) if n == 0 or (every and n % every == 0)]
        return trained == list(range(1, iteration + 1)) and [r["iteration"] for r in evaluation_rows(rows)] == due

    def _train(self, agent: Any) -> Iterator[dict[str, Any]]:
        chosen = self.spec.evaluated
        task = agent.envs.unwrapped.task
        wanted = min(SLOTS, chosen.problems)
        slots = fitting_slots(agent.target, task, agent.optimizer, wanted)
        if slots < wanted:
            _tell_of_slots("evaluations", max(1, slots), wanted)
        self.evaluator = Evaluator(task, chosen, self.ranks, max(1, slots))  # one has been found to fit
        if not self.written:
            yield self._evaluate(agent, whole=True)
        # What imports have left lives as long as the process: to look through it again and again takes up to a fifth of
        # a small model's rollouts.
        gc.collect()
        gc.freeze()
        last = self._over(agent)
        while not last:
            began, cpu = time.perf_counter(), time.process_time()
            metrics = agent.iterate(spent=self._spent())
            row = {"iteration": agent.iteration, **metrics, "layers": list(agent.layers)}
            row["timesteps"] = agent.num_timesteps
            row["time/iteration"] = time.perf_counter() - began
            row["time/cpu"] = time.process_time() - cpu
            yield self._write(row)
            last = self._over(agent)
            if last or (chosen.every and agent.iteration % chosen.every == 0):
                yield self._evaluate(agent, whole=last)
            if not last and agent.iteration % self.spec.checkpoint_every == 0:
                with storage_errors(self.folder):
                    agent.save(self.folder / "checkpoint")
                return_freed()

    def _spent(self) -> Spent:
        """What share of its budget the run has spent with some iterations and tokens, at the moment it is asked in an
        iteration that begins now; by the leader's clock."""
        before, began = self.seconds, time.perf_counter()

        def spent(iterations: int, tokens: int) -> float:
            seconds = before + time.perf_counter() - began
            seconds = self.ranks.agree(round(1e6 * seconds)) / 1e6 if self.spec.seconds else 0.0
            return min(1.0, self.spec.used(iterations, tokens, seconds))

        return spent

    def _over(self, agent: Any) -> bool:
        """Whether a budget is used up; by the leader's clock."""
        used = self.spec.used(agent.iteration, agent.num_timesteps, self.seconds)
        return bool(self.ranks.agree(used >= 1))

    def _evaluate(self, agent: Any, whole: bool) -> dict[str, Any]:
        """Greedy accuracy; at both ends of a run also sampled accuracy, the further sets and sample completions."""
        began, cpu = time.perf_counter(), time.process_time()
        with getattr(agent, "averaged", nullcontext)():
            measured = (
                self.evaluator.measure(agent.target, self.spec.seed) if whole else self.evaluator.glance(agent.target)
            )
        row = {"iteration": agent.iteration, "timesteps": agent.num_timesteps, "evaluation": measured}
        row |= {"time/evaluation": time.perf_counter() - began, "time/cpu": time.process_time() - cpu}
        return self._write(row)

    def _write(self, row: dict[str, Any]) -> dict[str, Any]:
        row = strict(row)
        with storage_errors(self.folder):
            self._file.write(json_text(row) + "\n")
            self._file.flush()
        self.written += 1
        self.seconds += row.get("time/iteration", 0.0)
        return row

    def _finish(self, agent: Any) -> None:
        """Save the model, then the result: a folder with a result is a finished run."""
        if not (self.ranks.leader or agent.target.sharded):
            return
        averaged = getattr(agent, "average", None) is not None
        with storage_errors(self.folder):
            agent.save(self.folder / "model")
            if averaged:
                with agent.averaged():
                    agent.target.save(self.folder / AVERAGED)
            if not self.ranks.leader:
                return
            self.result = strict({**summarise(self.spec, self.rows), "peak_bytes": peak_bytes()})
            if averaged:
                agent.envs.unwrapped.task.codec.save(self.folder / AVERAGED)
            write_whole(self.folder / RESULT, json_text(self.result, indent=2) + "\n")
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)


def make_agent(spec: RunSpec, weights: str | None = None) -> Any:
    """The spec's agent, from its policy or from a checkpoint's weights."""
    component, arguments = agent_arguments(spec.agent)
    if spec.data not in (None, fingerprint_data(spec.problem_sets)):
        raise UsageError(
            f"the files of the problems ({', '.join(map(str, filter(None, spec.problem_sets)))}) hold something else "
            "than when the run was made: restore them, or make the spec anew from --agent and --set"
        )
    if weights is None and spec.weights not in (None, fingerprint(spec.policy)):
        raise UsageError(
            f"policy {spec.policy!r} has other weights ({fingerprint(spec.policy)}) than the spec was made for "
            f"({spec.weights}): restore those, or make the spec anew from --agent and --set"
        )
    env = dict(spec.env)
    if spec.policy != "tiny" and env.get("tokenizer") == spec.policy and env.get("vocab_size") is None:
        env["vocab_size"] = int(load_config(spec.policy).vocab_size)  # may be padded beyond the tokenizer
    longest = sum(env.get(name, getattr(TaskSpec, name)) for name in ("max_prompt_tokens", "max_new_tokens"))
    read_architecture(load_config(weights or spec.policy)).check_length(longest, warn=False)  # before slots so long
    given: dict[str, Any] = {"policy": weights or spec.policy, "seed": spec.seed, "device": spec.device}
    envs = make_envs(env, arguments)
    try:
        return component(env=envs, **given, **arguments)
    except NotEnoughMemory as error:
        named = arguments.get("slots") is not None
        if not error.slots or named or not issubclass(component, ReFT):  # of another agent they are a hyper-parameter
            raise
        _tell_of_slots("rollouts", error.slots, envs.num_envs)
        arguments = {**arguments, "slots": error.slots}
    return component(env=make_envs(env, arguments), **given, **arguments)


def _tell_of_slots(what: str, slots: int, wanted: int) -> None:
    print(f"note: memory holds {slots} slots of {what}, not {wanted}: slower, the same numbers", file=sys.stderr)


def make_envs(env: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """The vector env of a spec's ``env``, with as many slots as the agent wants."""
    env = dict(env)
    id = env.pop("id")
    group_size, problems = arguments.get("group_size", 1), arguments.get("problems_per_batch", 64)
    check_groups(group_size, problems)
    episodes = group_size * -(-problems // join().size)
    return make_by_id(id, slots_of(id, arguments.get("slots"), episodes), **env)


def _tell_of_another_budget(spec: RunSpec, runs: Path) -> None:
    """A budget is a part of what a run is: say so where the same run with another one is there already."""
    own = {name: getattr(spec, name) for name in BUDGETS}
    for path in sorted(runs.glob("*/spec.json")):
        with suppress(OSError, ValueError, TypeError):
            stored = RunSpec.read(path)
            if replace(stored, **own).hash == spec.hash:
                given = {name: getattr(stored, name) for name in BUDGETS}
                budget = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
                print(
                    f"note: {path.parent} is this run with another budget ({budget}). A run's budget is a part of it: "
                    f"this one starts from the beginning. To train that one's model on, give --policy "
                    f"{path.parent / 'model'}",
                    file=sys.stderr,
                )
                return


def run(
    spec: RunSpec,
    runs: Path,
    quiet: bool = True,
    threads: int | None = None,
    parent: int | None = None,
    log: Sequence[str] = (),
) -> dict[str, Any]:
    """Train ``spec``'s agent in ``runs/<hash>``, going on from its checkpoint if there is one; returns the result.

    ``parent`` is the process whose end also ends this run, after the iteration it is in. ``log`` names the trackers
    (``agents.monitoring.trackers.KV_WRITERS``) that get its rows; they get those of a finished run, too.
    """
    folder = runs / spec.hash
    finished = folder / RESULT
    if finished.is_file():
        log_finished(spec, folder, log)
        return read_result(finished)
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)
    disable_progress_bar()
    if not quiet and not follows() and not folder.exists():
        _tell_of_another_budget(spec, runs)
    training = Training(spec, folder)
    with RunProgress(spec, quiet or follows()) as progress, RunLog(spec, folder, () if follows() else log) as trackers:
        for row in training:
            progress.show(row)
            trackers.write(row, training.written)
            if parent is not None and os.getppid() != parent:
                raise KeyboardInterrupt
    return training.result


def log_finished(spec: RunSpec, folder: Path, log: Sequence[str]) -> None:
    """Give a finished run's rows to the trackers that have not had them."""
    if log and not follows():
        with RunLog(spec, folder, log) as trackers:
            rows, _ = read_rows(folder / METRICS)
            trackers.write(rows[-1], len(rows))
