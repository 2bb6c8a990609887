"""The work of a throughput comparison: an environment, its problems, how long completions may get."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies import LayerSubset, Policy


@dataclass(frozen=True)
class Work:
    """The prompts of a block and how long completions may get.

    Attributes:
        env: a native vector env of the task; its slots are the engine's. Forced length: it has no stop tokens.
        problems: indices of the env's problems.
        group_size: G, completions per problem.
        stop: tokens that end a completion; none for forced length.
    """

    env: Any
    problems: tuple[int, ...]
    group_size: int
    stop: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        """The longest completion."""
        return self.env.unwrapped.task.spec.max_new_tokens

    def prompt(self, problem: int) -> np.ndarray:
        """Token ids [P] of a problem."""
        return self.env.unwrapped.task.prompt(problem)


def make_work(options: argparse.Namespace, policy: Policy, natural: bool, **given: Any) -> Work:
    """The environment and its deck; forced length is an environment without stop tokens."""
    import gymnasium as gym

    import envs  # noqa: F401 - registers the ids

    tokenizer = "builtin" if options.policy == "tiny" else options.policy
    task: dict[str, Any] = {"tokenizer": tokenizer, "max_prompt_tokens": 256, "max_new_tokens": options.new_tokens}
    task |= {"vocab_size": policy.vocab_size, "problems": options.problems, "split": options.split}
    task |= {"template": options.template} | given
    if not natural:
        task["stop_token_ids"] = ()
    env: Any = gym.make_vec("MathReason-v0", num_envs=options.slots, copy=False, **task)
    stop = tuple(env.unwrapped.task.stop_token_ids)
    return Work(env, tuple(range(options.prompts)), options.group_size, stop)


def kept_layers(policy: Policy, skips: int) -> LayerSubset:
    """All layers but ``skips`` spread evenly over the inner ones: speed does not depend on which."""
    inner = np.arange(1, policy.num_layers - 1)
    skipped = inner[np.linspace(0, len(inner) - 1, skips).round().astype(int)] if skips else ()
    return tuple(sorted(set(range(policy.num_layers)) - {int(layer) for layer in skipped}))


def iteration_work(options: argparse.Namespace, policy: Policy) -> Work:
    """A slot for each completion, and a coin for a reward; against TRL's 8 problems and at most 64 tokens."""
    prompts, new_tokens = options.prompts, options.new_tokens
    if options.trl:
        prompts, new_tokens = 8, min(64, new_tokens)
    changed = argparse.Namespace(**vars(options) | {"prompts": prompts, "slots": prompts * options.group_size})
    return make_work(changed, policy, False, max_new_tokens=new_tokens, reward="random")
