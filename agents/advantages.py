"""Advantages: from the rewards of a rollout to one number per completion. Call them on whole rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from registry import UsageError, advantages


@advantages.register("reinforce")
@dataclass(frozen=True)
class Reinforce:
    """A = R - baseline (Williams 1992)."""

    baseline: float = 0.0

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]; no use of the groups."""
        return reward - self.baseline


@advantages.register("rloo")
@dataclass(frozen=True)
class RLOO:
    """A_i = R_i minus the mean reward of the group's others (arXiv 2402.14740): a baseline without bias."""

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]."""
        groups = Groups(group)
        size = groups.size.to(reward.dtype)[groups.member]
        return (reward - groups.mean(reward)) * size / (size - 1)


@advantages.register("dr-grpo")
@dataclass(frozen=True)
class DrGRPO:
    """A_i = R_i minus the group's mean (arXiv 2503.20783): ``rloo`` times (G - 1) / G."""

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]."""
        return reward - Groups(group).mean(reward)


@advantages.register("grpo")
@dataclass(frozen=True)
class GRPO:
    """A_i = (R_i - the group's mean) / (the group's standard deviation + eps) (arXiv 2402.03300, sec. 4.1.2), the
    deviation with divisor G - 1."""

    eps: float = 1e-4

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]."""
        groups = Groups(group)
        centred = reward - groups.mean(reward)
        size = groups.size.to(reward.dtype)[groups.member]
        variance = groups.mean(centred.square()) * size / (size - 1)
        return centred / (variance.sqrt() + self.eps)


@advantages.register("whitened")
@dataclass(frozen=True)
class Whitened:
    """A = (R - the rollout's mean) / (the rollout's standard deviation + eps), whatever the groups: the batch
    normalisation of PPO implementations and REINFORCE++ (arXiv 2501.03262)."""

    eps: float = 1e-4

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """[B] of reward [B] and group [B]; no use of the groups."""
        return (reward - reward.mean()) / (reward.std(correction=0) + self.eps)


class Groups:
    """Groups of a rollout: ``member`` [B] is each completion's group as 0, 1, ..., ``size`` [groups] their sizes."""

    def __init__(self, group: Tensor) -> None:
        _, self.member, self.size = torch.unique(group, return_inverse=True, return_counts=True)
        if len(group) and int(self.size.min()) < 2:
            raise UsageError(
                "a group-relative advantage needs at least 2 completions per problem: raise the group size"
            )

    def mean(self, values: Tensor) -> Tensor:
        """[B]: the mean of [B] over each completion's group."""
        total = torch.zeros(len(self.size), dtype=values.dtype, device=values.device)
        return (total.scatter_add(0, self.member, values) / self.size.to(values.dtype))[self.member]
