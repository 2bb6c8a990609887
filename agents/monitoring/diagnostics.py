"""How far the behaviour policy was from the target: always from the raw ratios, before any truncation.

An effective sample size of weights that were clamped first cannot fall (in [1/C, C] not below 4 / (C + 1/C)^2), so it
would never see a collapse. Everything here is in float64 and finite for any log ratio.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.rollout import Rollout
from policies import LayerSubset

LENGTH_NAMES = ("mean_length", "kl_k1", "D", "ess_sequence", "overlap_q05")
QUANTILES = {"q01": 0.01, "q50": 0.5, "q99": 0.99}
TAIL = 0.05
MAX_EXPONENT = 600.0  # of a moment: exp(600) is finite in float64 and in JSON

SHARE = 1 / 16  # of the completions without an advantage that are scored for the diagnostics alone
FEWEST_SCORED = 2

ROUNDING = 0.05  # of a ratio: what the engine's and the trainer's bfloat16 differ by on a token of the same model

COLLAPSED_ESS = 0.1
COLLAPSED_D = 2.0
FEWEST = 8  # completions below which an effective size under 2 says nothing


class CollapsedRatios(UserWarning):
    """Too few completions carry the update."""


def design_weights(advantage: Tensor, rollout: Rollout, share: float, rng: np.random.Generator) -> Tensor:
    """Which completions the diagnostics measure, and for how many of the rollout's each of them stands.

    Completions with an advantage are measured at no cost, since the update scores them. Their log ratios are not those
    of all completions, since an advantage depends on the reward and the reward on what was written. So some of the
    others are scored, too: a systematic sample along the order of their rewards, in which each has the same
    probability. A mean weighted by inverse probabilities (Horvitz and Thompson 1952) is one over all completions.

    Args:
        advantage: [B].
        rollout: B sequences; those written by the target (``by_target``) say nothing of mu and are not drawn.
        share: of the completions without an advantage, in [0, 1]; at least ``FEWEST_SCORED`` of them unless 0.
        rng: draws the sample.

    Returns:
        [B] float64: 1 / probability of being measured, 0 for a completion that is not.
    """
    design = (advantage != 0).double()
    silent = advantage == 0
    if rollout.by_target is not None:
        silent &= ~rollout.by_target
    others = silent.nonzero()[:, 0]
    others = others[rollout.reward[others].argsort(stable=True)]
    count = min(len(others), max(FEWEST_SCORED, math.ceil(share * len(others)))) if share else 0
    if count:
        places = torch.from_numpy((rng.random() + np.arange(count)) * (len(others) / count)).long()
        design[others[places.clamp(max=len(others) - 1)]] = len(others) / count
    return design


def diagnostics(logp: Tensor, rollout: Rollout, design: Tensor | None = None) -> dict[str, float]:
    """Divergence of the behaviour policy mu from the target pi on a rollout, in nats.

    Args:
        logp: [B, T] log pi of every token that is measured.
        rollout: B sequences; those written by the target (``by_target``) say nothing of mu and only count in
            ``mean_length``.
        design: [B] for how many completions each one stands, 0 for those not measured (``design_weights``); by default
            1 for all. Figures are then estimates for all B completions: D is unbiased, the others asymptotically.

    Returns:
        ``kl_k1``, ``kl_k3``: KL(mu || pi) per token, mean of -log rho and of rho - 1 - log rho;
        ``D``: mean over sequences of the sum of -log rho, that is mean length times KL per token;
        ``ess_sequence``, ``ess_token``: effective sample size of the raw ratios, as a fraction;
        ``chi2``, ``chi2_token``: mean of w^2, minus 1, of sequences and of tokens;
        ``tv``, ``tv_sequence``: mean of max(0, 1 - rho), the total variation per token and of sequences;
        ``overlap_q05``, ``overlap_token_q05``: the 5th percentile of min(1, rho), over completions of its mean over a
        completion's tokens, and over tokens. Its mean, sum_v min(mu_v, pi_v) in expectation, is 1 - ``tv``; the tail of
        such an agreement has told stable runs from collapsing ones of the same mean (arXiv 2606.08446);
        ``log_ratio_q01``, ``_q50``, ``_q99``: of log rho of tokens; ``_min``, ``_max``: of those measured;
        ``mean_length``: tokens per completion;
        ``sequences``, ``tokens``: how many stand behind these figures. Where some stand for several this is Kish's
        effective number (sum a)^2 / sum a^2 of the weights a, that of equal weights with the same variance.
    """
    mask = rollout.mask
    found = {"mean_length": float(mask.sum()) / max(len(mask), 1)}
    stands = torch.ones(len(mask), dtype=torch.float64) if design is None else design.double()
    if rollout.by_target is not None:
        stands = torch.where(rollout.by_target, 0.0, stands)
    rows = stands > 0
    log_ratio = torch.where(mask, logp.detach().double() - rollout.behavior_logp.double(), 0.0)
    return found | _divergence(log_ratio[rows], mask[rows], stands[rows])


def by_kind(logp: Tensor, rollout: Rollout, design: Tensor) -> dict[str, float]:
    """``diagnostics`` of each kind of completion (``Rollout.kinds``), ``fresh/``, ``stored/`` and ``borrowed/`` before
    the names; empty where all are fresh."""
    if rollout.age is None:
        return {}
    figures: dict[str, float] = {}
    for kind, rows in rollout.kinds.items():
        index = rows.nonzero()[:, 0]
        part = rollout.select(index)
        measured = diagnostics(logp[index, : part.mask.shape[1]], part, design[index]) if len(index) else {}
        figures |= {f"{kind}/{name}": value for name, value in measured.items()}
    return figures


def by_length(logp: Tensor, rollout: Rollout, design: Tensor) -> dict[str, float]:
    """KL, D, ESS and overlap of ``diagnostics``, and the shares of right and of cut off completions, of the shortest
    quarter of the completions to the longest: ``length_1/`` to ``length_4/`` before the names, with ``mean_length``.

    A correction by whole completions, such as sequence importance sampling, fails at the longest first, which a mean
    over all of them does not show. Those of equal length are not parted, so that a quarter may be missing."""
    length = rollout.mask.sum(1)
    edges = np.quantile(length.numpy(), [0.25, 0.5, 0.75], method="inverted_cdf")
    quarter = torch.from_numpy(np.searchsorted(edges, length.numpy(), side="left"))
    figures: dict[str, float] = {}
    for n in range(4):
        index = (quarter == n).nonzero()[:, 0]
        if not len(index):
            continue
        part = rollout.select(index)
        measured = diagnostics(logp[index, : part.mask.shape[1]], part, design[index])
        kept = {name: measured[name] for name in LENGTH_NAMES if name in measured}
        if part.episodes:
            kept["right"] = float(np.mean([bool(info["is_success"]) for info in part.episodes]))
            kept["cut_off"] = float(part.truncated.double().mean())
        figures |= {f"length_{n + 1}/{name}": value for name, value in kept.items()}
    return figures


def of_fresh(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """An iteration's metrics with the diagnostics of its fresh completions alone: what the layers drawn last cost."""
    older = {name.partition("/")[2] for name in metrics if name.startswith(("stored/", "borrowed/"))}
    others = {name: value for name, value in metrics.items() if name not in older}
    return others | {name.removeprefix("fresh/"): v for name, v in metrics.items() if name.startswith("fresh/")}


