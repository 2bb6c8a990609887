"""Agents on disk: a Hugging Face folder with the optimizer (safetensors) and the agent's state (JSON) beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from registry import UsageError

STATE = "agent.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTERS = "adapters.safetensors"  # of agents that train low-rank adapters
PATCHES = "patches.safetensors"
CRITIC = "critic.safetensors"  # of agents that have a value head


def save(agent: Any, path: Path) -> None:
    """Write ``path`` whole or not at all: into a folder beside it, then renamed."""
    scratch = path.with_name(path.name + f".partial-{os.getpid()}")
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    agent.target.save(scratch)
    agent.envs.unwrapped.task.codec.save(scratch)
    if agent.target.adapter_rank:  # the folder's weights have them merged in
        save_file(agent.target.adapter_state_dict(), scratch / ADAPTERS)
    tensors, scalars = _optimizer_state(agent.optimizer)
    save_file(tensors, scratch / OPTIMIZER)
    if hasattr(agent, "critic"):
        save_file(agent.critic.state_dict(), scratch / CRITIC)
    patches, patched = agent.nesting.patcher.state_dict() if agent.nesting else ({}, {})
    if patches:
        save_file(patches, scratch / PATCHES)
    state = {
        "num_timesteps": agent.num_timesteps,
        "iteration": agent.iteration,
        "lora_rank": agent.target.adapter_rank,
        "optimizer": scalars,
        "sampler": agent.nesting.sampler.state_dict() if agent.nesting else {},
        "problems": agent.problem_sampler.state_dict() if agent.problem_sampler else {},
        "patches": patched,
    }
    (scratch / STATE).write_text(json.dumps(state))
    old = path.with_name(path.name + f".old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    if old.exists():
        shutil.rmtree(old)


def load(cls: type, path: Path, **arguments: Any) -> Any:
    """An agent of ``cls`` from ``save``'s folder; ``arguments`` are its constructor's.

    ``lora_rank``, unless given, is that of the saved agent."""
    if not (path / STATE).is_file():
        raise UsageError(
            f"{path} is no saved agent: {STATE} is missing (a plain model is loaded with policy={str(path)!r})"
        )
    rank = json.loads((path / STATE).read_text()).get("lora_rank", 0)
    if rank:
        arguments.setdefault("lora_rank", rank)
    agent = cls(policy=str(path), **arguments)
    restore(agent, path)
    return agent


def restore(agent: Any, path: Path) -> None:
    """Counters, optimizer, adapters and learned samplers of ``save``'s folder into an agent made with its weights.

    Raises:
        UsageError: the agent's adapters are of another rank than the saved ones.
    """
    state = json.loads((path / STATE).read_text())
    rank = state.get("lora_rank", 0)
    if rank != agent.target.adapter_rank:
        raise UsageError(
            f"{path} was saved with lora_rank={rank}, so it cannot go on with lora_rank={agent.target.adapter_rank}: "
            f"give {rank}, or start anew from its weights with policy={str(path)!r}"
        )
    if rank:
        agent.target.load_adapter_state_dict(load_file(path / ADAPTERS))
    agent.num_timesteps = state["num_timesteps"]
    agent.iteration = state["iteration"]
    _load_optimizer_state(agent.optimizer, load_file(path / OPTIMIZER), state["optimizer"])
    if hasattr(agent, "critic"):
        agent.critic.load_state_dict(load_file(path / CRITIC))
    if (path / PATCHES).is_file():
        agent.nesting.patcher.load_state_dict(load_file(path / PATCHES), state["patches"])
    if state["sampler"]:
        agent.nesting.sampler.load_state_dict(state["sampler"])
    if state["problems"]:
        agent.problem_sampler.load_state_dict(state["problems"])


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    packed = optimizer.state_dict()
    tensors = {
        f"{parameter}.{name}": value.contiguous()
        for parameter, values in packed["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    return tensors, packed["param_groups"]


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} if "betas" in group else group for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
