"""The vector env that rollouts are collected in, made of what an agent was given."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorActionWrapper, VectorEnv, VectorWrapper
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from envs import check_id
from envs.math_reason import MathReason
from envs.sb3 import SB3VecEnv
from envs.shaping import ShapedReward, ShapedRewardVector
from envs.vector import MathReasonVector
from registry import UsageError

ENTRY_POINT = "envs.vector:MathReasonVector"
CHECKS = (PassiveEnvChecker, OrderEnforcing, Monitor)
"""Wrappers of a single environment that change nothing of what an agent sees."""
SLOT_LIMIT = 2**16
MOST_SLOTS = 256  # beyond this a step's products no longer gain from more rows on a CPU


def slots_of(env: Any, slots: int | None, episodes: int) -> int:
    """How many slots to make for ``env``: its own, else ``slots``, else one an episode up to ``MOST_SLOTS``."""
    own = getattr(env, "num_envs", None)
    if own is not None and slots is not None and own != slots:
        raise UsageError(f"slots={slots}, but the environment given has {own}; leave slots out")
    if slots is not None and not 1 <= slots <= SLOT_LIMIT:
        raise UsageError(f"slots={slots} must be from 1 to {SLOT_LIMIT}")
    return own or slots or min(episodes, MOST_SLOTS)


def vector_env_in_place(env: Any, slots: int) -> VectorEnv:
    """``vector_env_of``, in place of one of as many slots. Raises UsageError for another number of them."""
    own = getattr(env, "num_envs", slots)
    if own != slots:
        raise UsageError(
            f"the environment has {own} slots and the agent {slots}: give set_env one of as many; an agent that is "
            "loaded (load(folder, env=...)) takes another number"
        )
    return vector_env_of(env, slots)


def vector_env_of(env: Any, slots: int) -> VectorEnv:
    """A gymnasium vector env over ``MathReasonVector``. A single environment is widened to ``slots`` slots of the same
    task; its reward parts (``ShapedReward``) are carried over.

    Raises:
        UsageError: the environment is not a MathReason, has a wrapper that rollouts would bypass, or is cut off before
            its verdict.
    """
    if isinstance(env, str):
        check_id(env)
        return _with_verdicts(make_by_id(env, slots))
    if isinstance(env, SB3VecEnv):
        return _with_verdicts(env.venv)
    if isinstance(env, VecEnv):
        raise UsageError(
            f"{type(env).__name__} would be bypassed: pass gym.make_vec('MathReason-v0', num_envs={env.num_envs}), in "
            "wrappers of gymnasium.wrappers.vector where you want some, or SB3VecEnv of it"
        )
    if isinstance(env, VectorEnv):
        return _with_verdicts(env)
    if isinstance(env, gym.Env) and isinstance(env.unwrapped, MathReason):
        return _widened(env, slots)
    raise UsageError(f"env={env!r} is no MathReason environment: pass an id, gym.make('MathReason-v0') or make_vec's")


def _widened(env: gym.Env, slots: int) -> VectorEnv:
    """A vector env of the single env's task, with the reward parts of its wrappers."""
    spec = env.unwrapped.task.spec  # type: ignore[attr-defined]
    parts: list[Any] = []
    layer = env
    while layer is not env.unwrapped:
        assert isinstance(layer, gym.Wrapper)
        limit = layer._max_episode_steps if type(layer) is TimeLimit else 0
        if limit:
            _check_limit(limit, spec.max_new_tokens)
        elif type(layer) is ShapedReward:
            parts.append(layer.parts)
        elif type(layer) not in CHECKS:
            raise _bypassed(type(layer))
        layer = layer.env
    if type(env.unwrapped) is not MathReason:
        raise UsageError(
            f"{type(env.unwrapped).__name__} would be bypassed: rollouts are collected in a MathReasonVector; pass a "
            "vector env of your own that inherits from it"
        )
    venv: VectorEnv = MathReasonVector(num_envs=slots, copy=False, **asdict(spec))
    for inner in reversed(parts):
        venv = ShapedRewardVector(venv, inner)
    return venv


def _bypassed(wrapper: type) -> UsageError:
    name = wrapper.__name__
    counterpart = (
        f"gymnasium.wrappers.vector.{name}" if hasattr(vector_wrappers, name) else "a gymnasium.vector.VectorWrapper"
    )
    return UsageError(
        f"{name} of a single environment would be bypassed: rollouts are collected in a vector env; put "
        f"{counterpart} around gym.make_vec('MathReason-v0', num_envs={MOST_SLOTS}) and pass that"
    )


def make_by_id(id: str, slots: int, **arguments: Any) -> VectorEnv:
    """``gym.make_vec`` of a registered id, without a copy of each observation.

    Raises:
        UsageError: it is no id of a MathReason environment.
    """
    spec = gym.registry.get(id)
    if spec is not None and spec.vector_entry_point is None:
        raise UsageError(
            f"env={id!r} has no vector env: take MathReason-v0, or register it with vector_entry_point={ENTRY_POINT!r}"
        )
    try:
        return gym.make_vec(id, num_envs=slots, copy=False, **arguments)
    except (gym.error.Error, TypeError) as error:
        if isinstance(error, UsageError) or (spec is not None and spec.vector_entry_point == ENTRY_POINT):
            raise
        raise UsageError(f"env={id!r} is no id of a MathReason environment: take MathReason-v0") from error


def _with_verdicts(venv: VectorEnv) -> VectorEnv:
    """The vector env, unless it is another one or a limit of steps ends its episodes before the verifier sees them."""
    if not isinstance(venv.unwrapped, MathReasonVector):
        raise UsageError(
            f"{type(venv.unwrapped).__name__} cannot deal problems to its slots: pass gym.make_vec('MathReason-v0', "
            "num_envs=N) without vectorization_mode, or a single environment"
        )
    layer = venv
    while isinstance(layer, VectorWrapper):
        if isinstance(layer, VectorActionWrapper | vector_wrappers.DictInfoToList):
            raise UsageError(
                f"{type(layer).__name__} changes tokens or infos between the policy and the environment, and "
                "rollouts record those of the environment: leave it out"
            )
        layer = layer.env
    if venv.unwrapped.max_episode_steps is not None:
        _check_limit(venv.unwrapped.max_episode_steps, venv.unwrapped.task.spec.max_new_tokens)
    return venv


def _check_limit(steps: int, budget: int) -> None:
    if steps < budget:
        raise UsageError(
            f"max_episode_steps={steps} (TimeLimit) would cut completions off before their verdict: "
            f"pass max_new_tokens={steps} instead"
        )
