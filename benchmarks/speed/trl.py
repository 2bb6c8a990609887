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
from benchmarks.speed.process import OF_VLLM, BlockProcess
from benchmarks.speed.transformers_generate import Generate
from benchmarks.speed.work import Work, iteration_work
from policies import Policy
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
            from trl import GRPOConfig, GRPOTrainer
        except ImportError as error:
            raise UsageError("--trl needs the package trl: pip install 'nested-reft[trl]'") from error
        from datasets import Dataset
        from transformers import TrainerCallback

        tokenizer = work.env.unwrapped.task.tokenizer
        texts = [tokenizer.decode(work.prompt(problem)) for problem in work.problems]
        completions = len(texts) * work.group_size
        longest = max(len(work.prompt(problem)) for problem in work.problems) + work.new_tokens
        forced = {"min_tokens": work.new_tokens, "ignore_eos": True} if vllm else {"min_new_tokens": work.new_tokens}
        clock: dict[str, Any] = {}
        self._clock = clock

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock["begun"] = np.array([time.perf_counter(), time.process_time()])

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock["ended"] = np.array([time.perf_counter(), time.process_time()])

        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=completions,
            num_generations=work.group_size,
            max_completion_length=work.new_tokens,
            generation_kwargs=forced,
            use_vllm=vllm,
            vllm_mode="colocate",
            vllm_max_model_length=longest + 1,
            temperature=1.0,
            beta=0.0,
            max_steps=1,
            gradient_checkpointing=False,
            bf16=False,  # of autocast; the weights are bfloat16 themselves where the policy computes in it
            use_cpu=policy.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        coin = random.Random(0)

        def flip(completions: list[Any], **_: Any) -> list[float | None]:
            return [float(coin.random() < 0.5) for _ in completions]

        kind: Any = GRPOTrainer
        if vllm:  # all layers; a CPU's engine gets new weights by the nested trainer alone
            from integrations.trl_nested import nested

            kind = nested(GRPOTrainer, "full")
        self.trainer = kind(
            model=Generate(policy, work, 1).model.train(),
            args=settings,
            reward_funcs=flip,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        self.tokens = completions * work.new_tokens

    def __call__(self) -> Block:
        """One step; making the data loader and the optimizer anew is not counted."""
        self.trainer.train()
        return Block(self.tokens, *(self._clock["ended"] - self._clock["begun"]).tolist())


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
            variables |= OF_VLLM | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            variables |= {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GB; TRL's default share of the memory is most of it here
        command = [options.vllm or sys.executable, "-m", "benchmarks.speed.trl", json.dumps(given)]
        super().__init__("TRL", command, variables)


def _check(python: str) -> None:
    modules = ("vllm", "trl", "benchmarks.speed.trl")
    look = f"from importlib.util import find_spec; print(*[one for one in {modules} if not find_spec(one)])"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"--vllm {python} cannot be started ({error.strerror}): name a Python") from None
    if lacking := done.stdout.split() or done.stderr.split()[-1:]:
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
