"""The sweep: cells of many divergences, horizons, success rates and layer subsets; a row per correction in each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from agents.corrections import traits
from benchmarks.estimators.mdp import Cell, add_noise, random_reward, random_target, tree
from benchmarks.estimators.moments import Moments, moments
from benchmarks.estimators.settings import Sweep
from benchmarks.estimators.transformer import skipping_cell, subsets
from registry import advantages, corrections

Row = dict[str, Any]

VOCABULARY = 4  # of the noised cells; the transformer has 3 tokens and horizon 6
SUBSETS = 3  # of layers, drawn per number of skipped layers
REFERENCE = "sequence-is"  # the unbiased estimator that every other is compared with for N*


def cells(sweep: Sweep) -> Iterator[Cell]:
    """Every cell; the labels say what each is."""
    for seed in range(sweep.seeds):
        for horizon in sweep.horizons:
            for success in sweep.successes:
                for d in sweep.divergences:
                    yield noisy_cell(VOCABULARY, horizon, success, d, seed)
        for success in sweep.successes:
            for count in sweep.skips:
                for skipped in subsets(count, SUBSETS, seed):
                    yield skipping_cell(3, 6, success, seed, skipped)


def noisy_cell(vocabulary: int, horizon: int, success: float, d: float, seed: int) -> Cell:
    """A random tabular target; mu is the target with noise on its logits, D = ``d`` nats."""
    generator = torch.Generator().manual_seed(seed)
    shape = tree(vocabulary, horizon)
    log_pi = random_target(shape, generator)
    reward = random_reward(shape, log_pi, success, generator)
    labels: dict[str, float | int | str] = {"mu": "noise", "level": d, "success": success, "seed": seed}
    return add_noise(Cell(shape, log_pi, log_pi, log_pi, reward, None, labels), d, generator)


def rows(sweep: Sweep, chosen: Mapping[str, Any]) -> Iterator[Row]:
    """One row per cell and correction; ``chosen`` maps ids to corrections."""
    for cell in cells(sweep):
        yield from cell_rows(cell, sweep, chosen)


def cell_rows(cell: Cell, sweep: Sweep, chosen: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of one cell."""
    fields = {}
    if sweep.advantage == "reinforce":
        fields["baseline"] = float((cell.probability(cell.log_mu) * cell.reward).sum())
    advantage = advantages.make(sweep.advantage, **fields)
    truth = cell.true_gradient()
    on_policy = moments(cell.on_policy(), corrections.make("none"), advantage, sweep.groups)
    ideal = quality(cell, truth, on_policy, sweep.batch)
    reference = moments(cell, corrections.make(REFERENCE), advantage, sweep.groups)
    for id, correction in chosen.items():
        estimate = moments(cell, correction, advantage, sweep.groups, sweep.batch)
        yield {
            "correction": id,
            "declared_unbiased": traits(correction).unbiased,
            "horizon": cell.tree.horizon,
            **cell.labels,
            **cell.divergence(),
            "advantage": sweep.advantage,
            "batch": sweep.batch,
            **quality(cell, truth, estimate, sweep.batch),
            "variance_ratio": estimate.variance / on_policy.variance,
            "on_policy_efficiency": ideal["efficiency"],
            "on_policy_bias": ideal["relative_bias"],
            "crossover": None if id == REFERENCE else crossover(cell, truth, estimate, reference),
            "sampled_batches": estimate.samples,
        }


def quality(cell: Cell, truth: torch.Tensor, estimate: Moments, batch: int) -> dict[str, float]:
    """``relative_bias`` |m - g| / |g|, ``cosine`` of m and g, and the ascent ``efficiency`` of a batch of N,
    (g.m)^2 / (|g|^2 (|m|^2 + V/N)): the ascent of the best step along the estimate, as a fraction of the best step
    along the true gradient. It does not reward shrinking the gradient, as the mean squared error does. Squared norms
    of sampled means are freed of their own sampling variance; ``bias_error`` is what that leaves uncertain."""
    g2, gm = cell.inner(truth, truth), cell.inner(truth, estimate.mean)
    m2 = max(cell.inner(estimate.mean, estimate.mean) - estimate.mean_error, 0.0)
    gap = estimate.mean - truth
    bias2 = max(cell.inner(gap, gap) - estimate.mean_error, 0.0)
    up = max(gm, 0.0)
    return {
        "relative_bias": (bias2 / g2) ** 0.5,
        "bias_error": (estimate.mean_error / g2) ** 0.5,
        "cosine": min(gm / (g2 * m2) ** 0.5, 1.0) if m2 > 0 else 0.0,
        "efficiency": up**2 / (g2 * (m2 + estimate.variance / batch)) if up else 0.0,
    }


def crossover(cell: Cell, truth: torch.Tensor, estimate: Moments, reference: Moments) -> float | None:
    """N*: the number of completions per update above which the reference is the more efficient; 1 if always, None if
    never (an estimator with the true direction and the smaller relative variance)."""
    inflation, noise = _inverse_efficiency(cell, truth, estimate)
    least, most = _inverse_efficiency(cell, truth, reference)
    if math.isinf(inflation):
        return 1.0
    if inflation <= least + 1e-9:
        return 1.0 if most <= noise else None
    return max((most - noise) / (inflation - least), 1.0)


def _inverse_efficiency(cell: Cell, truth: torch.Tensor, estimate: Moments) -> tuple[float, float]:
    """1/efficiency of a batch of N is the first plus the second over N; infinite for a direction that descends."""
    g2, gm = cell.inner(truth, truth), cell.inner(truth, estimate.mean)
    m2 = max(cell.inner(estimate.mean, estimate.mean) - estimate.mean_error, 0.0)
    return (g2 * m2 / gm**2, g2 * estimate.variance / gm**2) if gm > 0 else (math.inf, math.inf)
