"""What an iteration tells of itself: seconds of its parts, accuracy, lengths and verdicts of its completions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agents.rollout import Rollout
from envs.task import INFO


class Laps:
    """Seconds of an iteration's parts by name, once each: ``with laps("rollout"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what is inside."""
        began = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - began


def rollout_metrics(rollout: Rollout, group_size: int) -> dict[str, float]:
    """Accuracy under the behaviour policy, share of groups that carry a gradient, lengths, entropy and verdict counts;
    empty where nothing was written."""
    if not len(rollout):
        return {}
    reward = rollout.reward.view(-1, group_size)
    return {
        "rollout_reward": float(reward.mean()),
        "groups_with_signal": float((reward.amax(1) > reward.amin(1)).float().mean()),
        "mean_length": float(rollout.mask.sum(1).float().mean()),
        "entropy": rollout.entropy,
        **_reward_parts(rollout.episodes),
        **verdict_metrics(rollout.episodes),
    }


def verdict_metrics(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``rollout_accuracy``, and the shares of verdicts and finish reasons among final infos."""
    statuses = Counter(info["status"] for info in episodes)
    reasons = Counter(info["finish_reason"] for info in episodes)
    return {
        "rollout_accuracy": float(np.mean([float(info["is_success"]) for info in episodes])),
        **{f"status/{name}": count / len(episodes) for name, count in sorted(statuses.items())},
        **{f"finish/{name}": count / len(episodes) for name, count in sorted(reasons.items())},
    }


def _reward_parts(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``reward/`` and the name of each part of a shaped reward: its mean; ``reward/verdict_reward``, the verdict's."""
    names = {name for info in episodes for name in info if name not in INFO and _is_number(info[name])}
    return {f"reward/{name}": float(np.mean([info.get(name, 0.0) for info in episodes])) for name in sorted(names)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def draft_metrics(drafted: Tensor, rollout: Rollout) -> dict[str, float]:
    """Of the drafts of a rollout: ``draft/proposed`` and ``draft/accepted`` tokens, which cost a score instead of a
    step each; the accepted ones' ``draft/share`` of all tokens; ``draft/length``, those accepted of a draft.

    Args:
        drafted: [4], as ``Drafting.counts``.
    """
    drafts, proposed, accepted, _ = drafted.tolist()
    share, length = accepted / max(int(rollout.mask.sum()), 1), accepted / max(drafts, 1)
    return {
        "draft/proposed": proposed,
        "draft/accepted": accepted,
        "draft/share": share,
        "draft/length": length,
    }


def target_tokens(rollout: Rollout, skipped: float, drafting: float, drafted: Tensor) -> float:
    """Tokens by the target that would have cost as many layers' passes as ``rollout`` did to write.

    A nested writer's token counts by the share of the layers that it keeps. A place that was judged in vain takes a
    pass as a token does (in defensive groups as the mean of them), and a token of a draft one of what drafted it: of
    the layers that do, where there are any, even if some drafts were stored.

    Args:
        skipped: share of the layers that the nested writer skips, in [0, 1).
        drafting: share of the layers that draft; 0 where drafts are stored completions.
        drafted: [4], as ``Drafting.counts``.
    """
    lengths = rollout.mask.sum(1)
    nested = int(lengths.sum() if rollout.by_target is None else lengths[~rollout.by_target].sum())
    _, proposed, _, lost = drafted.tolist()
    written = int(lengths.sum()) - skipped * nested
    return written + lost * written / max(int(lengths.sum()), 1) + drafting * proposed


def success_rates(rollout: Rollout, group_size: int) -> NDArray[np.float64]:
    """[problems] mean of each group's ``unshaped_rewards``."""
    return unshaped_rewards(rollout).reshape(-1, group_size).mean(1)


def unshaped_rewards(rollout: Rollout) -> NDArray[np.float64]:
    """[B] rewards in [0, 1], without reward parts: what the verifier (or the control arm) said. Where a wrapper has
    changed rewards beyond that, 1 for successes."""
    episodes = zip(rollout.episodes, rollout.reward.tolist(), strict=True)
    unshaped = np.array([info.get("verdict_reward", reward) for info, reward in episodes])
    if not ((unshaped >= 0) & (unshaped <= 1)).all():
        unshaped = np.array([float(info["is_success"]) for info in rollout.episodes])
    return unshaped


def speed_metrics(rollout: Rollout, laps: Laps, judging: float) -> dict[str, float]:
    """Tokens, and seconds of the parts of an iteration; ``judging``, the rewards' share of the rollout, is apart."""
    tokens, wrote = int(rollout.mask.sum()), laps.seconds["rollout"]
    return {
        "tokens": tokens,
        **{f"time/{part}": seconds for part, seconds in laps.seconds.items()},
        "time/rollout": wrote - judging,
        "time/reward": judging,
        "rollout_tokens_per_second": tokens / wrote,
    }


def episode_metrics(finals: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy, mean completion length and shares of verdicts and finish reasons of the episodes that ended.

    A rollout of fixed length cuts off more of the long ones, so unlike a drained deck these lean towards short ones."""
    return {
        "episodes": float(len(finals)),
        "mean_length": float(np.mean([info["response_len"] for info in finals])),
        **verdict_metrics(finals),
    }
