"""What every correction owes, whoever wrote it: the tests of the registered ones, and ``--check`` for one's own.

Each check takes a correction and returns what is wrong, or an empty string.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.corrections import traits, weigh
from agents.objective.advantages import Reinforce
from agents.rollout import Rollout
from benchmarks.estimators.mdp import Cell, random_reward, random_target, tree
from benchmarks.estimators.moments import all_groups, enumerate_moments, separable
from benchmarks.estimators.settings import Grouping
from registry import UsageError

GROUP = 4
GROUPS = 3
LENGTHS = (7, 3, 1, 5, 7, 2, 6, 4, 1, 7, 7, 3)
BIAS_LIMIT = 1e-10


def example(correction: Any, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Rollout, Tensor]:
    """log pi [B, T], a rollout of ragged completions in groups of 4, and an advantage of both signs. ``spread`` is
    the scale of every log ratio, 0 for pi = pi_old = mu. A mixed correction gets groups the target wrote one of."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    shape = mask.shape

    def noise() -> Tensor:
        return spread * torch.randn(shape, generator=generator, dtype=torch.float64)

    logp = -3 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.05
    prompts = [torch.arange(3) + group for group in range(GROUPS)]
    group = torch.arange(len(LENGTHS)) // GROUP
    rollout = Rollout(
        prompts=tuple(prompts[g] for g in group.tolist()),
        tokens=torch.randint(0, 9, shape, generator=generator),
        mask=mask,
        behavior_logp=(logp + noise()).to(dtype),
        reward=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]),
        group=group,
        old_logp=(logp + 0.2 * noise()).to(dtype),
        by_target=torch.arange(len(LENGTHS)) % GROUP == 0 if traits(correction).mixed else None,
    )
    return logp.to(dtype), rollout, rollout.reward.to(dtype) - 0.45


def on_policy(correction: Any) -> str:
    """Where pi = pi_old = mu, every token has the declared weight."""
    logp, rollout, advantage = example(correction, spread=0.0)
    declared = traits(correction).on_policy
    weight = weigh(correction, logp, rollout, advantage)[rollout.mask]
    if declared is None or torch.allclose(weight, torch.full_like(weight, declared), atol=1e-9):
        return ""
    return f"declares on_policy = {declared:g}, but pi = mu gives weights from {weight.min():g} to {weight.max():g}"


def detached(correction: Any) -> str:
    """The weight carries no gradient, and neither changes its inputs nor depends on when it is called."""
    logp, rollout, advantage = example(correction)
    before = (logp.clone(), rollout.behavior_logp.clone(), advantage.clone())
    weight = weigh(correction, logp, rollout, advantage)
    if correction(logp, rollout, advantage).requires_grad:
        return "returned a weight that requires a gradient although log pi was detached"
    if not torch.equal(weight, weigh(correction, logp, rollout, advantage)):
        return "gave two different weights for the same arguments"
    if not all(map(torch.equal, before, (logp, rollout.behavior_logp, advantage))):
        return "changed its arguments in place"
    return ""


def padding(correction: Any) -> str:
    """What stands on padding, and how much padding there is, changes nothing."""
    logp, rollout, advantage = example(correction)
    weight = weigh(correction, logp, rollout, advantage)
    junk = torch.where(rollout.mask, 0.0, 7.0)
    assert rollout.old_logp is not None
    disturbed = replace(rollout, behavior_logp=rollout.behavior_logp - 2 * junk, old_logp=rollout.old_logp + junk)
    if not torch.allclose(weight, weigh(correction, logp + junk, disturbed, advantage), rtol=1e-9):
        return "depends on what stands on padding: multiply by rollout.mask before summing over tokens"
    wide = _padded(disturbed, 3)
    wider = weigh(correction, torch.nn.functional.pad(logp + junk, (0, 3), value=-4.0), wide, advantage)
    if not torch.allclose(weight, wider[:, : weight.shape[1]], rtol=1e-9):
        return "depends on the number of padding columns"
    return ""


def _padded(rollout: Rollout, columns: int) -> Rollout:
    pad = torch.nn.functional.pad
    assert rollout.old_logp is not None
    return replace(
        rollout,
        tokens=pad(rollout.tokens, (0, columns)),
        mask=pad(rollout.mask, (0, columns)),
        behavior_logp=pad(rollout.behavior_logp, (0, columns), value=5.0),
        old_logp=pad(rollout.old_logp, (0, columns), value=-5.0),
    )


def permutation(correction: Any) -> str:
    """The order of the completions changes nothing, nor do the numbers of the groups."""
    logp, rollout, advantage = example(correction)
    weight = weigh(correction, logp, rollout, advantage)
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(1))
    shuffled = rollout.select(order)
    shuffled = replace(shuffled, group=100 - 7 * shuffled.group)
    if not torch.allclose(weight[order], weigh(correction, logp[order], shuffled, advantage[order]), rtol=1e-9):
        return "depends on the order of the completions or on the numbers of the groups"
    return ""


def finite(correction: Any) -> str:
    """log ratios of 80 per token overflow nothing, in float32."""
    for sign in (1.0, -1.0):
        logp, rollout, advantage = example(correction, dtype=torch.float32)
        far = replace(rollout, behavior_logp=logp - sign * 80)
        weight = correction(logp, far, advantage)
        if not torch.isfinite(weight[rollout.mask]).all():
            return f"is not finite at log(pi/mu) = {sign * 80:g}: clamp the exponent (corrections.exp does)"
    return ""


