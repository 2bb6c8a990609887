"""What a comparison will cost, before it runs: time and memory of each run.

Finished runs of the same policy and environment are the best guide; without one, a model of the work: twice the
parameters in operations per rollout token, six times per updated token, at the matrix product speed of this machine.
That is a guide to within a factor of three, no more.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.update import microbatch_budget
from benchmarks.comparison.board import clock
from benchmarks.comparison.grid import Arm
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.training import RESULT
from registry import UsageError

STARTUP_SECONDS = 8.0
LAYER_SECONDS = 1e-4  # of one decode step's dispatch, whatever the size
LENGTH_SHARE = 0.5  # of the token budget that a completion uses
PROCESS_BYTES = 0.6e9
EFFICIENCY = 0.4  # of the measured matrix product speed, in the thin products of a real model


@dataclass(frozen=True)
class Estimate:
    """Of one run: seconds, bytes, and whether from finished runs (``measured``) or from the model of the work."""

    seconds: float
    bytes: float
    measured: bool


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: parameters, layers and bytes of keys and values per token."""

    parameters: float
    layers: int
    vocabulary: int
    kv_bytes: float


class Estimator:
    """Estimates against the finished runs under ``runs``."""

    def __init__(self, runs: Path) -> None:
        self.shapes: dict[str, Shape] = {}
        self.speed: float | None = None
        self.past = [_read(path) for path in sorted(runs.glob(f"*/{RESULT}"))]

    def __call__(self, spec: RunSpec) -> Estimate:
        """Of one run, on one process."""
        found = [
            (past, result)
            for past, result in (pair for pair in self.past if pair)
            if past.policy == spec.policy and past.env == spec.env and past.device == spec.device
        ]
        same = [pair for pair in found if pair[0].agent["id"] == spec.agent["id"]] or found
        if same:
            return self._scaled(spec, *same[-1])
        return self._modelled(spec)

    def _scaled(self, spec: RunSpec, past: RunSpec, result: dict[str, Any]) -> Estimate:
        share = completions(spec) / completions(past) / result["iterations"]
        training = result["seconds"] * share
        count = iterations(spec, training, result["tokens"] * share)
        evaluation = result["seconds_evaluation"] * evaluated(spec, count) / evaluated(past, result["iterations"])
        seconds = STARTUP_SECONDS + training * count + evaluation
        return Estimate(seconds, result.get("peak_bytes", PROCESS_BYTES), True)

    def _modelled(self, spec: RunSpec) -> Estimate:
        from envs.task import TaskSpec

        shape = self.shapes.setdefault(spec.policy, _shape(spec.policy))
        self.speed = self.speed or _product_speed()
        budget = spec.env.get("max_new_tokens", _registered(spec.env["id"]).get("max_new_tokens"))
        budget = budget or TaskSpec().max_new_tokens
        prompt = spec.env.get("max_prompt_tokens", TaskSpec().max_prompt_tokens) * LENGTH_SHARE
        written = completions(spec) * budget * LENGTH_SHARE
        skipped = float(spec.agent.get("sampler", {}).get("ratio", 0.0))
        read = completions(spec) / spec.agent.get("group_size", 1) * prompt
        operations = 2 * shape.parameters * (written + read) * (1 - skipped)
        operations += 6 * shape.parameters * (written + read) * spec.agent.get("epochs", 1)
        slots = spec.agent.get("slots") or min(completions(spec), 256)
        steps = budget * math.ceil(completions(spec) / slots)
        iteration = operations / (self.speed * EFFICIENCY) + steps * shape.layers * LAYER_SECONDS
        count = iterations(spec, iteration, written)
        checks = (
            2 * shape.parameters * evaluated(spec, count) * (budget * LENGTH_SHARE + prompt) / (self.speed * EFFICIENCY)
        )
        seconds = STARTUP_SECONDS + iteration * count + checks
        tokens = min(
            microbatch_budget(spec.agent.get("microbatch_tokens"), spec.device),
            completions(spec) * (prompt + budget * LENGTH_SHARE),
        )
        memory = PROCESS_BYTES + 20 * shape.parameters + slots * (prompt / LENGTH_SHARE + budget) * shape.kv_bytes
        memory += tokens * (shape.layers * shape.kv_bytes + 8 * min(shape.vocabulary, 4096))
        return Estimate(seconds, memory, False)


