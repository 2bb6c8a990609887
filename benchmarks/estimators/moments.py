"""Mean and variance of a gradient estimator, exactly: the registered correction and advantage, called on all
completions of an enumerable token MDP.

The estimator is the sum over tokens with a constant divisor, averaged over completions:
``(1/N) sum_i sum_t W_it A_i grad log pi_it``. Groups are exact: a group-relative advantage of a completion depends on
the others through how many of them are right, which is a sum of binomials.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from agents.corrections import SCOPES, traits, weigh
from benchmarks.estimators.mdp import Cell
from benchmarks.estimators.settings import Grouping
from registry import UsageError

SAMPLED_COMPLETIONS = 65_536


@dataclass(frozen=True)
class Moments:
    """Of one estimator in one cell.

    Attributes:
        mean: [S, V] expected gradient, in logits.
        variance: of one completion's gradient: N completions have the variance ``variance / N`` (trace).
        samples: number of sampled batches; None where everything was enumerated.
        mean_error: the variance (trace) of ``mean`` itself, 0 where enumerated.
    """

    mean: Tensor
    variance: float
    samples: int | None = None
    mean_error: float = 0.0


def moments(cell: Cell, correction: Any, advantage: Any, groups: Grouping, batch: int = 64) -> Moments:
    """The estimator's moments: enumerated where the weight of a completion does not depend on what the others are,
    else sampled in batches of ``batch`` completions with a fixed seed (``Moments.samples`` says so). An advantage that
    depends on the order within a group is sampled too."""
    if separable(cell, correction) and (traits(correction).mixed or not depends_on_order(advantage, groups.size)):
        return enumerate_moments(cell, correction, advantage, groups)
    return sample_moments(cell, correction, advantage, groups, batch)


def weights(cell: Cell, correction: Any, index: Tensor, group: Tensor, advantage: Tensor) -> Tensor:
    """[B, T]: the registered correction's weights of the completions at ``index``, all written by the nested policy."""
    return weigh(correction, cell.logp(cell.log_pi)[index], cell.rollout(index, group), advantage)


