"""Warms up any pretrained policy on worked solutions: ReFT's supervised first stage (arXiv 2401.08967, section 3.1).

    python -m agents.warm_up --policy DIR --env MathReason/svamp-v0 --epochs 2 --out runs/warm

A few epochs of cross-entropy on the worked solutions of the training split teach the format that the verifier reads;
``agents.sft`` takes the steps. The reinforced stage then starts from the folder that this command writes
(``--policy runs/warm``). Beside the model it holds metrics.jsonl, a line a step and an evaluation, and warm_up.json,
settings and result. A killed command goes on from its last checkpoint to the same numbers. A source without worked
solutions cannot be used. The built-in tiny model has a command of its own, ``python -m agents.train_tiny``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from agents import checkpoint
from agents.held_out import SLOTS, HeldOut, refuse_overlap, shared_options
from agents.memory import fitting_slots, peak_bytes
from agents.schedules import Linear
from agents.sft import SFT
from envs import check_id
from envs.task import Task, TaskSpec
from policies.pretrained.fingerprint import fingerprint
from policies.pretrained.load import load_config
from registry import UnknownField, UsageError, fields_of, parse_value
from registry.command import assignment, command
from registry.fields import REQUIRED

METRICS, RECORD, LOCK = "metrics.jsonl", "warm_up.json", ".lock"
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class SupervisedWarmup:
    """What is trained, on what and how: with equal settings the same numbers.

    Attributes:
        policy: a Hugging Face folder or hub id.
        env: the environment id whose training split is learnt from.
        env_arguments: of the environment, as ``envs.task.TaskSpec`` has them.
        epochs: passes over the training split.
        batch_size: demonstrations per optimizer step.
        learning_rate: peak of AdamW, after 10 % of the steps, then falling linearly to zero.
        problems: how many problems of the split, its first ones; 0 for all (an unlimited source needs a number).
        skip: the chance that a step leaves out layers, 1 to a fifth of them (``agents.supervised.draw_layers``).
        seed: of the order, of the layers left out and of adapters.
        lora_rank, dtype, microbatch_tokens, gradient_checkpointing, device: as for ``agents.reft.ReFT``.
        evaluation_problems: how many held-out problems; 0 for no evaluation.
        evaluation_every: steps between evaluations; 0 for one before and one after training.
        evaluation_split, evaluation_subset: where they are from, a ``start:stop`` of a file that has no splits.
    """

    policy: str
    env: str = "MathReason-v0"
    env_arguments: dict[str, Any] = field(default_factory=dict)
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 2e-5
    problems: int = 0
    skip: float = 0.0
    seed: int = 0
    lora_rank: int = 0
    dtype: str | None = None
    microbatch_tokens: int | None = None
    gradient_checkpointing: bool = False
    device: str = "cpu"
    evaluation_problems: int = 256
    evaluation_every: int = 0
    evaluation_split: str = "test"
    evaluation_subset: str | None = None

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "problems": 0, "evaluation_problems": 0, "evaluation_every": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {value}")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate={self.learning_rate} must be above 0")

    def agent(self, weights: str | None = None) -> SFT:
        """What trains, from the policy or from the weights of a checkpoint; one step an iteration.

        Raises:
            UsageError: an unlimited source without ``problems``, or anything else that ``SFT`` refuses.
        """
        check_id(self.env)
        own = "builtin" if self.policy == "tiny" else self.policy
        size = int(load_config(self.policy).vocab_size)  # may be beyond the tokenizer's
        env = {"tokenizer": own, "vocab_size": size, **self.env_arguments}
        agent = SFT(
            weights or self.policy,
            gym.make_vec(self.env, num_envs=1, copy=False, **env),
            self.learning_rate,
            batch_size=self.batch_size,
            gradient_steps=1,
            problems=self.problems,
            skip=self.skip,
            microbatch_tokens=self.microbatch_tokens,
            dtype=self.dtype,
            lora_rank=self.lora_rank,
            gradient_checkpointing=self.gradient_checkpointing,
            device=self.device,
            seed=self.seed,
        )
        task = agent.envs.unwrapped.task
        if agent.batches.per_epoch is None:
            raise UsageError(f"{task.problems.name} is unlimited: say how many problems with problems=N")
        steps = self.epochs * agent.batches.per_epoch
        agent.schedule = agent.arguments["schedule"] = Linear(warmup=max(1, steps // 10), iterations=steps)
        return agent

    def held_out(self, agent: SFT) -> HeldOut | None:
        """What accuracy is measured on; None for nothing."""
        if not self.evaluation_problems:
            return None
        task: Task = agent.envs.unwrapped.task
        options = shared_options(task, self.evaluation_split)
        if self.evaluation_subset is not None:
            options["subset"] = self.evaluation_subset
        slots = max(1, fitting_slots(agent.target, task, agent.optimizer, SLOTS))
        split = self.evaluation_split
        held_out = HeldOut(task, self.evaluation_problems, slots=slots, split=split, problem_options=options)
        try:
            refuse_overlap(task, held_out)
        except UsageError as error:
            raise UsageError(f"{error}; here --evaluation-subset 700:, or --evaluation-problems 0 for none") from None
        return held_out


class Warmup:
    """The warm-up of one folder: ``run`` trains, writes as it goes, and goes on where a kill has left off.

    Args:
        settings: of the training.
        out: the folder.
        checkpoint_every: steps between checkpoints; what a kill may lose.
    """

    def __init__(self, settings: SupervisedWarmup, out: Path, checkpoint_every: int = 50) -> None:
        if checkpoint_every < 1:
            raise UsageError(f"checkpoint_every={checkpoint_every} must be at least 1")
        self.settings = settings
        self.out = out
        self.saved = out / "checkpoint"
        self.checkpoint_every = checkpoint_every
        self.recorded = json.loads(json.dumps({**asdict(settings), "weights": fingerprint(settings.policy)}))
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the result, at once where it is there already.

        Raises:
            UsageError: the folder holds something else or another process works in it; or what ``SFT`` refuses.
        """
        with self._storage():
            self.out.mkdir(parents=True, exist_ok=True)
        with self._locked():
            result = self._result()
            if result is not None:
                return result
            torch.use_deterministic_algorithms(True, warn_only=self.settings.device != "cpu")
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            going_on = self._read_checkpoint()
            agent = self.settings.agent(str(self.saved) if going_on else None)
            held_out = self.settings.held_out(agent)
            if going_on:
                checkpoint.restore(agent, self.saved)
            with self._storage():
                self._check_disk(agent)
                _write_whole(self.out / RECORD, json.dumps({"settings": self.recorded}, indent=2) + "\n")
                _write_whole(self.out / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows))
                self.file = (self.out / METRICS).open("a", encoding="utf-8")
            with self.file, _Shown(agent.schedule.iterations) as self.shown:
                self._train(agent, held_out)
            return self._finish(agent)

    def _train(self, agent: SFT, held_out: HeldOut | None) -> None:
        steps, every = agent.schedule.iterations, self.settings.evaluation_every
        if held_out is not None and not self.rows:
            self._write(_evaluated(agent, held_out))
        while agent.step < steps:
            self._write(_stepped(agent))
            last = agent.step == steps
            if held_out is not None and (last or (every and agent.step % every == 0)):
                self._write(_evaluated(agent, held_out))
            if not last and agent.step % self.checkpoint_every == 0:
                with self._storage():
                    agent.save(self.saved)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self._storage():
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        self.shown(row)

    def _result(self) -> dict[str, Any] | None:
        """The result of a finished warm-up; None where there is none yet. Raises ``UsageError`` for a folder of
        something else, or of a warm-up with other settings."""
        if not (self.out / RECORD).is_file():
            others = sorted(path.name for path in self.out.iterdir() if path.name != LOCK)
            if others:
                raise UsageError(f"{self.out} holds something else ({', '.join(others[:5])}): give another --out")
            return None
        record = _read_object(self.out / RECORD)
        before = record.get("settings", {})
        differing = [
            f"{name}={before.get(name)!r} (now {value!r})"
            for name, value in self.recorded.items()
            if before.get(name) != value
        ]
        if differing:
            raise UsageError(
                f"{self.out} holds a warm-up with other settings: {', '.join(differing)}; repeat those, or give "
                "another --out"
            )
        return record.get("result")

    def _read_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from; its rows are then those of ``rows``."""
        with self._storage():
            checkpoint.clear_partial(self.saved)
            if not self.saved.is_dir():
                return False
            fault = checkpoint.fault(self.saved)
            if fault is None:
                step = int(_read_object(self.saved / checkpoint.STATE)["iteration"])
                self.rows = [row for row in _read_rows(self.out / METRICS) if row["step"] <= step]
                if self._are_whole(step):
                    return True
                fault = f"{self.out / METRICS} has lost rows"
            warnings.warn(f"{fault}, so the warm-up starts again from the beginning", stacklevel=3)
            shutil.rmtree(self.saved)
            self.rows = []
        return False

    def _are_whole(self, step: int) -> bool:
        every = self.settings.evaluation_every
        due = [n for n in range(step + 1) if n == 0 or (every and n % every == 0)]
        trained = [row["step"] for row in self.rows if "evaluation" not in row]
        evaluated = [row["step"] for row in self.rows if "evaluation" in row]
        return trained == list(range(1, step + 1)) and evaluated == (due if self.settings.evaluation_problems else [])

    def _finish(self, agent: SFT) -> dict[str, Any]:
        """Write the model, then the result: a folder with a result is a finished one."""
        steps = [row for row in self.rows if "evaluation" not in row]
        evaluated = [row for row in self.rows if "evaluation" in row]
        tenth = max(1, len(steps) // 10)
        seconds = sum(row["seconds"] for row in steps)
        tokens, prompt_tokens = (sum(row[name] for row in steps) for name in ("tokens", "prompt_tokens"))
        result = {
            "steps": len(steps),
            "loss_first": float(np.mean([row["loss"] for row in steps[:tenth]])),
            "loss_last": float(np.mean([row["loss"] for row in steps[-tenth:]])),
            "accuracy_before": evaluated[0]["evaluation"]["greedy"] if evaluated else None,
            "accuracy_after": evaluated[-1]["evaluation"]["greedy"] if evaluated else None,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "seconds": seconds,
            "seconds_evaluation": sum(row["seconds"] for row in evaluated),
            "tokens_per_second": (tokens + prompt_tokens) / seconds,
            "peak_bytes": peak_bytes(),
        }
        with self._storage():
            agent.target.save(self.out)
            agent.envs.unwrapped.task.codec.save(self.out)
            record = {"settings": self.recorded, "result": result}
            _write_whole(self.out / RECORD, json.dumps(record, indent=2) + "\n")
            shutil.rmtree(self.saved, ignore_errors=True)
        return result

    def _check_disk(self, agent: SFT) -> None:
        """Raise ``UsageError`` where the model and two checkpoints, of which one replaces the other, do not fit."""
        weights = sum(p.numel() for p in agent.target.model.parameters()) * 4
        trained = sum(p.numel() for p in agent.target.parameters()) * 4
        one = weights + 2 * trained + (weights if agent.lora_rank else 0)
        there = sum(path.stat().st_size for path in self.saved.glob("*"))
        needed, free = weights + 2 * one - there, shutil.disk_usage(self.out).free
        if free < needed:
            raise UsageError(
                f"{self.out} needs {needed / 1e9:.3g} GB for model and checkpoints, and {free / 1e9:.3g} GB are free: "
                "free some space, or choose another --out"
            )

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """A failing disk as a ``UsageError`` that says that nothing is lost."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{self.out} cannot be written ({getattr(error, 'strerror', None) or error}): free some space, or "
                "choose another --out; the same command goes on from the last checkpoint"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder; a second process gets an error instead of corrupting it."""
        with self._storage():
            file = (self.out / LOCK).open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.out} is in use by another process: wait for it, or give another --out"
                ) from None
            yield


def _stepped(agent: SFT) -> dict[str, Any]:
    """One optimizer step, as a row of metrics.jsonl."""
    metrics = agent.iterate()
    names = ("loss", "grad_norm", "learning_rate", "tokens", "prompt_tokens")
    return {"step": agent.step, **{name: metrics[name] for name in names}, "seconds": metrics["time/update"]}


def _evaluated(agent: SFT, held_out: HeldOut) -> dict[str, Any]:
    """Greedy accuracy, as a row of metrics.jsonl."""
    began = time.perf_counter()
    measured = held_out(agent.target).summary()
    return {"step": agent.step, "evaluation": measured, "seconds": time.perf_counter() - began}


class _Shown:
    """Context; called with each row it shows a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        console = Console(stderr=True)
        self.bar = Progress(console=console, disable=not console.is_terminal)
        self.told = 0.0

    def __enter__(self) -> _Shown:
        self.bar.start()
        self.job = self.bar.add_task("supervised warm-up", total=self.steps)
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        if "evaluation" in row:
            said = f"held-out accuracy {row['evaluation']['greedy']:.1%}"
        else:
            said = f"{row['loss']:.3f} nats/token"
        self.bar.update(self.job, completed=row["step"], description=f"supervised warm-up: {said}")
        due = "evaluation" in row or time.monotonic() - self.told > SECONDS_BETWEEN_LINES
        if due:
            self.told = time.monotonic()
            print(f"step {row['step']}/{self.steps}: {said}", file=sys.stderr, flush=True)