def completions(spec: RunSpec) -> int:
    """Completions of one iteration."""
    return int(spec.agent.get("group_size", 1)) * int(spec.agent.get("problems_per_batch", 64))


def iterations(spec: RunSpec, seconds: float, tokens: float) -> int:
    """Iterations of a run, if each takes as many seconds and tokens."""
    return math.ceil(1 / spec.used(1, max(1, round(tokens)), max(seconds, 1e-6)))


def evaluated(spec: RunSpec, count: int) -> int:
    """Completions of all evaluations of a run of ``count`` iterations."""
    chosen = spec.evaluated
    glances = count // chosen.every if chosen.every else 1
    return chosen.problems * (1 + glances + 2 * chosen.samples + 2 * len(chosen.sets))


def _read(path: Path) -> tuple[RunSpec, dict[str, Any]] | None:
    """A finished run; None where its folder is of another version or damaged, which says nothing of cost."""
    try:
        return RunSpec.read(path.parent / "spec.json"), json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _registered(env: str) -> dict[str, Any]:
    import gymnasium as gym

    return dict(gym.spec(env).kwargs)


def _shape(policy: str) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM

    from policies.pretrained.load import load_config

    config = load_config(policy)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        parameters=float(sum(parameter.numel() for parameter in model.parameters())),
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        kv_bytes=8.0 * config.num_hidden_layers * heads * size,
    )


def _product_speed(size: int = 512) -> float:
    """Operations a second of a square float32 product on the threads in use."""
    import torch

    a = torch.ones(size, size)
    a @ a
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        a @ a
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - began)


def print_plan(arms: Sequence[Arm], runs: Path, jobs: int, threads: int) -> None:
    """The runs of a comparison with their estimated time and memory, on standard output."""
    import torch

    torch.set_num_threads(threads)
    estimator = Estimator(runs)
    console = Console()
    table = Table(title=f"{sum(len(arm.specs) for arm in arms)} runs", title_justify="left")
    table.add_column("agent", overflow="fold")
    for name in ("seed", "folder", "state", "time", "memory"):
        table.add_column(name, justify="right" if name in ("seed", "time", "memory") else "left")
    total, largest, modelled = 0.0, 0.0, False
    unknown: dict[str, None] = {}
    for arm in arms:
        for spec in arm.specs:
            done = (runs / spec.hash / RESULT).is_file()
            state = "finished" if done else "half-done" if (runs / spec.hash / "checkpoint").exists() else "to do"
            try:
                guess = estimator(spec)
            except UsageError as error:  # the model is not there yet; the plan can be looked at all the same
                unknown[str(error)] = None
                table.add_row(arm.label, str(spec.seed), spec.hash, state, "unknown", "unknown")
                continue
            total += 0.0 if done else guess.seconds
            largest = max(largest, guess.bytes)
            modelled |= not guess.measured
            cost = "" if done else clock(guess.seconds)
            table.add_row(arm.label, str(spec.seed), spec.hash, state, cost, f"{guess.bytes / 1e9:.1f} GB")
    console.print(table)
    for message in unknown:
        console.print(f"no estimate: {message}", highlight=False)
    if not largest:
        return
    console.print(
        f"about {clock(total / jobs)} with {jobs} run(s) at a time of {threads} thread(s), "
        f"{largest * jobs / 1e9:.1f} GB of memory; "
        + ("estimated from the work, to a factor of three" if modelled else "from finished runs"),
        highlight=False,
    )
