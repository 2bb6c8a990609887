"""TRL's GRPOTrainer step, timed in a process of its own."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks.measuring.pairing import Block
from benchmarks.speed.iteration import LEARNING_RATE
from benchmarks.speed.process import BlockProcess
from benchmarks.speed.transformers_generate import Generate
from benchmarks.speed.work import Work, iteration_work
from policies import Policy
from policies.vllm.engine import VARIABLES
from registry import UsageError


class TrlIteration:
    """A training step of TRL's GRPOTrainer, timed from its beginning to the end of its optimizer step.

    Args:
        policy: the model.
        work: its prompts, G and lengths.
        vllm: whether vLLM writes, in the same process, rather than ``generate``.
    """

    def __init__(self, policy: Policy, work: Work, vllm: bool = False) -> None:
        try:
            from trl import GRPOTrainer
        except ImportError as error:
            raise UsageError("--trl needs the package trl: pip install 'nested-reft[trl]'") from error
        from datasets import Dataset

        kind: Any = GRPOTrainer
        if vllm:  # all layers; a CPU's engine gets new weights by the nested trainer alone
            from integrations.trl_nested import nested

            kind = nested(GRPOTrainer, "full")
        tokenizer, coin = work.env.unwrapped.task.tokenizer, random.Random(0)
        texts = [tokenizer.decode(work.prompt(problem)) for problem in work.problems]

        def flip(completions: list[Any], **_: Any) -> list[float | None]:
            return [float(coin.random() < 0.5) for _ in completions]

        callback, self._clock = _step_clock()
        self.trainer = kind(
            model=Generate(policy, work, 1).model.train(),
            args=_settings(work, vllm, policy.device.type == "cpu"),
            reward_funcs=flip,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        self.tokens = len(texts) * work.group_size * work.new_tokens

    def __call__(self) -> Block:
        """One step; making the data loader and the optimizer anew is not counted."""
        self.trainer.train()
        return Block(self.tokens, *(self._clock["ended"] - self._clock["begun"]).tolist())


def _settings(work: Work, vllm: bool, use_cpu: bool) -> Any:
    """TRL's, of one step with completions of the forced length."""
    from trl import GRPOConfig

    new_tokens = work.new_tokens
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=len(work.problems) * work.group_size,
        num_generations=work.group_size,
        max_completion_length=new_tokens,
        generation_kwargs={"min_tokens": new_tokens, "ignore_eos": True} if vllm else {"min_new_tokens": new_tokens},
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_max_model_length=max(len(work.prompt(problem)) for problem in work.problems) + new_tokens + 1,
        temperature=1.0,
        beta=0.0,
        max_steps=1,
        gradient_checkpointing=False,
        bf16=False,  # of autocast; the weights are bfloat16 themselves where the policy computes in it
        use_cpu=use_cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _step_clock() -> tuple[Any, dict[str, Any]]:
    """A callback of the trainer, and what it fills: when a step has ``begun`` and ``ended``, [2] in seconds by the wall
    and of the processor."""
    from transformers import TrainerCallback

    told: dict[str, Any] = {}

    def now() -> Any:
        return np.array([time.perf_counter(), time.process_time()])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            told["begun"] = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            told["ended"] = now()

    return Clock(), told


class TrlProcess(BlockProcess):
    """``TrlIteration`` in a child process.

    Args:
        options: of ``benchmarks.throughput``; the work is that of ``iteration_work``. With ``vllm``, the Python of an
            environment that has vLLM, TRL and this project, vLLM writes.

    Raises:
        UsageError: the interpreter lacks one of them.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        names = ("policy", "device", "dtype", "problems", "split", "template", "group_size", "new_tokens")
        given = {name: getattr(options, name) for name in names}
        given |= {"trl": True, "prompts": 8, "threads": torch.get_num_threads()}
        given |= {"vllm": bool(options.vllm)}
        variables = {"NESTED_REFT_NATIVE": "0"}
        if options.vllm:
            _check(options.vllm)
            variables |= VARIABLES | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            variables |= {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GB; TRL's default share of the memory is most of it here
        command = [options.vllm or sys.executable, "-m", "benchmarks.speed.trl", json.dumps(given)]
        super().__init__("TRL", command, variables)


def _check(python: str) -> None:
    """Raise UsageError unless its environment has vLLM, TRL and what this project needs."""
    modules = ("vllm", "trl", "stable_baselines3", "benchmarks")
    look = f"from importlib.util import find_spec; print(*[one for one in {modules} if not find_spec(one)])"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"--vllm {python} cannot be started ({error}): name a Python") from None
    if lacking := done.stdout.split():
        raise UsageError(
            f"--trl --vllm {python}: TRL's step with vLLM needs {', '.join(lacking)} there: "
            f"{python} -m pip install -e '.[trl]' in this project's folder, beside vLLM"
        )


def main(arguments: list[str]) -> int:
    """The child: a step of TRL for each line of stdin, told as a line of JSON; everything else goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    options = argparse.Namespace(**json.loads(arguments[0]))
    torch.set_num_threads(options.threads)
    try:
        policy = Policy.load(options.policy, options.device, options.dtype)
        step = TrlIteration(policy, iteration_work(options, policy), options.vllm)
    except UsageError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return 2
    for _ in sys.stdin:
        block = step()
        print(json.dumps(asdict(block)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