def _divergence(log_ratio: Tensor, mask: Tensor, design: Tensor) -> dict[str, float]:
    """The figures of [B, T] log ratios that are 0 on padding, each sequence standing for ``design`` [B] of them; empty
    if there is no token."""
    tokens, sequences = log_ratio[mask], log_ratio.sum(1)
    if not len(tokens):
        return {}
    per_token = design[:, None].expand(mask.shape)[mask]
    levels = _quantiles(tokens, per_token, list(QUANTILES.values()))
    agreement = log_ratio.clamp(max=0).exp()
    lengths = mask.sum(1).clamp(min=1)
    by_completion = (torch.where(mask, agreement, 0.0).sum(1) / lengths)[mask.any(1)]
    return {
        "sequences": _effective(design),
        "tokens": _effective(per_token),
        "kl_k1": _mean(-tokens, per_token),
        "kl_k3": _mean(tokens.clamp(max=MAX_EXPONENT).exp() - 1 - tokens, per_token),
        "D": _mean(-sequences, design),
        "ess_sequence": ess(sequences, design),
        "ess_token": ess(tokens, per_token),
        "chi2": _chi2(sequences, design),
        "chi2_token": _chi2(tokens, per_token),
        "tv": _mean((1 - tokens.exp()).clamp(min=0), per_token),
        "tv_sequence": _mean((1 - sequences.exp()).clamp(min=0), design),
        "overlap_q05": _quantiles(by_completion, design[mask.any(1)], [TAIL])[0],
        "overlap_token_q05": _quantiles(agreement[mask], per_token, [TAIL])[0],
        "log_ratio_min": float(tokens.min()),
        "log_ratio_max": float(tokens.max()),
        **{f"log_ratio_{name}": level for name, level in zip(QUANTILES, levels, strict=True)},
    }


