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
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper

from envs.problem import PENDING
from registry import UsageError, reward_parts


class RewardPart(Protocol):
    """A named part of the reward, a function of an episode's terminal info."""

    @property
    def name(self) -> str: ...

    def __call__(self, info: Mapping[str, Any]) -> float: ...


@reward_parts.register("format")
@dataclass(frozen=True)
class FormatReward:
    """``weight`` for an answer that is there and can be read, right or wrong.

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
    """Minus ``weight`` for every token beyond ``free_tokens``.

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

    def __call__(self, info: Mapping[str, Any]) -> float:
        return -self.weight * max(0, int(info["response_len"]) - self.free_tokens)


def _check_weight(part: FormatReward | LengthPenalty) -> None:
    if not isinstance(part.weight, int | float) or not math.isfinite(part.weight):
        raise UsageError(f"{part.name}: weight={part.weight!r} must be a finite number")


def make_parts(given: Iterable[Any]) -> tuple[RewardPart, ...]:
    """Reward parts from ids, from ``{"id": ..., field: value}`` or as they are; raises ``UsageError`` for an unknown
    name and for two parts of one name."""
    parts = tuple(reward_parts.build(one) for one in given)
    names = [part.name for part in parts]
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
    Raises ``UsageError`` for a part whose name the info has already."""
    shares = {part.name: float(part(info)) for part in parts}
    for name in shares:
        if name in info:
            raise UsageError(f"reward part {name!r} would hide {name!r} in the terminal info; give it another 'name'")
    return reward + sum(shares.values()), {"verdict_reward": reward, **info, **shares}


class ShapedReward(gym.Wrapper):
    """Adds reward parts to a single environment."""

    def __init__(self, env: gym.Env, parts: Sequence[Any]) -> None:
        super().__init__(env)
        self.parts = make_parts(parts)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The environment's step, with the parts added at the end of an episode."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            reward, info = shape(self.parts, float(reward), info)
        return observation, float(reward), terminated, truncated, info


class ShapedRewardVector(VectorWrapper):
    """Adds reward parts to the native vector environment; each stands in ``final_info``, [S] with a mask. A verdict
    that is deferred gets no part: give ``reward_parts`` to the environment itself for that."""

    def __init__(self, env: VectorEnv, parts: Sequence[Any]) -> None:
        super().__init__(env)
        self.parts = make_parts(parts)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The environment's step, with the parts added where an episode ended."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        ended = np.asarray(terminations) | np.asarray(truncations)
        if not ended.any():
            return observations, rewards, terminations, truncations, infos
        rewards, final = np.array(rewards, dtype=np.float64), dict(infos["final_info"])
        for slot in np.flatnonzero(ended):
            info = {key: values[slot] for key, values in infos["final_info"].items() if not key.startswith("_")}
            if info["status"] == PENDING.status:
                continue
            rewards[slot], info = shape(self.parts, float(rewards[slot]), info)
            for key in ("verdict_reward", *(part.name for part in self.parts)):
                final.setdefault(key, np.zeros(len(ended)))[slot] = info[key]
                final.setdefault(f"_{key}", np.zeros(len(ended), dtype=np.bool_))[slot] = True
        return observations, rewards, terminations, truncations, {**infos, "final_info": final}
