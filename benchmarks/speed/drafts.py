"""What drafts save: each rollout of a training is also written with drafts, in turn, and timed.

    python -m benchmarks.speed.drafts --iterations 40 --out benchmarks/results/drafts/tiny.json

One agent trains by problems that come again. In every iteration its rollout is written with the same weights, problems
and seed by each arm, in an order that rotates: plainly, with the last completions as drafts (``reuse``), with layers
that draft where few rows are live (``nested-draft``), with both, and with SPEC-RL's rule. All but the last write the
plain tokens, which is checked. Seconds are compared iteration by iteration; the first of them have nothing to reuse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import envs  # noqa: F401 (registers)
from agents import ReFT
from agents.rollout import Rollout, collect
from policies import Drafter, Lenience, Nested, StoredDrafts
from registry import skip_samplers
from registry.command import command
from registry.paths import WriteFile

LENIENT = Lenience("ratio", 0.5)


class Paired(ReFT):
    """An agent that writes each rollout by all arms, and trains on the plain one."""

    log_name = "drafts"

    def measure(self, drafter: Drafter) -> None:
        self.arms: dict[str, list[dict[str, float]]] = {}
        self.drafter = drafter

    def rollout(
        self, problems: Sequence[int], nested: Nested, seed: int, hooks: Any = None, first_group: int = 0
    ) -> Rollout:
        """As ``ReFT.rollout``, of the plain arm."""
        drafts = self.batching.drafts(problems, first_group, self.iteration)
        lenient = None if drafts is None else StoredDrafts(drafts.drafts, LENIENT)
        arms: dict[str, tuple[StoredDrafts | None, Drafter | None]] = {
            "plain": (None, None),
            "reuse": (drafts, None),
            "nested-draft": (None, self.drafter),
            "reuse, nested-draft": (drafts, self.drafter),
            "SPEC-RL's rule": (lenient, None),
        }
        names = list(arms)
        turn = self.iteration % len(names)
        written: dict[str, Rollout] = {}
        for name in names[turn:] + names[:turn]:
            mu = self.behavior(nested, seed, *arms[name])
            began = perf_counter()
            written[name] = collect(mu, self.envs, problems, self.group_size, first_group=first_group)
            seconds = perf_counter() - began
            judged, proposed, accepted, _ = (0, 0, 0, 0) if mu.drafting is None else mu.drafting.counts
            row = {"seconds": seconds, "tokens": int(written[name].mask.sum())}
            self.arms.setdefault(name, []).append(row | {"judged": judged, "proposed": proposed, "accepted": accepted})
        plain = written["plain"]
        for name in names[1:-1]:
            if not torch.equal(written[name].tokens * written[name].mask, plain.tokens * plain.mask):
                self.arms[name][-1]["differs"] = 1.0
        return plain


def summary(arms: dict[str, list[dict[str, float]]], first: int) -> list[dict[str, Any]]:
    """Of the iterations from ``first`` on, by arm."""
    rows = []
    plain = np.array([row["seconds"] for row in arms["plain"][first:]])
    for name, every in arms.items():
        part = every[first:]
        total = {key: sum(row[key] for row in part) for key in ("tokens", "judged", "proposed", "accepted")}
        ratio = np.array([row["seconds"] for row in part]) / plain
        rows.append(
            {
                "arm": name,
                **total,
                "share": total["accepted"] / total["tokens"],
                "length": total["accepted"] / max(total["judged"], 1),
                "seconds_ratio": np.quantile(ratio, (0.25, 0.5, 0.75)).round(3).tolist(),
                "differs": sum(row.get("differs", 0.0) for row in part),
            }
        )
    return rows


@command(interrupted="--out keeps what there is so far")
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What drafts save of a rollout's tokens and seconds.")
    parser.add_argument("--policy", default="tiny", help="tiny, a folder or a hub id")
    parser.add_argument("--iterations", type=int, default=40, help="of the loop (default 40)")
    parser.add_argument("--first", type=int, default=10, help="iterations that are left out of the summary")
    parser.add_argument("--limit", type=int, default=512, help="problems")
    parser.add_argument("--problems-per-batch", type=int, default=32, help="of an iteration (default 32)")
    parser.add_argument("--out", action=WriteFile, help="write the rows here")
    args = parser.parse_args(arguments)
    slots = 8 * args.problems_per_batch
    env = gym.make_vec("MathReason-v0", num_envs=slots, problem_options={"limit": args.limit})
    agent = Paired(args.policy, env, batch="reuse", correction="ppo-clip", problems_per_batch=args.problems_per_batch)
    drafter = skip_samplers.make("nested-draft").drafter(agent.target.num_layers)
    assert drafter is not None
    agent.measure(drafter)
    settings = {"policy": args.policy, "limit": args.limit, "problems_per_batch": args.problems_per_batch}
    for n in range(args.iterations):
        agent.iterate()
        if n < args.first:
            continue
        rows = summary(agent.arms, args.first)
        if args.out:
            done = {**settings, "iterations": [args.first + 1, n + 1], "threads": torch.get_num_threads(), "arms": rows}
            args.out.write_text(json.dumps(done, indent=1) + "\n")
    for row in rows:
        low, middle, high = row["seconds_ratio"]
        print(
            f"{row['arm']:22} {row['accepted']:8.0f} of {row['tokens']:.0f} tokens drafted ({row['share']:.1%}), "
            f"{row['length']:.1f} a draft; seconds {middle:.2f} [{low:.2f}, {high:.2f}] of plain"
        )


if __name__ == "__main__":
    sys.exit(main())