def _mean(values: Tensor, design: Tensor) -> float:
    return float((design * values).sum() / design.sum())


def _quantiles(values: Tensor, design: Tensor, levels: list[float]) -> list[float]:
    # numpy: torch.quantile refuses more than 2^24 values, and knows no weights
    found = np.quantile(values.cpu().numpy(), levels, weights=design.cpu().numpy(), method="inverted_cdf")
    return [float(value) for value in found]


def _effective(design: Tensor) -> float:
    return float(design.sum().square() / design.square().sum())


def ess(log_w: Tensor, design: Tensor | None = None) -> float:
    """Effective sample size (sum w)^2 / sum w^2 of [N] log weights, as a fraction of N in [1/N, 1]; each stands for
    ``design`` [N] of them, by default 1."""
    log_design = torch.zeros_like(log_w) if design is None else design.log()
    first, second = (float(torch.logsumexp(log_design + power * log_w, 0)) for power in (1, 2))
    return math.exp(2 * first - second - float(torch.logsumexp(log_design, 0)))


def _chi2(log_w: Tensor, design: Tensor) -> float:
    log_design = design.log()
    log_moment = float(torch.logsumexp(log_design + 2 * log_w, 0) - torch.logsumexp(log_design, 0))
    return math.expm1(min(log_moment, MAX_EXPONENT))


def weight_diagnostics(weight: Tensor, logp: Tensor, rollout: Rollout) -> dict[str, float]:
    """What a correction did to the tokens of the completions that the update used.

    Args:
        weight: [B, T] what the correction gave.
        logp: [B, T] log pi of every token, as the correction saw it.
        rollout: those B completions; the target's own (``by_target``) are left out.

    Returns:
        ``weight_mean``, ``weight_zero`` (fraction of tokens with the weight 0), ``weight_shrunk`` (fraction with a
        weight below the token's raw ratio by more than ``ROUNDING`` of it) and ``weight_q01``, ``_q50``, ``_q99`` over
        tokens; 0 where there is no token.
    """
    mask = rollout.mask if rollout.by_target is None else rollout.mask & ~rollout.by_target[:, None]
    w = weight.detach()[mask].double()
    raw = (logp.detach().double() - rollout.behavior_logp.double())[mask].clamp(max=80.0).exp()
    levels = np.quantile(w.cpu().numpy(), list(QUANTILES.values())) if len(w) else [0.0] * len(QUANTILES)
    return {
        "weight_mean": float(w.mean()) if len(w) else 0.0,
        "weight_zero": float((w == 0).double().mean()) if len(w) else 0.0,
        "weight_shrunk": float((w < raw * (1 - ROUNDING)).double().mean()) if len(w) else 0.0,
        **{f"weight_{name}": float(level) for name, level in zip(QUANTILES, levels, strict=True)},
    }


