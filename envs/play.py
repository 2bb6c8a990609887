"""Play an episode in a terminal: ``python -m envs.play``.

You see a problem and type its solution, line by line. What you type is tokenized and stepped through the environment
token by token, exactly as a policy would; an empty line or end of input ends the answer. Then comes the verdict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import gymnasium as gym

from envs import check_id
from envs.math_reason import MathReason
from registry import UsageError
from registry.command import command


def play(env: gym.Env, seed: int | None = None, problem: int | None = None, read: Callable[[], str] = input) -> float:
    """One episode with lines from ``read`` (EOFError at its end); returns its reward."""
    game = env.unwrapped
    if not isinstance(game, MathReason):
        raise UsageError(f"{type(game).__name__} takes no tokens of text: play MathReason-v0 or MathReason/...-v0")
    env.reset(seed=seed, options=None if problem is None else {"problem_index": problem})
    print("Type your solution and end it with an empty line.", env.render(), sep="\n\n", end="", flush=True)
    lead, over, reward = game.task.template.gap, False, 0.0
    while not over:
        try:
            line = read()
        except EOFError:
            line = ""
        text_tokens = game.task.tokenizer(lead + line, add_special_tokens=False)["input_ids"]
        for token in text_tokens if line else [game.task.codec.end_token()]:
            _, gained, terminated, truncated, _ = env.step(token)
            reward, over = float(gained), terminated or truncated
            if over:
                break
        lead = "\n"
    print(str(env.render()).rstrip().rsplit("\n", 1)[-1])
    return reward


@command(errors=(gym.error.Error,))
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (2 on bad input)."""
    parser = argparse.ArgumentParser(prog="python -m envs.play", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--env", default="MathReason-v0", help="environment id (default %(default)s)")
    parser.add_argument("--problem", type=int, help="problem index (default: drawn)")
    parser.add_argument("--seed", type=int, help="of the draw")
    given = parser.parse_args(arguments)
    check_id(given.env)
    with gym.make(given.env, render_mode="ansi", disable_env_checker=True) as env:
        play(env, given.seed, given.problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
