"""What the lab enumerates, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from registry import UsageError


@dataclass(frozen=True)
class Grouping:
    """How completions are grouped: G (``size``) per problem, of which ``by_target`` are written by the target for
    corrections that expect it (``mixed``)."""

    size: int = 8
    by_target: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"groups of {self.size} completions: give at least 1")
        if not 0 <= self.by_target < self.size:
            raise UsageError(f"{self.by_target} of {self.size} completions by the target: the nested policy writes one")


@dataclass(frozen=True)
class Sweep:
    """What to enumerate.

    Attributes:
        divergences: D of a noised pi, nats per completion.
        horizons: T of the noised cells.
        successes: the target's success rates (how sparse the reward is).
        skips: layers left out of the mini transformer's 12, for the cells with a real nested policy.
        seeds: targets, rewards and noises drawn per setting.
        advantage: id of the advantage. ``reinforce`` takes the nested policy's success rate as its baseline, which is
            what the group mean of many completions tends to.
        groups: completions per problem, and how many of them the target writes where a correction expects that.
        batch: N, completions per update, at which the ascent efficiency is given.
    """

    divergences: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 2.0)
    horizons: tuple[int, ...] = (3, 6)
    successes: tuple[float, ...] = (0.5, 0.1)
    skips: tuple[int, ...] = (1, 2, 3, 6)
    seeds: int = 2
    advantage: str = "reinforce"
    groups: Grouping = field(default_factory=Grouping)
    batch: int = 256