def noise_floor(logp: Tensor, rollout: Rollout) -> dict[str, float]:
    """What the engine and the trainer disagree by on the same model: a rollout's tokens scored again by what wrote
    them, before the first update. No divergence below this floor means anything.

    Returns ``noise_mean`` and ``noise_max`` of |log pi - log mu| and ``noise_kl``, estimated as ``kl_k3``, in nats per
    token; empty for an empty rollout, and for a mixed one (there ``behavior_logp`` is not what the completions of the
    target were sampled with).
    """
    gap = (logp.detach().double() - rollout.behavior_logp.double())[rollout.mask]
    if rollout.by_target is not None or not len(gap):
        return {}
    kl = (gap.clamp(max=MAX_EXPONENT).exp() - 1 - gap).mean()
    return {"noise_mean": float(gap.abs().mean()), "noise_max": float(gap.abs().max()), "noise_kl": float(kl)}


def collapse(found: Mapping[str, float]) -> str | None:
    """What is wrong and what to change, in words, if too few completions carry the update; else None.

    ``found`` are ``diagnostics``. The sequence ESS of n completions cannot be seen below 1/n, so D counts too: the ESS
    of a large batch is about exp(-2 D).
    """
    if found.get("weight_zero") == 1.0:
        return (
            "the correction gave every token the weight 0: this step learned nothing. Skip fewer layers, widen the "
            "correction's bounds, or take one that truncates (truncated-is) instead of masking"
        )
    d, fraction = found.get("D"), found.get("ess_sequence")
    if d is None or fraction is None:
        return None
    n = found["sequences"]
    if fraction >= COLLAPSED_ESS and d <= COLLAPSED_D and (n < FEWEST or fraction * n >= 2):
        return None
    older = bool(found.get("age"))
    writer, remedy = ("what wrote", "Let younger weights write, skip") if older else ("the nested policy", "Skip")
    return (
        f"{writer} is too far from the target: D = {d:.2g} nats per completion ({found['mean_length']:.0f} "
        f"tokens x {found['kl_k1']:.2g} KL per token), and a fully corrected update has an effective sample size of "
        f"{fraction:.1%} of the completions. "
        f"{remedy} fewer layers, or cheaper ones (a skip sampler that learns from the divergence), or shorten the "
        "completions until D is below 0.3; else use a bounded correction (truncated-is, retrace) and accept its bias, "
        "or let the target write some completions of each group (defensive)"
    )


def warn_collapse(found: Mapping[str, float]) -> str | None:
    """``collapse``, also given as a ``CollapsedRatios`` warning."""
    message = collapse(found)
    if message:
        warnings.warn(message, CollapsedRatios, stacklevel=2)
    return message


@dataclass
class BySubset:
    """Diagnostics accumulated per layer subset: means over rollouts, weighted by their tokens."""

    totals: dict[LayerSubset, dict[str, float]] = field(default_factory=dict)

    AVERAGED = ("kl_k1", "kl_k3", "D", "tv", "ess_sequence", "ess_token", "mean_length")

    def add(self, subset: LayerSubset, found: Mapping[str, float]) -> None:
        """Count one rollout's ``diagnostics`` under the layers that wrote it; one that measured nothing is left out."""
        if not all(name in found for name in (*self.AVERAGED, "tokens")):
            return
        total = self.totals.setdefault(subset, dict.fromkeys(("tokens", "rollouts", *self.AVERAGED), 0.0))
        total["tokens"] += found["tokens"]
        total["rollouts"] += 1
        for name in self.AVERAGED:
            total[name] += found["tokens"] * found[name]

    def table(self) -> dict[LayerSubset, dict[str, float]]:
        """Per subset, the nearest to the target first: the means, ``tokens`` and ``rollouts``."""
        means = {
            subset: {name: v / total["tokens"] if name in self.AVERAGED else v for name, v in total.items()}
            for subset, total in self.totals.items()
        }
        # k3, since k1 of few tokens is noisy enough to turn negative
        return dict(sorted(means.items(), key=lambda item: item[1]["kl_k3"]))
