"""The native vector environment as a stable-baselines3 ``VecEnv`` (this module alone needs stable-baselines3)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from registry import UsageError


class SB3VecEnv(VecEnv):
    """A SAME_STEP gymnasium ``VectorEnv`` behind SB3's interface: final observations become ``terminal_observation``,
    final infos the step's info, truncation ``TimeLimit.truncated``. Observations are copies: SB3 stores the last one
    after the next step. The info of an episode's last step has ``episode`` as of SB3's ``Monitor``: the sum ``r`` of
    its rewards, its length ``l`` in steps and the seconds ``t`` since this object was made.

    Raises:
        UsageError: the vector env resets in another mode, which SB3 cannot express.
    """

    def __init__(self, venv: VectorEnv) -> None:
        mode = venv.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise UsageError(f"SB3 needs AutoresetMode.SAME_STEP, this vector env has {mode}; make it with that mode")
        self.venv = venv
        self._actions: np.ndarray = np.zeros(venv.num_envs, dtype=np.int64)
        self._began = time.perf_counter()
        self._return = np.zeros(venv.num_envs, dtype=np.float64)
        self._steps = np.zeros(venv.num_envs, dtype=np.int64)
        super().__init__(venv.num_envs, venv.single_observation_space, venv.single_action_space)

    def reset(self) -> Any:
        """Reset all slots, with the seeds and options that ``seed`` and ``set_options`` left."""
        seed = [None if s is None else int(s) for s in self._seeds]
        options = _shared_options(self._options)
        given = seed if any(s is not None for s in seed) else None
        observation, infos = self.venv.reset(seed=given, options=options)  # type: ignore[arg-type]
        begun = (options or {}).get("reset_mask")  # of others the episodes go on
        for slot in range(self.num_envs) if begun is None else np.flatnonzero(begun).tolist():
            self.reset_infos[slot] = _slot_info(infos, slot)
            self._return[slot], self._steps[slot] = 0.0, 0
        self._reset_seeds()
        self._reset_options()
        return deepcopy(observation)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observation, rewards, terminated, truncated, infos = self.venv.step(self._actions)
        done = terminated | truncated
        self._return += rewards
        self._steps += 1
        seconds = round(time.perf_counter() - self._began, 6)
        out: list[dict[str, Any]] = []
        for slot in range(self.num_envs):
            if not done[slot]:
                out.append({})
                continue
            info = _slot_info(infos["final_info"], slot)
            info["terminal_observation"] = infos["final_obs"][slot]
            info["TimeLimit.truncated"] = bool(truncated[slot] and not terminated[slot])
            info["episode"] = {"r": round(float(self._return[slot]), 6), "l": int(self._steps[slot]), "t": seconds}
            self._return[slot], self._steps[slot] = 0.0, 0
            out.append(info)
            # RecordEpisodeStatistics says beside the next episode's start how the last one ended.
            ended = ("final_info", "final_obs", "episode")
            started = {key: value for key, value in infos.items() if key.removeprefix("_") not in ended}
            self.reset_infos[slot] = _slot_info(started, slot)
        return deepcopy(observation), rewards.astype(np.float32), done, out  # type: ignore[return-value]

    def close(self) -> None:
        self.venv.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Of each slot: its own spaces and its own generator's seed; all else is what the vector env has for all."""
        own = {"action_space": "single_action_space", "observation_space": "single_observation_space"}
        value = getattr(self.venv, own.get(attr_name, attr_name))
        by_slot = attr_name in ("np_random", "np_random_seed") and isinstance(value, tuple)
        return [value[slot] if by_slot else value for slot in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise UsageError(f"attribute {attr_name!r} is shared by all slots; set it on the vector env itself")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        raise UsageError(f"slots have no method of their own; call {method_name!r} on the vector env itself")

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def render(self, mode: str | None = None) -> Any:
        """What the vector env renders: with ``ansi`` its texts, which the mode ``human`` writes to the terminal."""
        if self.venv.render_mode is None:
            warnings.warn("render() shows nothing: make the vector env with render_mode='ansi'", stacklevel=2)
            return None
        shown = self.venv.render()
        if mode == "human" and shown is not None:
            print(*shown, sep="\n", flush=True)
        return shown

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [None] * self.num_envs


def _shared_options(options: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Options per slot as those of the vector env: ``problem_index`` may differ by slot, all others are shared.

    Raises:
        UsageError: another option differs between the slots.
    """
    if all(_equal(one, options[0]) for one in options):
        return options[0] or None
    rest = [{key: value for key, value in one.items() if key != "problem_index"} for one in options]
    for one in rest:
        if not _equal(one, rest[0]):
            raise UsageError(f"set_options: {one} and {rest[0]} differ, but slots share all options but problem_index")
    return {**rest[0], "problem_indices": [one.get("problem_index") for one in options]}


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether options are the same, arrays among them."""
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def _slot_info(infos: dict[str, Any], slot: int) -> dict[str, Any]:
    """One slot's info out of a vector info with ``_key`` masks."""
    info: dict[str, Any] = {}
    for key, value in infos.items():
        if key.startswith("_") or not infos.get(f"_{key}", np.zeros(slot + 1, dtype=bool))[slot]:
            continue
        if isinstance(value, dict):
            info[key] = _slot_info(value, slot)
        else:
            item = value[slot]
            info[key] = item.item() if isinstance(item, np.generic) else item
    return info
