"""Whatever a user hands an agent as its environment, as the vector env that rollouts need."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from envs.math_reason import MathReason
from envs.sb3 import SB3VecEnv
from envs.vector import MathReasonVector
from registry import UsageError

MOST_SLOTS = 256  # beyond this a step's products no longer gain from more rows on a CPU


def slots_of(env: Any, slots: int | None, episodes: int) -> int:
    """How many slots to make for ``env``: its own, else ``slots``, else one an episode up to ``MOST_SLOTS``."""
    own = getattr(env, "num_envs", None)
    if own is not None and slots is not None and own != slots:
        raise UsageError(f"slots={slots}, but the environment given has {own}; leave slots out")
    if slots is not None and slots < 1:
        raise UsageError(f"slots={slots} must be at least 1")
    return own or slots or min(episodes, MOST_SLOTS)


def vector_env_of(env: Any, slots: int) -> VectorEnv:
    """A gymnasium vector env over ``MathReasonVector``.

    Raises:
        UsageError: the environment is not a MathReason, or is inside an SB3 wrapper, which rollouts would bypass.
    """
    if isinstance(env, str):
        return gym.make_vec(env, num_envs=slots, copy=False)
    if isinstance(env, SB3VecEnv):
        return env.venv
    if isinstance(env, VecEnv):
        raise UsageError(
            f"{type(env).__name__} would be bypassed: wrap the gymnasium vector env with gymnasium.wrappers.vector "
            "and pass that, or SB3VecEnv of it"
        )
    if isinstance(env, VectorEnv) and isinstance(env.unwrapped, MathReasonVector):
        return env
    if isinstance(env, gym.Env) and isinstance(env.unwrapped, MathReason):
        return MathReasonVector(num_envs=slots, copy=False, **asdict(env.unwrapped.task.spec))
    raise UsageError(f"env={env!r} is no MathReason environment: pass an id, gym.make('MathReason-v0') or make_vec's")
