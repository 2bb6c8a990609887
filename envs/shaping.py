"""Optional parts of the reward, as wrappers: nothing here is on unless it is asked for.

    env = ShapedReward(gym.make("MathReason-v0"), [FormatReward(0.1), LengthPenalty(0.001)])
    venv = ShapedRewardVector(gym.make_vec("MathReason-v0", num_envs=8), [FormatReward(0.1)])

The shaped reward is the verdict's plus every part's, on the last token; the terminal info holds each of them. Shaping
is easily hacked (a reward for form alone teaches form alone), so ``is_success`` stays what the verifier said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper

from registry import UsageError


class RewardPart(Protocol):
    """A named part of the reward, a function of an episode's terminal info."""

    @property
    def name(self) -> str: ...

    def __call__(self, info: Mapping[str, Any]) -> float: ...


@dataclass(frozen=True)
class FormatReward:
    """``weight`` for an answer that was found and could be read, right or wrong."""

    weight: float = 0.1
    name: str = "format_reward"

    def __call__(self, info: Mapping[str, Any]) -> float:
        return 0.0 if info["status"] in ("no_answer", "malformed") else self.weight


@dataclass(frozen=True)
class LengthPenalty:
    """Minus ``weight`` for every token beyond ``free_tokens``."""

    weight: float = 0.001
    free_tokens: int = 0
    name: str = "length_penalty"

    def __call__(self, info: Mapping[str, Any]) -> float:
        return -self.weight * max(0, int(info["response_len"]) - self.free_tokens)


def _distinct(parts: Sequence[RewardPart]) -> tuple[RewardPart, ...]:
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        raise UsageError(f"two reward parts have one name ({', '.join(names)}); pass name=... to one of them")
    return tuple(parts)


class ShapedReward(gym.Wrapper):
    """Adds reward parts to a single environment."""

    def __init__(self, env: gym.Env, parts: Sequence[RewardPart]) -> None:
        super().__init__(env)
        self.parts = _distinct(parts)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As the environment's, with the parts added at the end of an episode."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not (terminated or truncated):
            return observation, float(reward), terminated, truncated, info
        shares = {part.name: part(info) for part in self.parts}
        info = {**info, "verdict_reward": float(reward), **shares}
        return observation, float(reward) + sum(shares.values()), terminated, truncated, info


class ShapedRewardVector(VectorWrapper):
    """Adds reward parts to the native vector environment; shares stand in ``final_info``, [S] with masks."""

    def __init__(self, env: VectorEnv, parts: Sequence[RewardPart]) -> None:
        super().__init__(env)
        self.parts = _distinct(parts)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's, with the parts added where an episode ended."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        ended = np.asarray(terminations) | np.asarray(truncations)
        if not ended.any():
            return observations, rewards, terminations, truncations, infos
        final = dict(infos["final_info"])
        final["verdict_reward"], final["_verdict_reward"] = np.where(ended, rewards, 0.0), ended.copy()
        rewards = np.array(rewards, dtype=np.float64)
        for part in self.parts:
            share = np.zeros(len(ended))
            for slot in np.flatnonzero(ended):
                share[slot] = part({key: final[key][slot] for key in ("status", "response_len")})
            final[part.name], final[f"_{part.name}"] = share, ended.copy()
            rewards += share
        return observations, rewards, terminations, truncations, {**infos, "final_info": final}
