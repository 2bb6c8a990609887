"""Math problems as token-level Gymnasium environments with verifiable rewards.

>>> import gymnasium as gym
>>> env = gym.make("MathReason-v0")  # generated problems, built-in tokenizer, offline
>>> observation, info = env.reset(seed=1)
>>> seeds = env.action_space.seed(1)  # else one draw in 512 ends the episode at once
>>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
>>> (reward, terminated, truncated)
(0.0, False, False)
>>> venv = gym.make_vec("MathReason-v0", num_envs=64)  # the native vector env, SAME_STEP autoreset
>>> venv.single_observation_space["input_ids"].shape
(104,)

``MathReason/<name>-v0`` serves each published set of ``envs.problems``. ``TextMathReason-v0`` takes whole completions
as text, for policies behind an API. Importing this package registers the ids, and
the problem sources, templates and reward parts of the project.
"""

from typing import Any

from gymnasium import error
from gymnasium.envs.registration import register, registry, spec

from envs import shaping, templates  # noqa: F401 (registers their components)
from envs.problems.sources import PUBLISHED
from registry import UsageError


def _register() -> None:
    entry: dict[str, Any] = {
        "entry_point": "envs.math_reason:MathReason",
        "vector_entry_point": "envs.vector:MathReasonVector",
    }
    if "MathReason-v0" not in registry:
        register("MathReason-v0", **entry)
    if "TextMathReason-v0" not in registry:
        register("TextMathReason-v0", entry_point="envs.text_math_reason:TextMathReason")
    for name, source in PUBLISHED.items():
        if f"MathReason/{name}-v0" not in registry:
            budgets = {"max_prompt_tokens": source.max_prompt_tokens, "max_new_tokens": 512}
            kwargs = {"problems": name, "split": source.default_split, **budgets}
            register(f"MathReason/{name}-v0", kwargs=kwargs, **entry)


def check_id(id: str) -> None:
    """Raise ``UsageError``, with the ids of this project, for one that gymnasium does not know."""
    if ":" in id:
        return  # of a module that is not imported yet
    try:
        spec(id)
    except error.Error as unknown:
        known = ", ".join(sorted(one for one in registry if one.startswith("MathReason")))
        raise UsageError(f"env {id!r}: {unknown} Known here: {known}") from None


_register()
