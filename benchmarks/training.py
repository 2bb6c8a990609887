"""One run on disk: iterate, evaluate, write as it goes, resume from the last checkpoint to the same numbers."""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import checkpoint
from benchmarks.evaluation import Accuracy, Evaluator
from benchmarks.spec import RunSpec
from registry import UsageError
from registry import agents as agent_registry

SAMPLED_TEMPERATURE = 1.0
TIMES = ("time/rollout", "time/update")


class Training:
    """Iterating over it trains; each item is a row of metrics.jsonl as it is written."""

    def __init__(self, spec: RunSpec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.result: dict[str, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            spec.write(folder / "spec.json")
        except OSError as error:
            raise UsageError(f"run folder {str(folder)!r} cannot be written: {error.strerror}") from None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _locked(self.folder):
            saved = self.folder / "checkpoint"
            resuming = (saved / checkpoint.STATE).is_file()
            agent = make_agent(self.spec, str(saved) if resuming else None)
            if resuming:
                checkpoint.restore(agent, saved)
            (self.folder / "provenance.json").write_text(json.dumps(provenance(), indent=2) + "\n")
            rows = _rows_until(self.folder / "metrics.jsonl", agent.iteration if resuming else -1)
            with (self.folder / "metrics.jsonl").open("w") as self._file:
                for row in rows:
                    self._write(row)
                yield from self._train(agent, bool(rows))
            self._finish(agent)

    def _train(self, agent: Any, resumed: bool) -> Iterator[dict[str, Any]]:
        chosen = self.spec.evaluation
        task = agent.envs.unwrapped.task
        self.evaluator = Evaluator(task, chosen["split"], chosen["problems"])
        if not resumed:
            yield self._evaluate(agent, sampled=True)
        while agent.iteration < self.spec.iterations:
            began = time.perf_counter()
            metrics = agent.iterate()
            row = {"iteration": agent.iteration, **metrics, "layers": list(agent.layers)}
            row["timesteps"] = agent.num_timesteps
            row["time/iteration"] = time.perf_counter() - began
            yield self._write(row)
            last = agent.iteration == self.spec.iterations
            if last or (chosen["every"] and agent.iteration % chosen["every"] == 0):
                yield self._evaluate(agent, sampled=last)
            if not last and agent.iteration % self.spec.checkpoint_every == 0:
                self._file.flush()
                agent.save(self.folder / "checkpoint")

    def _evaluate(self, agent: Any, sampled: bool) -> dict[str, Any]:
        greedy = self.evaluator(agent.target)
        measured: dict[str, Any] = {"greedy": greedy.mean, "statuses": greedy.statuses, "right": _bits(greedy)}
        if sampled:
            # The same seed before and after: the two differ by the weights alone.
            drawn = self.evaluator(agent.target, self.spec.evaluation["samples"], SAMPLED_TEMPERATURE, self.spec.seed)
            measured |= {"sampled": drawn.mean, "sampled_right": drawn.right.sum(1).tolist()}
        return self._write({"iteration": agent.iteration, "timesteps": agent.num_timesteps, "evaluation": measured})

    def _write(self, row: dict[str, Any]) -> dict[str, Any]:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        return row

    def _finish(self, agent: Any) -> None:
        """Save the model, then the result: a folder with a result is a finished run."""
        if (self.folder / "model").exists():
            shutil.rmtree(self.folder / "model")
        agent.save(self.folder / "model")
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        self.result = summarise(self.spec, rows)
        scratch = self.folder / "result.json.partial"
        scratch.write_text(json.dumps(self.result, indent=2) + "\n")
        scratch.rename(self.folder / "result.json")
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)


def make_agent(spec: RunSpec, weights: str | None = None) -> Any:
    """The spec's agent, from its policy or from a checkpoint's weights."""
    arguments = dict(spec.agent)
    component, _ = agent_registry.resolve(arguments.pop("id"))
    env = dict(spec.env)
    if spec.policy != "tiny" and "tokenizer" not in env:
        env |= policy_vocabulary(spec.policy)
    envs = make_envs(env, arguments)
    return component(policy=weights or spec.policy, env=envs, seed=spec.seed, device=spec.device, **arguments)


def make_envs(env: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """The vector env of a spec's ``env``, with as many slots as the agent wants."""
    import gymnasium as gym

    from agents.environment import slots_of

    env = dict(env)
    id = env.pop("id")
    slots = slots_of(
        id, arguments.get("slots"), arguments.get("group_size", 1) * arguments.get("problems_per_batch", 64)
    )
    return gym.make_vec(id, num_envs=slots, copy=False, **env)


def policy_vocabulary(policy: str) -> dict[str, Any]:
    """The env arguments that a policy's own folder settles: its tokenizer and the size of its logits."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(policy)
    except (OSError, ValueError) as error:
        raise UsageError(f"policy {policy!r} could not be loaded: {str(error).splitlines()[0]}") from None
    return {"tokenizer": policy, "vocab_size": int(config.vocab_size)}


def summarise(spec: RunSpec, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a run from its rows: accuracy before and after, cost, off-policy diagnostics (means over
    iterations)."""
    evaluations = [row for row in rows if "evaluation" in row]
    train = [row for row in rows if "evaluation" not in row]
    first, last = evaluations[0]["evaluation"], evaluations[-1]["evaluation"]
    seconds = {name: sum(row[name] for row in train) for name in (*TIMES, "time/iteration")}
    tokens = sum(row["tokens"] for row in train)
    means = {
        name: float(np.mean([row[name] for row in train if name in row]))
        for name in sorted({name for row in train for name in row} - {"iteration", "timesteps", "layers", *TIMES})
    }
    return {
        "agent": spec.agent["id"],
        "seed": spec.seed,
        "hash": spec.hash,
        "accuracy_before": first["greedy"],
        "accuracy_after": last["greedy"],
        "sampled_before": first["sampled"],
        "sampled_after": last["sampled"],
        "right_before": first["right"],
        "right_after": last["right"],
        "tokens": tokens,
        "rollout_tokens_per_second": tokens / seconds["time/rollout"],
        "seconds": seconds["time/iteration"],
        "seconds_rollout": seconds["time/rollout"],
        "seconds_update": seconds["time/update"],
        "curve": [
            {"iteration": row["iteration"], "timesteps": row["timesteps"], "greedy": row["evaluation"]["greedy"]}
            for row in evaluations
        ],
        "means": means,
    }


def provenance() -> dict[str, Any]:
    """Versions, machine, command and commit."""
    packages = ("nested-reft", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit.stdout.strip() or None,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _bits(accuracy: Accuracy) -> str:
    """Right (1) or wrong (0) per question, in order."""
    return "".join("1" if right else "0" for right in accuracy.right[:, 0])


def _rows_until(path: Path, iteration: int) -> list[dict[str, Any]]:
    """The rows of an interrupted run up to its checkpoint; a half-written last line is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["iteration"] > iteration:
            break
        rows.append(row)
    return rows


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; a second process gets a clear error instead of corrupting it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder} is in use by another process; wait for it, or use another --runs folder"
            ) from None
        yield
