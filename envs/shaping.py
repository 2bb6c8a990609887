"""Optional parts of the reward: nothing here is on unless it is asked for.

    env = gym.make("MathReason-v0", reward_parts=("format", {"id": "length-penalty", "weight": 0.01}))
    env = ShapedReward(gym.make("MathReason-v0"), ["format", LengthPenalty(0.01)])
    venv = ShapedRewardVector(gym.make_vec("MathReason-v0", num_envs=8), ["format"])

The shaped reward is the verdict's plus every part's, on the last token; the terminal info holds each of them. Shaping
is easily hacked (a reward for form alone teaches form alone), so ``is_success`` stays what the verifier said.

``registry.reward_parts`` holds the parts by name, and a part of yours is registered in the same way. The environment's
own field takes registered parts; the wrappers take any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from envs.problem import PENDING
from registry import UsageError, reward_parts


class RewardPart(Protocol):
    """A named part of the reward, a function of an episode's terminal info. One with a ``check(max_new_tokens)`` is
    asked whether it can act in an environment of that budget."""

    @property
    def name(self) -> str: ...

    def __call__(self, info: Mapping[str, Any]) -> float: ...


@reward_parts.register("format")
@dataclass(frozen=True)
class FormatReward:
    """Adds ``weight`` for an answer that is there and can be read, right or wrong.

    Attributes:
        weight: the reward.
        name: of the part, in infos.
    """

    weight: float = 0.1
    name: str = "format_reward"

    def __post_init__(self) -> None:
        _check_weight(self)

    def __call__(self, info: Mapping[str, Any]) -> float:
        return 0.0 if info["status"] in ("no_answer", "malformed") else self.weight


@reward_parts.register("length-penalty")
@dataclass(frozen=True)
class LengthPenalty:
    """Takes ``weight`` for every token beyond ``free_tokens``.

    Attributes:
        weight: per token.
        free_tokens: completions up to this length cost nothing.
        name: of the part, in infos.
    """

    weight: float = 0.001
    free_tokens: int = 0
    name: str = "length_penalty"

    def __post_init__(self) -> None:
        _check_weight(self)
        if self.free_tokens < 0:
            raise UsageError(f"{self.name}: free_tokens={self.free_tokens} must be at least 0")

    def __call__(self, info: Mapping[str, Any]) -> float:
        return -self.weight * max(0, int(info["response_len"]) - self.free_tokens)


@reward_parts.register("overlong")
@dataclass(frozen=True)
class OverlongPunishment:
    """Takes nothing up to ``free_tokens``, ``weight`` from ``max_tokens`` on and a share of it in between: DAPO's soft
    overlong punishment (arXiv 2503.14476, eq. 13, whose L_cache is max_tokens - free_tokens).

    Attributes:
        weight: the most it takes.
        free_tokens: completions up to this length cost nothing.
        max_tokens: from this length on a completion costs all; the published value, as that of ``free_tokens``, is for
            budgets of 20,480 tokens.
        name: of the part, in infos.
    """

    weight: float = 1.0
    free_tokens: int = 16_384
    max_tokens: int = 20_480
    name: str = "overlong_punishment"

    def __post_init__(self) -> None:
        _check_weight(self)
        if not 0 <= self.free_tokens < self.max_tokens:
            raise UsageError(
                f"{self.name}: free_tokens={self.free_tokens} must be at least 0 and below max_tokens={self.max_tokens}"
            )

    def check(self, max_new_tokens: int) -> None:
        """Raise UsageError where no completion of a budget of ``max_new_tokens`` can be too long."""
        if self.free_tokens >= max_new_tokens:
            raise UsageError(
                f"{self.name}: free_tokens={self.free_tokens} is not below max_new_tokens={max_new_tokens}, so that "
                f"nothing is ever taken: set max_tokens={max_new_tokens} and free_tokens to, say, "
                f"{max_new_tokens * 4 // 5}"
            )

    def __call__(self, info: Mapping[str, Any]) -> float:
        over = (int(info["response_len"]) - self.free_tokens) / (self.max_tokens - self.free_tokens)
        return -self.weight * min(1.0, max(0.0, over))


def _check_weight(part: FormatReward | LengthPenalty | OverlongPunishment) -> None:
    if not isinstance(part.weight, Real) or not math.isfinite(part.weight):
        raise UsageError(f"{part.name}: weight={part.weight!r} must be a finite number")


def make_parts(given: Iterable[Any], max_new_tokens: int | None = None) -> tuple[RewardPart, ...]:
    """Reward parts from ids, from ``{"id": ..., field: value}`` or as they are; raises ``UsageError`` for an unknown
    name, for two parts of one name and for one that cannot act within ``max_new_tokens``, where that is known."""
    parts = tuple(reward_parts.build(one) for one in given)
    for part in parts:
        if max_new_tokens is not None and hasattr(part, "check"):
            part.check(max_new_tokens)
    names = [part.name for part in parts]
    for name in names:
        if not isinstance(name, str) or not name or name.startswith("_") or name == "verdict_reward":
            raise UsageError(
                f"a reward part has the name {name!r}: give it a text that is not 'verdict_reward' and does not begin "
                "with an underscore, as masks of vector infos do"
            )
    if len(set(names)) != len(names):
        raise UsageError(f"two reward parts have one name ({', '.join(names)}); give one of them another 'name'")
    return parts


def whole_parts(given: Iterable[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reward parts as a run's spec holds them: each an ``{"id": ..., field: value}`` of all its fields. Raises
    ``UsageError`` as ``make_parts`` does."""
    ids = [{"id": one} if isinstance(one, str) else dict(one) for one in given]
    make_parts(ids)
    defaults = [{name: field.default for name, field in reward_parts.fields(one["id"]).items()} for one in ids]
    return [{"id": one["id"], **default, **one} for one, default in zip(ids, defaults, strict=True)]


