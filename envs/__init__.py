"""Math problems as token-level Gymnasium environments with verifiable rewards.

import envs, gymnasium as gym
env = gym.make("MathReason-v0")                         # generated problems, built-in tokenizer, offline
venv = gym.make_vec("MathReason-v0", num_envs=64)       # the native vector env, SAME_STEP autoreset
"""

from typing import Any

from gymnasium.envs.registration import register, registry

# The paper's training sets, and the sets it evaluates on (PROBLEM SET -> split that the id serves by default).
PROBLEM_SETS = {
    "gsm8k": "train",
    "svamp": "train",
    "math": "train",
    "asdiv": "test",
    "mawps": "test",
    "math500": "test",
    "aime24": "test",
    "amc23": "test",
    "minerva": "test",
    "olympiad": "test",
}


def _register() -> None:
    entry: dict[str, Any] = {
        "entry_point": "envs.math_reason:MathReason",
        "vector_entry_point": "envs.vector:MathReasonVector",
    }
    if "MathReason-v0" not in registry:
        register("MathReason-v0", **entry)
    for name, split in PROBLEM_SETS.items():
        if f"MathReason/{name}-v0" not in registry:
            kwargs = {"problems": name, "split": split, "max_prompt_tokens": 1024, "max_new_tokens": 512}
            register(f"MathReason/{name}-v0", kwargs=kwargs, **entry)


_register()