def _write_whole(path: Path, text: str) -> None:
    """Replace ``path`` in one step: a reader, or a kill, sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): remove its folder, and the warm-up is done again") from None
    return value if isinstance(value, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to the first damaged line."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


HELP = {
    "policy": "a Hugging Face folder or hub id",
    "env": "environment id whose training split is learnt from",
    "epochs": "passes over the training split",
    "batch_size": "demonstrations an optimizer step",
    "learning_rate": "peak of AdamW, after a tenth of the steps; then it falls linearly to zero",
    "problems": "how many problems of the split, its first ones; 0: all",
    "skip": "chance that a step leaves out layers, so that nested subsets stay usable",
    "seed": "of the order, of the layers left out and of adapters",
    "lora_rank": "train low-rank adapters of this rank; 0: the weights themselves",
    "dtype": "of the matrix products: float32 or bfloat16",
    "microbatch_tokens": "most tokens of one forward and backward; bounds memory alone",
    "gradient_checkpointing": "less memory, more time, the same numbers",
    "device": "cpu or cuda",
    "evaluation_problems": "how many held-out problems greedy accuracy is measured on; 0: none",
    "evaluation_every": "steps between evaluations; 0: one before and one after training",
    "evaluation_split": "the split of the held-out problems",
    "evaluation_subset": "START:STOP of that split, for a file that has no splits",
}


@command(interrupted="the same command goes on from the last checkpoint")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (2 on bad input)."""
    known = {name: one for name, one in fields_of(SupervisedWarmup).items() if name != "env_arguments"}
    parser = argparse.ArgumentParser(prog="python -m agents.warm_up", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--env-set", action="append", default=[], metavar="NAME=VALUE", help="environment arguments")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps; what a kill may lose (50)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    for name, one in known.items():
        flags = [f"--{name.replace('_', '-')}", *(["--batch"] if name == "batch_size" else [])]
        if one.type is bool:
            parser.add_argument(*flags, action="store_true", help=HELP[name])
        else:  # the dataclass knows types and defaults
            shown = "" if one.default in (REQUIRED, None) else f" ({one.default})"
            parser.add_argument(*flags, required=one.default is REQUIRED, metavar="VALUE", help=HELP[name] + shown)
    given = parser.parse_args(arguments)
    if given.threads is not None:
        if given.threads < 1:
            raise UsageError(f"--threads {given.threads} must be at least 1")
        torch.set_num_threads(given.threads)
    disable_progress_bar()
    chosen = {name: getattr(given, name) for name in known if getattr(given, name) is not None}
    settings = SupervisedWarmup(
        env_arguments=_env_arguments(given.env_set),
        **{name: parse_value(value, known[name].type, name) for name, value in chosen.items()},
    )
    _print_result(Warmup(settings, given.out, given.checkpoint_every).run())
    print(given.out)
    return 0


def _env_arguments(assignments: list[str]) -> dict[str, Any]:
    kinds = fields_of(TaskSpec)
    arguments: dict[str, Any] = {}
    for name, text in (assignment(text, "--env-set") for text in assignments):
        name, dot, option = name.partition(".")
        if name not in kinds:
            raise UnknownField("--env-set", name, kinds)
        if dot and name == "problem_options":
            arguments.setdefault(name, {})[option] = _guess(text)
        else:
            arguments[name] = parse_value(text, kinds[name].type, name)
    return arguments


def _guess(text: str) -> Any:
    """Text as JSON where it is that."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _print_result(result: dict[str, Any]) -> None:
    print(f"{result['steps']} steps, {result['loss_first']:.3f} -> {result['loss_last']:.3f} nats per token")
    if result["accuracy_before"] is not None:
        print(f"held-out accuracy {result['accuracy_before']:.1%} -> {result['accuracy_after']:.1%}")
    print(
        f"{result['tokens']} completion and {result['prompt_tokens']} prompt tokens in {result['seconds']:.0f} s "
        f"({result['tokens_per_second']:.0f} tokens/s), evaluation {result['seconds_evaluation']:.0f} s, peak memory "
        f"{result['peak_bytes'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    sys.exit(main())
