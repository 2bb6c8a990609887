"""Advantages: from the rewards of a rollout to one number per completion. Call them on whole rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from registry import UsageError, advantages


@advantages.register("reinforce")
@dataclass(frozen=True)
class Reinforce:
    """``A = R - baseline`` (Williams 1992).

    Use: with one completion a problem, or where the baseline is known, as in the exact lab.
    """

    baseline: float = 0.0

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]; no use of the groups."""
        return reward - self.baseline


@advantages.register("unlabelled")
@dataclass(frozen=True)
class Unlabelled:
    """``A = 1``, whatever the reward: a supervised loss on the policy's own completions (UPFT, arXiv 2503.02875).

    E[grad log pi] is 0, so that a first step on completions of pi itself follows chance alone; what teaches are
    further steps on the same ones, and completions of another policy.

    Use: where no answers are known, with several steps a rollout, as the agent ``upft`` has it.
    """

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]; no use of either."""
        return torch.ones_like(reward)


@advantages.register("rloo")
@dataclass(frozen=True)
class RLOO:
    """``A_i = R_i`` minus the mean reward of the group's others: a baseline without bias (arXiv 2402.14740).

    Use: where the gradient must be unbiased, with ``aggregation=constant``.
    """

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]."""
        groups = Groups(group)
        size = groups.size.to(reward.dtype)[groups.member]
        return groups.centred(reward) * size / (size - 1)


@advantages.register("dr-grpo")
@dataclass(frozen=True)
class DrGRPO:
    """``A_i = R_i`` minus the group's mean: ``rloo`` times (G - 1) / G (arXiv 2503.20783).

    Use: to the letter of Dr. GRPO, with ``aggregation=constant`` and the token budget as its divisor.
    """

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]."""
        return Groups(group).centred(reward)


@advantages.register("grpo")
@dataclass(frozen=True)
class GRPO:
    """``A_i = (R_i - mean) / (std + eps)`` of the group, std with divisor G - 1 (arXiv 2402.03300, sec. 4.1.2).

    Use: by default; groups with few successes or few failures count more.
    """

    eps: float = 1e-4

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]."""
        groups = Groups(group)
        centred = groups.centred(reward)
        size = groups.size.to(reward.dtype)[groups.member]
        variance = groups.mean(centred.square()) * size / (size - 1)
        return centred / (variance.sqrt() + self.eps)


@advantages.register("down-sampled")
@dataclass(frozen=True)
class DownSampled:
    """``grpo`` on the ``keep`` completions of each group whose rewards vary most, 0 on the others (PODS, arXiv
    2504.13818). The update drops the others: for where a completion costs more to learn from than to write.

    Which of equally rewarded completions are kept is a matter of order. So with rewards 0 and 1 and completions of one
    policy a group's expected gradient is that of ``grpo``, up to a positive factor that depends on how many are right.

    Use: with groups of 16 and more, where writing is cheap and updates are dear.

    Attributes:
        keep: completions per group that the update sees; a group of no more is kept whole.
        eps: as in ``grpo``.
    """

    keep: int = 8
    eps: float = 1e-4

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise UsageError(f"down-sampled: keep={self.keep} must be at least 2")

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]."""
        kept = torch.cat([self._kept(reward, (group == one).nonzero()[:, 0]) for one in torch.unique(group)])
        advantage = torch.zeros_like(reward)
        advantage[kept] = GRPO(self.eps)(reward[kept], group[kept])
        return advantage

    def _kept(self, reward: Tensor, members: Tensor) -> Tensor:
        """The [keep] of ``members`` with the lowest and the highest rewards, as many of each as vary most: a subset of
        largest variance leaves a gap only in the middle."""
        if len(members) <= self.keep:
            return members
        ordered = members[reward[members].argsort(stable=True)]
        place = torch.arange(self.keep)
        lowest = torch.arange(self.keep + 1)[:, None]
        choices = ordered[torch.where(place < lowest, place, place + len(members) - self.keep)]
        return choices[reward[choices].double().var(1).argmax()]


@advantages.register("whitened")
@dataclass(frozen=True)
class Whitened:
    """``A = (R - mean) / (std + eps)`` of the whole rollout, whatever the groups: the batch normalisation of PPO
    implementations and REINFORCE++ (arXiv 2501.03262).

    Use: with one completion a problem, which leaves no group to compare with.
    """

    eps: float = 1e-4

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]; no use of the groups."""
        if len(reward) and reward.amax() == reward.amin():
            return torch.zeros_like(reward)
        return (reward - reward.mean()) / (reward.std(correction=0) + self.eps)


class Groups:
    """Groups of a rollout: ``member`` [B] is each completion's group as 0, 1, ..., ``size`` [groups] their sizes."""

    def __init__(self, group: Tensor) -> None:
        _, self.member, self.size = torch.unique(group, return_inverse=True, return_counts=True)
        if len(group) and int(self.size.min()) < 2:
            raise UsageError(
                "a group-relative advantage needs at least 2 completions per problem: raise group_size, or take "
                "advantage=reinforce"
            )

    def centred(self, values: Tensor) -> Tensor:
        """[B]: [B] minus the mean of each group, exactly 0 where all values of a group are equal: such a group has
        nothing to teach, and what rounding leaves of it would be learnt from."""
        low, high = (
            torch.zeros(len(self.size), dtype=values.dtype, device=values.device).scatter_reduce(
                0, self.member, values, end, include_self=False
            )
            for end in ("amin", "amax")
        )
        return torch.where((low == high)[self.member], 0.0, values - self.mean(values))

    def mean(self, values: Tensor) -> Tensor:
        """[B]: the mean of [B] over each completion's group."""
        total = torch.zeros(len(self.size), dtype=values.dtype, device=values.device)
        return (total.scatter_add(0, self.member, values) / self.size.to(values.dtype))[self.member]
