"""Tables of the environment's page, made from the environment: ``<!-- table: NAME -->`` stands for each."""

from __future__ import annotations

import re

import docstrings
import gymnasium as gym
from components import field_table

from envs.problems.sources import PUBLISHED
from envs.task import TaskSpec
from registry import fields_of

MARKER = re.compile(r"<!-- table: ([a-z-]+) -->")


def fill(markdown: str) -> str:
    """The page with its tables."""
    return MARKER.sub(lambda marker: TABLES[marker[1]](), markdown)


def spaces() -> str:
    """Action space, observation space and import, as Gymnasium's pages begin."""
    env = gym.make("MathReason-v0")
    observed = {name: str(space) for name, space in env.observation_space.items()}  # type: ignore[attr-defined]
    shown = ", ".join(f"'{name}': {space}" for name, space in observed.items())
    rows = {
        "Action Space": f"`{env.action_space}`",
        "Observation Space": f"`Dict({shown})`",
        "import": '`import envs`, `gymnasium.make("MathReason-v0")`',
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def arguments() -> str:
    """The keyword arguments of ``gym.make``."""
    return field_table(fields_of(TaskSpec), docstrings.read(TaskSpec).fields)


def ids() -> str:
    """The registered ids."""
    rows = ["| id | problems | split | prompt tokens | completion tokens |", "|---|---|---|---:|---:|"]
    for name in PUBLISHED:
        given = gym.spec(f"MathReason/{name}-v0").kwargs
        numbers = f"{given['max_prompt_tokens']} | {given['max_new_tokens']}"
        rows.append(f"| `MathReason/{name}-v0` | {name} | {given['split']} | {numbers} |")
    plain = TaskSpec()
    budgets = f"{plain.max_prompt_tokens} | {plain.max_new_tokens}"
    return "\n".join([*rows[:2], f"| `MathReason-v0` | {plain.problems} | {plain.split} | {budgets} |", *rows[2:]])


TABLES = {"spaces": spaces, "arguments": arguments, "ids": ids}
