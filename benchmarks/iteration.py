"""One whole GRPO iteration, ours against TRL's: rollout, reward and update on the same model, prompts, G and lengths.

Every completion has the forced length and a coin for a reward, so that nearly all groups carry a gradient and neither
side may skip work. TRL gets its fastest settings on this model: weights in the compute dtype, no gradient
checkpointing, no reference model; ours keeps float32 weights. Both step AdamW. TRL's iterations run in a process of
their own, without our kernels, which also make freed memory stay with their process: that alone speeds TRL's step up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from agents.reft import ReFT
from benchmarks.contenders import Generate, Work
from benchmarks.limits import product_limit, update_seconds
from benchmarks.pairing import Block
from policies import Policy
from registry import UsageError

LEARNING_RATE = 1e-7  # the weights hardly move, so that all blocks do the same work


class OurIteration:
    """An iteration of the ReFT loop on the work's environment."""

    def __init__(self, policy: Policy, work: Work, rollout_dtype: str | None = None) -> None:
        self.work = work
        self.agent = ReFT(
            policy,
            work.env,
            learning_rate=LEARNING_RATE,
            rollout_dtype=rollout_dtype,
            group_size=work.group_size,
            problems_per_batch=len(work.problems),
        )

    def __call__(self) -> Block:
        """The next iteration; the noise floor, which other iterations measure beside, is not part of it."""
        self.agent.iteration = max(1, self.agent.iteration % 10)
        began = time.perf_counter()
        metrics = self.agent.iterate()
        self.used = int(metrics["sequences_used"])
        return Block(int(metrics["tokens"]), time.perf_counter() - began)

    def product_seconds(self) -> float:
        """What the matrix products of such an iteration take by themselves: the rollout's, and the update's of as many
        sequences as in the last one."""
        policy, new_tokens, group_size = self.agent.target, self.work.new_tokens, self.agent.group_size
        prompts = [len(self.work.prompt(problem)) for problem in self.work.problems]
        tokens = sum(prompts) + len(prompts) * group_size * new_tokens
        rollout = tokens / product_limit(policy, self.work.env.num_envs, self.agent.int8)
        packed = self.used * (new_tokens - 1) + sum(prompts) * self.used // (len(prompts) * group_size)
        return rollout + update_seconds(policy, packed, self.used * new_tokens, self.agent.microbatch_tokens)


class TrlIteration:
    """A training step of TRL's GRPOTrainer, timed from its beginning to the end of its optimizer step."""

    def __init__(self, policy: Policy, work: Work) -> None:
        try:
            from trl import GRPOConfig, GRPOTrainer
        except ImportError as error:
            raise UsageError("--trl needs the package trl: pip install 'nested-reft[trl]'") from error
        from datasets import Dataset
        from transformers import TrainerCallback

        tokenizer = work.env.unwrapped.task.tokenizer
        texts = [tokenizer.decode(work.prompt(problem)) for problem in work.problems]
        completions = len(texts) * work.group_size
        clock = self._clock = [0.0, 0.0]

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock[0] = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock[1] = time.perf_counter()

        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=completions,
            num_generations=work.group_size,
            max_completion_length=work.new_tokens,
            generation_kwargs={"min_new_tokens": work.new_tokens},
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
        self.trainer = GRPOTrainer(
            model=Generate(policy, work, 1).model.train(),
            args=settings,
            reward_funcs=lambda completions, **_: [float(coin.random() < 0.5) for _ in completions],
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        self.tokens = completions * work.new_tokens

    def __call__(self) -> Block:
        """One step; making the data loader and the optimizer anew is not counted."""
        self.trainer.train()
        return Block(self.tokens, self._clock[1] - self._clock[0])


class TrlProcess:
    """``TrlIteration`` in a child process, which waits while others are measured.

    Args:
        options: of ``benchmarks.throughput``; the work is that of ``iteration_work``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        names = ("policy", "device", "dtype", "problems", "split", "template", "group_size", "new_tokens")
        given = {name: getattr(options, name) for name in names}
        given |= {"trl": True, "prompts": 8, "threads": torch.get_num_threads()}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.iteration", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"NESTED_REFT_NATIVE": "0"},
        )

    def __call__(self) -> Block:
        """The child's next step."""
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            self.child.stdin.write("\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # it ended early, and its last line says why
        line = self.child.stdout.readline()
        if not line:
            code = self.child.wait()
            memory = " (killed: most likely it ran out of memory, so take shorter prompts or a smaller --group-size)"
            raise UsageError(
                f"TRL's process ended with exit code {code}{memory if code == -9 else ''}; its messages are above"
            )
        found = json.loads(line)
        if "error" in found:
            raise UsageError(found["error"])
        return Block(**found)

    def close(self) -> None:
        """End the child."""
        self.child.kill()
        self.child.communicate()


def iteration_work(options: argparse.Namespace, policy: Policy) -> Work:
    """A slot for each completion, and a coin for a reward; against TRL's 8 problems and at most 64 tokens."""
    from benchmarks.throughput import make_work

    prompts, new_tokens = options.prompts, options.new_tokens
    if options.trl:
        prompts, new_tokens = 8, min(64, new_tokens)
    changed = argparse.Namespace(**vars(options) | {"prompts": prompts, "slots": prompts * options.group_size})
    return make_work(changed, policy, False, max_new_tokens=new_tokens, reward="random")


def main(arguments: list[str]) -> int:
    """The child: a step of TRL for each line of stdin, told as a line of JSON; everything else goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    options = argparse.Namespace(**json.loads(arguments[0]))
    torch.set_num_threads(options.threads)
    try:
        policy = Policy.load(options.policy, options.device, options.dtype)
        step = TrlIteration(policy, iteration_work(options, policy))
    except UsageError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return 2
    for _ in sys.stdin:
        block = step()
        print(json.dumps({"tokens": block.tokens, "seconds": block.seconds}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
