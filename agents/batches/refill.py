"""Refill: further groups in place of those whose completions are all right or all wrong (DAPO's dynamic sampling, arXiv
2503.14476, sec. 3.2), within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agents.monitoring.metrics import success_rates
from agents.rollout import Rollout, joined


def refill(rollout: Rollout, group_size: int, tokens: int, write: Callable[[int], Rollout]) -> Rollout:
    """``rollout`` with the further groups that ``write(count)`` gives, round by round, until as many have signal as it
    had groups. No round begins once ``tokens`` further tokens are written."""
    groups = len(rollout) // group_size
    most = int(rollout.mask.sum()) + tokens
    while (lacking := groups - int(has_signal(rollout, group_size).sum())) > 0 and int(rollout.mask.sum()) < most:
        rollout = joined(rollout, write(lacking))
    return rollout


def batch_of(rollout: Rollout, group_size: int, groups: int) -> Rollout:
    """``groups`` groups of a rollout in their order: those with signal, and the first others where these are too few.
    So every update is of as many groups."""
    if len(rollout) == groups * group_size:
        return rollout
    signal = has_signal(rollout, group_size)
    chosen = torch.cat([signal.nonzero()[:, 0], (~signal).nonzero()[:, 0]])[:groups].sort().values
    return rollout.select((chosen[:, None] * group_size + torch.arange(group_size)).flatten())


def left_out(rollout: Rollout, batch: Rollout) -> Rollout | None:
    """The groups of ``rollout`` that are not in its ``batch``; None if there is none."""
    index = (~torch.isin(rollout.group, batch.group)).nonzero()[:, 0]
    return rollout.select(index) if len(index) else None


def has_signal(rollout: Rollout, group_size: int) -> Tensor:
    """[groups] bool, whether some completions of a group are right and some wrong (there, eq. 11), whatever parts the
    reward has beside the verdict."""
    right = torch.from_numpy(success_rates(rollout, group_size))
    return (right > 0) & (right < 1)


def refill_metrics(rollout: Rollout, group_size: int, groups: int) -> dict[str, float]:
    """How many groups and tokens came after the first ``groups`` groups."""
    further = rollout.mask[groups * group_size :]
    return {"refill_groups": len(further) / group_size, "refill_tokens": float(further.sum())}
