"""Best of n: how much a verifier, or a vote, makes of several completions of one model.

    python examples/best_of_n.py --samples 16

``mean`` is the accuracy of one sampled completion. ``vote`` answers what most completions answer, compared by the
verifier as mathematics (self-consistency, arXiv 2203.11171). ``best`` takes a right one if there is any, which needs
the gold answers (pass@n).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch

from agents.rollout import collect
from envs.vector import MathReasonVector
from envs.verifier import Verifier
from policies import Policy
from registry import UsageError


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions, 0 to 1."""

    mean: float
    vote: float
    best: float


def vote(answers: list[str], verifier: Verifier) -> str:
    """The answer that most others equal, the first of several such; ``""`` where there is none."""
    given = [answer for answer in answers if answer]
    equal = [sum(verifier.verify(f"\\boxed{{{other}}}", answer).reward for other in given) for answer in given]
    return given[int(np.argmax(equal))] if given else ""


def main(argv: list[str] | None = None) -> Accuracy:
    """Write, judge and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="tiny", help="tiny, a folder or a hub id")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="n, completions of a problem")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.problems < 1 or args.samples < 1:
        parser.error("--problems and --samples must be at least 1")

    policy = Policy.load(args.policy)
    own = {} if args.policy == "tiny" else {"tokenizer": args.policy, "vocab_size": policy.vocab_size}
    venv = MathReasonVector(num_envs=64, split="test", **own)
    everything = tuple(range(policy.num_layers))
    mu = policy.behavior(everything, 64, venv.task.max_length, temperature=args.temperature, seed=args.seed)
    rollout = collect(mu, venv, range(args.problems), args.samples, defer=False)

    verifier = Verifier(venv.task.template.extract)
    right = torch.tensor([info["is_success"] for info in rollout.episodes]).reshape(args.problems, args.samples)
    votes = []
    for problem in range(args.problems):
        episodes = rollout.episodes[problem * args.samples : (problem + 1) * args.samples]
        chosen = vote([str(info["extracted"]) for info in episodes], verifier)
        votes.append(verifier.verify(f"\\boxed{{{chosen}}}", venv.task.problem(problem)).reward)
    accuracy = Accuracy(float(right.float().mean()), float(np.mean(votes)), float(right.any(1).float().mean()))
    print(f"of {args.samples} completions:", ", ".join(f"{name} {share:.1%}" for name, share in vars(accuracy).items()))
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:  # bad input, no such model, no such server
        sys.exit(f"error: {error}")
