"""One whole GRPO iteration, ours against TRL's: rollout, reward and update on the same model, prompts, G and lengths.

Every completion has the forced length and a coin for a reward, so that nearly all groups carry a gradient and neither
side may skip work. TRL gets its fastest settings on this model: weights in the compute dtype, no gradient
checkpointing, no reference model; ours keeps float32 weights. Both step AdamW. TRL's iterations run in a process of
their own, without our kernels, which also make freed memory stay with their process: that alone speeds TRL's step up.
"""

from __future__ import annotations

import time

from agents.reft import ReFT
from benchmarks.measuring.pairing import Block
from benchmarks.speed.limits import product_limit, update_seconds
from benchmarks.speed.work import Work
from policies import Policy

LEARNING_RATE = 1e-7  # the weights hardly move, so that all blocks do the same work


class OurIteration:
    """An iteration of the ReFT loop on the work's environment."""

    def __init__(self, policy: Policy, work: Work, rollout_dtype: str | None = None) -> None:
        self.work = work
        self.used = 0  # sequences of the last iteration's update
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
        began, busy = time.perf_counter(), time.process_time()
        metrics = self.agent.iterate()
        self.used = int(metrics["sequences_used"])
        return Block(int(metrics["tokens"]), time.perf_counter() - began, time.process_time() - busy)

    def product_seconds(self) -> float:
        """What the matrix products of such an iteration take by themselves: the rollout's, and the update's of as many
        sequences as in the last one."""
        policy, new_tokens, group_size = self.agent.target, self.work.new_tokens, self.agent.group_size
        prompts = [len(self.work.prompt(problem)) for problem in self.work.problems]
        tokens = sum(prompts) + len(prompts) * group_size * new_tokens
        rollout = tokens / product_limit(policy, self.work.env.num_envs, self.agent.nesting.int8)
        packed = self.used * (new_tokens - 1) + sum(prompts) * self.used // (len(prompts) * group_size)
        return rollout + update_seconds(policy, packed, self.used * new_tokens, self.agent.microbatch_tokens)
