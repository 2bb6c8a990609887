"""The figures of a model card: ``python -m benchmarks.model_card [MODEL]``.

Held-out accuracy of the generated problems, by level, greedy and sampled; and how usable the model is with layers
skipped: accuracy and KL divergence per token, averaged over uniformly drawn subsets with the first and the last layer
kept.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from agents.rollout import collect
from benchmarks.measuring.table import Table
from envs.problems.arithmetic import DEFAULT_LEVELS, LEVELS
from envs.vector import MathReasonVector
from policies import LayerSubset, Policy, UniformSkip
from registry import UsageError
from registry.command import command

SLOTS, SUBSETS, LARGEST_SKIP = 256, 8, 4


def measure(
    policy: Policy, layers: LayerSubset, temperature: float, problems: int, level: int | tuple[int, ...]
) -> tuple[float, float, float]:
    """Accuracy on the first test problems, the mean completion length in tokens, and the KL divergence per token from
    the subset's distribution to the full model's, in nats: the mean of log mu - log pi over what the subset sampled."""
    envs = MathReasonVector(num_envs=min(SLOTS, problems), copy=False, split="test", problem_options={"level": level})
    mu = policy.behavior(layers, envs.num_envs, envs.task.max_length, temperature=temperature)
    rollout = collect(mu, envs, range(problems), 1)
    with torch.no_grad():
        logp = policy.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    mask = rollout.mask
    kl = float((rollout.behavior_logp - logp)[mask].mean()) if temperature else float("nan")
    return float(rollout.reward.mean()), float(mask.sum(1).float().mean()), kl


def report(policy: Policy, problems: int) -> str:
    """Two Markdown tables."""
    whole = tuple(range(policy.num_layers))
    by_level = []
    for level in (DEFAULT_LEVELS, *((one,) for one in LEVELS)):
        greedy, _, _ = measure(policy, whole, 0.0, problems, level)
        sampled, length, _ = measure(policy, whole, 1.0, problems, level)
        name = "default " + str(level) if level == DEFAULT_LEVELS else str(level[0])
        by_level.append([name, f"{greedy:.1%}", f"{sampled:.1%}", f"{length:.1f}"])
    rng, by_skips = np.random.default_rng(0), []
    for skipped in range(1, LARGEST_SKIP + 1):
        sampler = UniformSkip(ratio=skipped / len(whole), border=1)
        subsets = [sampler.sample(len(whole), rng) for _ in range(SUBSETS)]
        figures = [measure(policy, layers, 1.0, problems, DEFAULT_LEVELS) for layers in subsets]
        accuracy, _, divergence = zip(*figures, strict=True)
        by_skips.append(
            [
                str(skipped),
                f"{np.mean(accuracy):.1%} ({min(accuracy):.1%} to {max(accuracy):.1%})",
                f"{np.mean(divergence):.3f} ({min(divergence):.3f} to {max(divergence):.3f})",
            ]
        )
    tables = (
        Table(["level", "greedy", "sampled", "tokens"], by_level),
        Table([f"layers skipped, of {len(whole)}", "sampled accuracy", "KL per token"], by_skips),
    )
    return "\n\n".join(table.markdown() for table in tables)


@command()
def main(argv: list[str] | None = None) -> int:
    """Print a model's figures. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card", description=main.__doc__)
    parser.add_argument("model", nargs="?", default="tiny", help="tiny, a folder or a hub id (default %(default)s)")
    parser.add_argument("--problems", type=int, default=512, help="test problems (default %(default)s)")
    args = parser.parse_args(argv)
    if args.problems < 1:
        raise UsageError(f"--problems {args.problems} must be at least 1")
    print(report(Policy.load(args.model), args.problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