def separable(cell: Cell, correction: Any) -> bool:
    """Whether a completion's weight depends on itself and on who wrote its group alone. An undeclared scope is
    measured: completions in one call against one call each.

    Raises:
        UsageError: a product of a mixed factor and one that looks at what the others are. That is neither.
    """
    declared = traits(correction)
    factors = [(type(factor).__name__, traits(factor)) for factor in getattr(correction, "factors", ())]
    wide = [name for name, factor in factors if not factor.mixed and factor.scope not in SCOPES[:2]]
    if declared.mixed and wide:
        mixed = " and ".join(name for name, factor in factors if factor.mixed)
        raise UsageError(
            f"the lab cannot weigh {mixed} beside {' and '.join(wide)}: the one wants groups that the target wrote in "
            "part, the other looks at the completions in them. Take one of the two"
        )
    if declared.mixed or declared.scope in SCOPES[:2]:
        return True
    if hasattr(correction, "scope"):
        return False
    count = min(len(cell.reward), 32)
    index, a = torch.arange(count), torch.ones(count, dtype=torch.float64)
    together = weights(cell, correction, index, index // 4, a)
    alone = [weights(cell, correction, n[None], n[None], a[:1]) for n in index]
    return torch.allclose(together, torch.cat(alone), rtol=1e-12, atol=1e-300)


def enumerate_moments(cell: Cell, correction: Any, advantage: Any, groups: Grouping) -> Moments:
    """Exact moments of an estimator with separable weights."""
    size = groups.size
    writers = [(size, cell.log_mu)]
    if traits(correction).mixed:
        writers = [(size - groups.by_target, cell.log_mu), (groups.by_target, cell.log_old)][
            : 1 + bool(groups.by_target)
        ]
    counts = [count for count, _ in writers]
    probability = [cell.probability(table) for _, table in writers]
    rates = [float((p * cell.reward).sum()) for p in probability]
    table = advantage_table(advantage, size)
    if bool((table == table[:, :1]).all()):
        table = table[:, :1]  # the others do not matter
    kernel, right = cell.kernel(), cell.reward == 1
    mean, second = torch.zeros_like(cell.log_pi), 0.0
    conditional: list[list[tuple[Tensor, Tensor]]] = []  # [writer][others right] -> of wrong, of right completions
    for writer, p in enumerate(probability):
        law = _others(table, counts, rates, [writer])
        share = counts[writer] / size
        conditional.append([])
        for k in range(table.shape[1]):
            a = torch.where(right, table[1, k], table[0, k])
            coefficient = _first_of_group(cell, correction, a, groups, writer == 1) * a[:, None]
            wrong_right = tuple(cell.vector(coefficient * (p * chosen)[:, None]) for chosen in (~right, right))
            conditional[writer].append((wrong_right[0], wrong_right[1]))
            mean = mean + share * float(law[k]) * (wrong_right[0] + wrong_right[1])
            square = torch.einsum("nt,nts,ns->n", coefficient, kernel, coefficient)
            second += share / size * float(law[k]) * float((p * square).sum())
    for one, two in product(range(len(counts)), repeat=2):
        pairs = counts[one] * (counts[two] - (one == two))
        if pairs:
            law = _others(table, counts, rates, [one, two])
            second += pairs / size**2 * _cross(cell, conditional[one], conditional[two], law)
    return Moments(mean, size * (second - cell.inner(mean, mean)))


def _cross(cell: Cell, one: list[tuple[Tensor, Tensor]], two: list[tuple[Tensor, Tensor]], law: Tensor) -> float:
    """E[g_i . g_j] of two members of a group, given their conditional means and the law of the others' successes."""
    if len(one) == 1:
        return cell.inner(one[0][0] + one[0][1], two[0][0] + two[0][1])
    return sum(
        float(probability) * cell.inner(one[k + r2][r1], two[k + r1][r2])
        for k, probability in enumerate(law)
        for r1, r2 in product((0, 1), repeat=2)
    )


def _others(table: Tensor, counts: list[int], rates: list[float], without: list[int]) -> Tensor:
    return torch.ones(1, dtype=torch.float64) if table.shape[1] == 1 else success_counts(counts, rates, without)


def success_counts(counts: list[int], rates: list[float], without: list[int]) -> Tensor:
    """The law of the number of right completions in a group of ``counts[w]`` completions by writer w, each right with
    ``rates[w]``, after one completion by each writer in ``without`` is left out."""
    law = torch.ones(1, dtype=torch.float64)
    for writer, (count, rate) in enumerate(zip(counts, rates, strict=True)):
        for _ in range(count - without.count(writer)):
            law = torch.nn.functional.pad(law * (1 - rate), (0, 1)) + torch.nn.functional.pad(law * rate, (1, 0))
    return law


def advantage_table(advantage: Any, size: int) -> Tensor:
    """[2, G] float64: the advantage of a wrong and of a right completion when k = 0, ..., G - 1 others are right.

    Raises:
        UsageError: an advantage for which that is not enough to know.
    """
    if depends_on_order(advantage, size):
        raise UsageError(
            f"{type(advantage).__name__} depends on the order within a group of {size}, which cannot be enumerated: "
            "take an advantage that does not, or a correction that is sampled"
        )
    rows = []
    for own, k in product((0.0, 1.0), range(size)):
        reward = torch.tensor([own] + [1.0] * k + [0.0] * (size - 1 - k), dtype=torch.float64)
        rows.append(advantage(reward, torch.zeros(size, dtype=torch.long))[0])
    return torch.stack(rows).double().view(2, size)


def depends_on_order(advantage: Any, size: int) -> bool:
    """Whether a completion's advantage depends on its place in the group, the rewards being what they are."""
    group = torch.zeros(size, dtype=torch.long)
    for right in range(1, size):
        reward = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
        for order in (torch.arange(size).flip(0), torch.arange(size).roll(1), torch.arange(size).roll(size // 2)):
            moved = advantage(reward[order], group)
            for value in (0.0, 1.0):  # equally rewarded completions have equal advantages, wherever they stand
                chosen = moved[reward[order] == value]
                if not torch.allclose(chosen, chosen[:1].expand_as(chosen), rtol=1e-9, atol=1e-12):
                    return True
    return False


def _first_of_group(cell: Cell, correction: Any, a: Tensor, groups: Grouping, by_target: bool) -> Tensor:
    """[N, T]: the weight of every completion with advantage ``a`` [N]; for a mixed correction as the first of a group
    whose other members only fill the places."""
    index = torch.arange(len(cell.reward))
    if not traits(correction).mixed:
        return weights(cell, correction, index, index, a)
    order = torch.arange(groups.size)
    wrote = order < groups.by_target if by_target else order >= groups.size - groups.by_target
    repeated = index.repeat_interleave(groups.size)
    rollout = cell.rollout(repeated, repeated, wrote.repeat(len(index)))
    logp = cell.logp(cell.log_pi)[repeated]
    return weigh(correction, logp, rollout, a.repeat_interleave(groups.size))[:: groups.size]


def sample_moments(cell: Cell, correction: Any, advantage: Any, groups: Grouping, batch: int) -> Moments:
    """Moments from batches drawn from mu, for weights that depend on what the other completions are."""
    size = max(batch // groups.size, 1) * groups.size
    batches = max(SAMPLED_COMPLETIONS // size, 2)
    at_once = size if traits(correction).scope == "batch" else size * batches
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(cell.probability(cell.log_mu), batches * size, replacement=True, generator=generator)
    group = torch.arange(len(drawn)) // groups.size
    reward = cell.reward[drawn]
    a = torch.cat([advantage(r, g) for r, g in zip(reward.split(size), group.split(size), strict=True)]).double()
    parts = zip(drawn.split(at_once), group.split(at_once), a.split(at_once), strict=True)
    coefficient = torch.cat([weights(cell, correction, *part) * part[2][:, None] for part in parts])
    gradients = torch.stack(
        [_gradient(cell, i, c) for i, c in zip(drawn.split(size), coefficient.split(size), strict=True)]
    )
    mean = gradients.mean(0)
    variance = sum(cell.inner(g - mean, g - mean) for g in gradients) / (batches - 1)
    return Moments(mean, size * variance, batches, variance / batches)


def _gradient(cell: Cell, index: Tensor, coefficient: Tensor) -> Tensor:
    """[S, V]: the mean gradient of the completions at ``index`` [B] with coefficients [B, T]."""
    summed = torch.zeros(cell.tree.tokens.shape, dtype=torch.float64).index_add_(0, index, coefficient)
    return cell.vector(summed / len(index))


def all_groups(cell: Cell, correction: Any, advantage: Any, size: int) -> Moments:
    """Exact moments by brute force: every ordered group of ``size`` completions of the nested policy, N ** size of
    them. For corrections whose scope is the group or the batch, with the group as the batch; for tiny trees."""
    count = len(cell.reward)
    if count**size > 100_000:
        raise UsageError(f"{count} completions make {count**size} groups of {size}: too many to enumerate")
    members = torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)
    probability = cell.probability(cell.log_mu)[members].prod(1)
    by_batch = traits(correction).scope == "batch"
    number = torch.arange(len(members)).repeat_interleave(size)
    a = torch.cat([advantage(cell.reward[m], torch.zeros_like(m)) for m in members]).double()
    at_once = size if by_batch else len(number)
    parts = zip(members.flatten().split(at_once), number.split(at_once), a.split(at_once), strict=True)
    coefficient = torch.cat([weights(cell, correction, *part) for part in parts]) * a[:, None]
    gradients = torch.stack([_gradient(cell, m, c) for m, c in zip(members, coefficient.split(size), strict=True)])
    mean = (probability[:, None, None] * gradients).sum(0)
    variance = float(
        sum(p * cell.inner(g - mean, g - mean) for p, g in zip(probability.tolist(), gradients, strict=True))
    )
    return Moments(mean, size * variance)
