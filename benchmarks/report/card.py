"""The figures of a model card: of a finished run, or of a model with some of its layers skipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from agents.rollout import collect
from agents.saving.hub import base_name, model_card, upload
from benchmarks.comparison.outcomes import Outcome
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.training import AVERAGED
from benchmarks.measuring.statistics import mean_interval
from benchmarks.measuring.table import Table
from envs.problems.arithmetic import DEFAULT_LEVELS, LEVELS
from envs.vector import MathReasonVector
from policies import LayerSubset, Policy, UniformSkip

SLOTS, SUBSETS, LARGEST_SKIP = 256, 8, 4


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


def run_card(folder: Path, repo_id: str) -> str:
    """The model card of a finished run: from what, on what and how it was trained, and what it then knew."""
    spec, run = RunSpec.read(folder / "spec.json"), Outcome.read(folder)
    result, made = run.result, run.provenance
    before, after = (_accuracy(result[f"right_{when}"]) for when in ("before", "after"))
    facts = [
        ("agent", spec.agent["id"]),
        ("trained from", base_name(spec.policy)),
        ("environment", f"{spec.env['id']}, problems {base_name(str(spec.env['problems']))}"),
        ("seed", str(spec.seed)),
        ("iterations", str(result["iterations"])),
        ("tokens", str(result["tokens"])),
        (f"greedy accuracy on {len(result['right_after'])} held-out problems", f"{before} before, {after} after"),
        ("of sampled completions", f"{result['sampled_before']:.1%} before, {result['sampled_after']:.1%} after"),
        (
            "training",
            f"{result['seconds']:.0f} s on {made.get('cuda') or made.get('processor') or 'a machine that is not told'}",
        ),
        ("packages", ", ".join(f"{name} {version}" for name, version in made.get("packages", {}).items() if version)),
        ("settings", f"`{json.dumps({name: value for name, value in spec.agent.items() if name != 'id'})}`"),
    ]
    return model_card(repo_id, spec.policy, facts)


def _accuracy(right: str) -> str:
    """With its 95 % interval over questions."""
    middle, low, high = mean_interval([float(one) for one in right], least=0).within(0, 1)
    return f"{middle:.1%} [{low:.1%}, {high:.1%}]"


def push_or_print(folder: Path, repo_id: str | None, private: bool) -> str:
    """A run's card, or where its model then is."""
    if repo_id is None:
        return run_card(folder, folder.name)
    averaged = folder / AVERAGED  # by which such a run is measured
    model = averaged if averaged.is_dir() else folder / "model"
    return upload(
        model, repo_id, run_card(folder, repo_id), private or None, None, f"Upload the model of run {folder.name}"
    )