def scope(correction: Any) -> str:
    """The weight of what is in the declared scope does not depend on anything outside of it."""
    logp, rollout, advantage = example(correction)
    weight = weigh(correction, logp, rollout, advantage)
    declared = traits(correction).scope
    if declared == "batch":
        return ""
    if declared == "token":
        parts = [weigh(correction, logp[:, t : t + 1], _column(rollout, t), advantage) for t in range(logp.shape[1])]
        if not torch.allclose(weight, torch.cat(parts, 1), rtol=1e-9):
            return "declares the scope 'token', but other tokens of the sequence change the weight"
        return ""
    unit = rollout.group if declared == "group" else torch.arange(len(rollout))
    for value in unit.unique():
        index = (unit == value).nonzero()[:, 0]
        part = rollout.select(index)
        width = part.mask.shape[1]
        alone = weigh(correction, logp[index][:, :width], part, advantage[index])
        if not torch.allclose(weight[index][:, :width], alone, rtol=1e-9):
            return f"declares the scope {declared!r}, but completions outside of it change the weight"
    return ""


def _column(rollout: Rollout, t: int) -> Rollout:
    cut = slice(t, t + 1)
    assert rollout.old_logp is not None
    return replace(
        rollout,
        tokens=rollout.tokens[:, cut],
        mask=rollout.mask[:, cut],
        behavior_logp=rollout.behavior_logp[:, cut],
        old_logp=rollout.old_logp[:, cut],
    )


def geometry(correction: Any) -> str:
    """A weight of the tokens up to its own does not depend on later ones, nor one of those from it on earlier ones."""
    declared = traits(correction).geometry
    if declared not in ("prefix", "suffix"):
        return ""
    logp, rollout, advantage = example(correction)
    assert rollout.old_logp is not None
    weight = weigh(correction, logp, rollout, advantage)
    for t in range(1, logp.shape[1]):
        inside = (torch.arange(logp.shape[1]) < t) == (declared == "prefix")
        other = replace(
            rollout,
            behavior_logp=torch.where(inside, rollout.behavior_logp, rollout.behavior_logp - 0.3),
            old_logp=torch.where(inside, rollout.old_logp, rollout.old_logp + 0.2),
        )
        if not torch.allclose(weight[:, inside], weigh(correction, logp, other, advantage)[:, inside], rtol=1e-9):
            return f"declares the geometry {declared!r}, but tokens outside of it change the weight"
    return ""


def mask(correction: Any) -> str:
    """What declares that it holds no ratio only keeps a token, with the weight that it has on policy, or drops it."""
    declared = traits(correction)
    if declared.corrects_mu or declared.trust_region:
        return ""
    logp, rollout, advantage = example(correction)
    weight = weigh(correction, logp, rollout, advantage)
    kept = weight[rollout.mask & (weight != 0)]
    if declared.on_policy is None or torch.allclose(kept, torch.full_like(kept, declared.on_policy), rtol=1e-9):
        return ""
    return "declares corrects_mu = False, but its weights are not only kept or dropped: leave it undeclared"


def bias(correction: Any) -> str:
    """The declaration of unbiasedness is right to 1e-10 in the exact lab, both ways."""
    declared, measured = traits(correction).unbiased, relative_bias(correction)
    if declared and measured >= BIAS_LIMIT:
        return f"declares that it is unbiased, but the exact relative bias is {measured:.2g}"
    if not declared and measured < BIAS_LIMIT:
        return f"declares a bias, but the exact relative bias is {measured:.2g}: set unbiased = True"
    return ""


def relative_bias(correction: Any) -> float:
    """Exact |m - g| / |g| on a small token MDP whose mu is another random policy; groups of 3 by brute force where the
    weight depends on the other completions."""
    generator = torch.Generator().manual_seed(0)
    shape = tree(3, 3)
    log_pi, log_mu = random_target(shape, generator, eos=-0.5), random_target(shape, generator, eos=-0.5)
    cell = Cell(shape, log_pi, log_pi, log_mu, random_reward(shape, log_pi, 0.4, generator), None, {})
    advantage = Reinforce(baseline=0.3)
    if separable(cell, correction):
        estimate = enumerate_moments(cell, correction, advantage, Grouping(GROUP, 1))
    else:
        shape = tree(3, 2)
        cell = Cell(shape, log_pi[:3], log_pi[:3], log_mu[:3], random_reward(shape, log_pi, 0.4, generator), None, {})
        estimate = all_groups(cell, correction, advantage, 3)
    truth = cell.true_gradient()
    return float((estimate.mean - truth).norm() / truth.norm())


CHECKS: dict[str, Callable[[Any], str]] = {
    check.__name__.replace("_", "-"): check
    for check in (on_policy, detached, padding, permutation, finite, scope, geometry, mask, bias)
}


def check(correction: Any) -> dict[str, str]:
    """What is wrong with a correction, by the name of the check; the empty string where all is well."""
    faults = {}
    for name, one in CHECKS.items():
        try:
            faults[name] = one(correction)
        except UsageError as error:
            faults[name] = str(error)
    return faults