def shape(parts: Sequence[RewardPart], reward: float, info: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The reward of an episode with the parts added, and its terminal info with each of them and ``verdict_reward``.
    Raises ``UsageError`` for a part whose name the info has already.

    >>> parts = make_parts([FormatReward(0.5), {"id": "length-penalty", "weight": 0.5, "free_tokens": 10}])
    >>> reward, info = shape(parts, 1.0, {"status": "right", "response_len": 12})
    >>> reward, info["verdict_reward"], info["format_reward"], info["length_penalty"]
    (0.5, 1.0, 0.5, -1.0)
    """
    shares = {part.name: _share(part, info) for part in parts}
    for name in shares:
        if name in info:
            raise UsageError(f"reward part {name!r} would hide {name!r} in the terminal info; give it another 'name'")
    return reward + sum(shares.values()), {"verdict_reward": reward, **info, **shares}


def _share(part: RewardPart, info: Mapping[str, Any]) -> float:
    try:
        return float(part(info))
    except KeyError as error:
        raise UsageError(
            f"reward part {part.name!r} needs {error.args[0]!r}, which this environment's terminal info has not: there "
            f"are {', '.join(info)}"
        ) from error


def _is_judged(info: Mapping[str, Any], cut: bool) -> bool:
    """Whether an ended episode has its verdict, which one that was ``cut`` from outside (``TimeLimit``) has not."""
    if "status" not in info and not cut:
        raise UsageError(
            "reward parts are of verdicts, and this environment's terminal info has none ('status'): wrap MathReason "
            "or TextMathReason"
        )
    return info.get("status", PENDING.status) != PENDING.status


def _budget(env: Any) -> int | None:
    """The token budget of an environment that has a task."""
    task = getattr(env.unwrapped, "task", None)
    return None if task is None else task.spec.max_new_tokens


class ShapedReward(gym.Wrapper):
    """Adds reward parts to a single environment."""

    def __init__(self, env: gym.Env, parts: Sequence[Any]) -> None:
        super().__init__(env)
        self.parts = make_parts(parts, _budget(env))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The environment's step, with the parts added at the end of an episode."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if (terminated or truncated) and _is_judged(info, cut=not terminated):
            reward, info = shape(self.parts, float(reward), info)
        return observation, float(reward), terminated, truncated, info


class ShapedRewardVector(VectorWrapper):
    """Adds reward parts to the native vector environment; each stands in ``final_info``, [S] with a mask. A verdict
    that is deferred gets no part: give ``reward_parts`` to the environment itself for that.

    Raises:
        UsageError: the environment resets in another mode than SAME_STEP, so that no final info stands beside a reward.
    """

    def __init__(self, env: VectorEnv, parts: Sequence[Any]) -> None:
        super().__init__(env)
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise UsageError(f"ShapedRewardVector needs AutoresetMode.SAME_STEP, this vector env has {mode}")
        self.parts = make_parts(parts, _budget(env))

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The environment's step, with the parts added where an episode ended."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        ended = np.asarray(terminations) | np.asarray(truncations)
        if not ended.any():
            return observations, rewards, terminations, truncations, infos
        rewards, final = np.array(rewards, dtype=np.float64), dict(infos["final_info"])
        for slot in np.flatnonzero(ended):
            there = {key: values for key, values in final.items() if not key.startswith("_")}
            info = {key: values[slot] for key, values in there.items() if final.get(f"_{key}", ended)[slot]}
            if not _is_judged(info, cut=not terminations[slot]):
                continue
            rewards[slot], info = shape(self.parts, float(rewards[slot]), info)
            for key in ("verdict_reward", *(part.name for part in self.parts)):
                final.setdefault(key, np.zeros(len(ended)))[slot] = info[key]
                final.setdefault(f"_{key}", np.zeros(len(ended), dtype=np.bool_))[slot] = True
        return observations, rewards, terminations, truncations, {**infos, "final_info": final}
