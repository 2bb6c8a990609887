"""Math problems as token-level Gymnasium environments with verifiable rewards.

>>> import gymnasium as gym
>>> env = gym.make("MathReason-v0")  # generated problems, built-in tokenizer, offline
>>> observation, info = env.reset(seed=1)
>>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
>>> (reward, terminated, truncated)
(0.0, False, False)
>>> venv = gym.make_vec("MathReason-v0", num_envs=64)  # the native vector env, SAME_STEP autoreset
>>> venv.single_observation_space["input_ids"].shape
(104,)

``MathReason/<name>-v0`` serves each published set of ``envs.problems``. Importing this package registers the ids, and
the problem sources, templates and reward parts of the project.
"""

from typing import Any

from gymnasium.envs.registration import register, registry

from envs import shaping, templates  # noqa: F401 (registers their components)
from envs.problems.sources import PUBLISHED


def _register() -> None:
    entry: dict[str, Any] = {
        "entry_point": "envs.math_reason:MathReason",
        "vector_entry_point": "envs.vector:MathReasonVector",
    }
    if "MathReason-v0" not in registry:
        register("MathReason-v0", **entry)
    for name, source in PUBLISHED.items():
        if f"MathReason/{name}-v0" not in registry:
            budgets = {"max_prompt_tokens": source.max_prompt_tokens, "max_new_tokens": 512}
            kwargs = {"problems": name, "split": source.default_split, **budgets}
            register(f"MathReason/{name}-v0", kwargs=kwargs, **entry)


_register()
