"""Rewards that need the group or the model: what the agent makes of an environment's rewards before advantages.

What a function of one episode's terminal info can say is a part of the environment's reward (``envs.shaping``); here
stand the rewards of published methods that look further, and those that a method prescribes. Metrics of accuracy are
of the verifier's verdicts, whatever stands here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from agents.monitoring.metrics import unshaped_rewards
from agents.rollout import Rollout
from envs.task import Task
from registry import UsageError, rewards

UNREADABLE = ("no_answer", "malformed")


class Scores(Protocol):
    """What measures completions under the target's present weights: ``agents.update.Update``."""

    def score(self, rollout: Rollout) -> Tensor: ...

    def entropies(self, rollout: Rollout) -> Tensor: ...


class Reward(Protocol):
    """A registered reward."""

    def __call__(self, rollout: Rollout, task: Task, scores: Scores) -> Tensor:
        """[B] rewards of the whole batch; ``rollout.reward`` is what the environment gave."""
        ...


@rewards.register("given")
@dataclass(frozen=True)
class Given:
    """The reward as the environment gives it."""

    def __call__(self, rollout: Rollout, task: Task, scores: Scores) -> Tensor:
        return rollout.reward


@rewards.register("partial")
@dataclass(frozen=True)
class Partial:
    """Adds ``weight`` where an answer can be read but is wrong: the rewards 1, .1 and 0 of ReFT (arXiv 2401.08967, sec.
    3.2).

    Attributes:
        weight: .1 in the paper.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        _check_finite(self, "weight")

    def __call__(self, rollout: Rollout, task: Task, scores: Scores) -> Tensor:
        readable = torch.tensor([info["status"] not in UNREADABLE for info in rollout.episodes])
        return rollout.reward + self.weight * (readable & _wrong(rollout))


@rewards.register("reasoning-gain")
@dataclass(frozen=True)
class ReasoningGain:
    """Adds ``weight`` tanh(mean_t log pi(a_t | x, c) - mean_t log pi(a_t | x)): how much the reasoning c raises the
    likelihood of the right answer a of the problem x (DRER, arXiv 2509.06024).

    c is the completion up to where it states its answer, and ends with what the template puts before an answer where it
    states none; without c that alone stands before a (our readings, as is the weight). The paper also lets advantages
    decay outside of usual lengths, which is not done here.

    Attributes:
        weight: of the part; 0 adds nothing.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        _check_finite(self, "weight")

    def __call__(self, rollout: Rollout, task: Task, scores: Scores) -> Tensor:
        if not self.weight or not len(rollout):
            return rollout.reward
        gain = self.likelihood(rollout, task, scores, True) - self.likelihood(rollout, task, scores, False)
        return rollout.reward + self.weight * torch.tanh(gain)

    def likelihood(self, rollout: Rollout, task: Task, scores: Scores, reasoned: bool) -> Tensor:
        """[B] mean log-probability of the right answer's tokens, after the reasoning or without it."""
        pairs = [_before_and_answer(row, rollout, task, reasoned) for row in range(len(rollout))]
        distinct: dict[Any, int] = {}
        place = [
            distinct.setdefault((row if reasoned else int(rollout.group[row]), *map(tuple, pair)), row)
            for row, pair in enumerate(pairs)
        ]
        rows = list(distinct.values())
        whole = [torch.tensor([*pairs[row][0], *pairs[row][1]], dtype=torch.int64) for row in rows]
        length = torch.tensor([len(one) for one in whole])
        tokens = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        position = torch.arange(tokens.shape[1])
        mask = position < length[:, None]
        logp = scores.score(
            Rollout(
                prompts=tuple(rollout.prompts[row] for row in rows),
                tokens=tokens,
                mask=mask,
                behavior_logp=torch.zeros(tokens.shape),
                reward=torch.zeros(len(rows)),
                group=rollout.group[rows],
            )
        )
        answer = mask & (position >= torch.tensor([len(pairs[row][0]) for row in rows])[:, None])
        mean = torch.where(answer, logp, 0.0).sum(1) / answer.sum(1)
        number = {row: n for n, row in enumerate(rows)}
        return mean[[number[row] for row in place]]


def _before_and_answer(row: int, rollout: Rollout, task: Task, reasoned: bool) -> tuple[list[int], list[int]]:
    """Token ids of what comes before the right answer of a completion's problem, and of that answer."""
    info = rollout.episodes[row]
    gold = task.problem(int(info["problem_index"])).answer
    lead = " " + task.template.demonstration(".", gold).partition(".")[2].rpartition(gold)[0].lstrip()
    before = lead
    if reasoned:
        text, stated = task.text(rollout.tokens[row][rollout.mask[row]].numpy()), str(info["extracted"])
        before = text[: text.rfind(stated)] if stated and stated in text else text + lead
    stem = before.rstrip()

    def encode(text: str) -> list[int]:
        return task.tokenizer.encode(text, add_special_tokens=False)

    answer = encode(before[len(stem) :] + gold)
    return encode(stem)[: max(0, task.spec.max_new_tokens - len(answer))], answer


@rewards.register("entropy-rank")
@dataclass(frozen=True)
class EntropyRank:
    """Adds ``best`` (1 - rank / (N - 1)) to the N wrong completions of a group that the token budget cut off, ranked by
    their entropies (R^3, arXiv 2601.19620).

    One beats another iff its mean entropy over the ``top`` share of its tokens, those of highest entropy, is higher and
    its mean entropy over all is lower. The rank is the number of those that beat it, and one alone gets nothing (our
    readings, as are the defaults).

    Attributes:
        best: R_max.
        top: p, a share of the tokens.
    """

    best: float = 0.1
    top: float = 0.2

    def __post_init__(self) -> None:
        _check_finite(self, "best")
        if not 0 < self.top <= 1:
            raise UsageError(f"entropy-rank: top={self.top} must be in (0, 1], a share of a completion's tokens")

    def __call__(self, rollout: Rollout, task: Task, scores: Scores) -> Tensor:
        index = (rollout.truncated & _wrong(rollout)).nonzero()[:, 0]
        if not len(index):
            return rollout.reward
        cut = rollout.select(index)
        added = torch.zeros_like(rollout.reward)
        added[index] = self.ranked(scores.entropies(cut), cut.mask, cut.group)
        return rollout.reward + added

    def ranked(self, entropy: Tensor, mask: Tensor, group: Tensor) -> Tensor:
        """[N] what entropies [N, T] earn within each group."""
        length = mask.sum(1)
        mean = torch.where(mask, entropy, 0.0).sum(1) / length
        ordered = torch.where(mask, entropy, -math.inf).sort(1, descending=True).values
        count = (self.top * length).ceil().clamp(min=1)
        head = torch.arange(mask.shape[1]) < count[:, None]
        peak = torch.where(head, ordered, 0.0).sum(1) / count
        beats = (peak[:, None] > peak) & (mean[:, None] < mean) & (group[:, None] == group)  # [i, j]: i beats j
        rivals = (group[:, None] == group).sum(1) - 1
        return torch.where(rivals > 0, self.best * (1 - beats.sum(0) / rivals.clamp(min=1)), 0.0)


def _wrong(rollout: Rollout) -> Tensor:
    """[B] bool, completions that did not earn the whole reward."""
    return torch.from_numpy(unshaped_rewards(rollout) < 1)


def _check_finite(owner: Any, name: str) -> None:
    if not math.isfinite(getattr(owner, name)):
        raise UsageError(f"{type(owner).__name__}.{name}={getattr(owner, name)!r} must be a finite number")
