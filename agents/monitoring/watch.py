"""What a run says where it cannot learn. Such a run ends well, costs as much as another, and changes nothing.

Each thing is said once a run, as a warning, so that ``learn()``, a loop of one's own and the benchmarks all show it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agents.corrections import traits
from agents.monitoring.diagnostics import warn_collapse

SILENT = 3  # iterations in a row without a gradient that are more than bad luck
MOST = 0.5  # share of completions from which on one cause is the cause


class NoGradient(UserWarning):
    """Several iterations in a row had nothing to learn from."""


class StaleData(UserWarning):
    """Several steps on one rollout without a correction of what the first ones changed."""


@dataclass
class Watch:
    """Hears every iteration's metrics and says, once each, that too few completions carry the update
    (``agents.monitoring.diagnostics.collapse``) and that none does (``explain_silence``)."""

    silent: list[Mapping[str, float]] = field(default_factory=list)
    said_collapse: bool = False
    said_silence: bool = False

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Hear of one iteration."""
        if not self.said_collapse:
            self.said_collapse = warn_collapse(metrics) is not None
        self.silent = [*self.silent, metrics][-SILENT:] if is_silent(metrics) else []
        if len(self.silent) == SILENT and not self.said_silence:
            self.said_silence = True
            warnings.warn(
                f"{SILENT} iterations in a row had no gradient of the reward: {explain_silence(self.silent)}",
                NoGradient,
                stacklevel=3,
            )


def is_silent(metrics: Mapping[str, float]) -> bool:
    """Whether an iteration had no gradient of the reward: no completion had an advantage, or, for an agent that
    compares completions of all problems, all had the same reward."""
    return metrics.get("sequences_used", metrics.get("reward_spread")) == 0.0


def longest_silence(rows: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The longest run of ``rows`` (an iteration's metrics each) without a gradient; the first of equally long ones."""
    longest: Sequence[Mapping[str, float]] = []
    start = 0
    for n, row in enumerate(rows):
        if not is_silent(row):
            start = n + 1
        elif n + 1 - start > len(longest):
            longest = rows[start : n + 1]
    return longest


def explain_silence(rows: Sequence[Mapping[str, float]]) -> str:
    """Why the completions of ``rows`` (metrics of iterations without a gradient) were all of the same worth, and what
    to change: the cause is length, format or difficulty, in this order, since each hides the next."""

    rows = [row for row in rows if "rollout_accuracy" in row] or rows  # the others wrote nothing

    def share(name: str) -> float:
        return sum(row.get(name) or 0.0 for row in rows) / len(rows)

    right, cut_off, unread = share("rollout_accuracy"), share("finish/length"), share("status/no_answer")
    if right == 1:
        return (
            "every completion is right. The problems are too easy: take harder ones, or problem_sampler=curriculum, "
            "which looks for those that are right about half of the time"
        )
    if right < MOST <= cut_off:
        return (
            f"{cut_off:.0%} of the completions are cut off (finish/length, {share('mean_length'):.0f} tokens each) "
            "before an answer counts. Raise max_new_tokens"
        )
    if right < MOST <= unread:
        return (
            f"{unread:.0%} of the completions have no answer that can be read (status/no_answer). Take the template "
            "that the model was trained with, or teach it the form first (agent sft)"
        )
    if right == 0:
        verdicts = {name.removeprefix("status/") for row in rows for name in row if name.startswith("status/")}
        listed = ", ".join(f"{name} {share(f'status/{name}'):.0%}" for name in sorted(verdicts))
        return (
            f"no completion is right ({listed}). Take easier problems, a better model (agent sft), or "
            "a larger group_size"
        )
    return (
        f"within each problem all completions have the same reward, although {right:.1%} are right. Raise group_size "
        "or temperature, or take problem_sampler=curriculum"
    )


def warn_stale(correction: Any, steps: int, batch: Any) -> None:
    """Say so where completions of older weights would be taken for the current policy's: in later steps of a rollout,
    or in a batch that they wrote."""
    if steps > 1 and traits(correction).is_identity:
        warnings.warn(
            f"correction=none with {steps} steps a rollout (minibatches * epochs): the later ones know neither the "
            "ratio pi / pi_old nor a clip. Take ppo-clip, which is the same in a rollout's first step",
            StaleData,
            stacklevel=3,
        )
    if getattr(batch, "is_off_policy", batch.keeps or batch.lag) and not traits(correction).corrects_mu:
        warnings.warn(
            f"batch={batch!r} trains on completions of older weights, and correction={correction!r} knows nothing of "
            "the ratio pi / mu to them: take token-is, truncated-is or retrace, or a product such as "
            "truncated-is*ppo-clip",
            StaleData,
            stacklevel=3,
        )
