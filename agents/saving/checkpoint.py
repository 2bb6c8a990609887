"""Agents on disk: a Hugging Face folder with the optimizer (safetensors) and the agent's state (JSON) beside it.

Into a buffer goes a zip of the folder, and such a file is read wherever a folder is.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stable_baselines3.common.utils import get_system_info

from agents.saving.configuration import restored_arguments, restored_env, stored_arguments, stored_env
from agents.saving.folder import find, free_folder, scratch_of, unpack, write_whole_folder
from envs.problems.listed import problem_digest
from policies.pretrained.load import damage_of, weights_fault
from policies.sharding import collected, leads, placed
from registry import UsageError, problem_samplers, skip_samplers

STATE = "agent.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTERS = "adapters.safetensors"  # of agents that train low-rank adapters
PATCHES = "patches.safetensors"
REFERENCES = "references.safetensors"  # of agents that an anchor keeps near other weights
BATCHES = "batches.safetensors"  # of agents whose batches hold stored groups, or are written by older weights
AVERAGE = "average.safetensors"  # of agents with ema_decay: what is trained, averaged
CRITIC = "critic.safetensors"  # of agents that have a value head
BESIDE_MODEL = (STATE, OPTIMIZER, ADAPTERS, PATCHES, REFERENCES, BATCHES, AVERAGE, CRITIC)
"""Of a saved agent's folder, what only going on needs."""
_OWN = (*BESIDE_MODEL, "config.json", "model*.safetensors*")
"""What a ``save`` wrote that the next may not write again; what has other names is someone else's."""


def save(agent: Any, target: Any, exclude: Any = None, include: Any = None) -> None:
    """Write the agent to the folder that ``target`` names, or a zip of that folder into the binary file ``target``.

    Raises:
        UsageError: ``exclude`` or ``include`` is given: a saved agent is whole; or nothing can be written there.
    """
    if exclude is not None or include is not None:
        raise UsageError(f"exclude={exclude!r}, include={include!r}: a saved agent is whole; leave both out")
    if not hasattr(target, "write"):
        _save_folder(agent, free_folder(target, STATE))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "agent"
        _save_folder(agent, folder)
        if not _writes(agent):
            return
        with zipfile.ZipFile(target, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)


def _save_folder(agent: Any, path: Path) -> None:
    """Of a sharded agent's processes one writes what all of them gather."""
    if _writes(agent):
        write_whole_folder(path, lambda folder: _write(agent, folder), _OWN)
    else:
        _save_tensors(agent, scratch_of(path))


def _write(agent: Any, folder: Path) -> None:
    """Into an empty folder: the model, what learning needs beside it, and how the agent was made."""
    kept = _save_tensors(agent, folder)
    agent.envs.unwrapped.task.codec.save(folder)
    arguments, left_out = stored_arguments(agent)
    state = {
        "agent": type(agent).__name__,
        "arguments": arguments,
        "left_out": left_out,
        "env": stored_env(agent.envs),
        "problem_set": problem_digest(agent.envs.unwrapped.task.problems),
        "num_timesteps": agent.num_timesteps if agent.begun_with is None else agent.begun_with,
        "iteration": agent.iteration,
        "lora_rank": agent.target.adapter_rank,
        "trained_layers": list(agent.target.trained_layers),
        "sampler": agent.nesting.sampler.state_dict() if agent.nesting else {},
        "problems": agent.problem_sampler.state_dict() if agent.problem_sampler else {},
        **kept,
    }
    (folder / STATE).write_text(json.dumps(state))


def _save_tensors(agent: Any, folder: Path) -> dict[str, Any]:
    """Write the model and the tensors beside it; returns what the state says of them."""

    def write(tensors: dict[str, torch.Tensor], name: str) -> None:
        if tensors and _writes(agent):
            save_file(tensors, folder / name)

    agent.target.save(folder)
    if agent.target.adapter_rank:  # the folder's weights have them merged in
        write(agent.target.adapter_state_dict(), ADAPTERS)
    tensors, optimizer = _optimizer_state(agent.optimizer)
    if _writes(agent):
        save_file(tensors, folder / OPTIMIZER)  # an empty one, too: of an agent that has made no step
    del tensors
    if hasattr(agent, "critic"):
        write(agent.critic.state_dict(), CRITIC)
    patches, patched = agent.nesting.patcher.state_dict() if agent.nesting else ({}, {})
    write(patches, PATCHES)
    references = agent.anchoring.state_dict() if hasattr(agent, "anchoring") else {}
    write(references, REFERENCES)
    average = getattr(agent, "average", None)
    if average is not None:
        write(average.state_dict(), AVERAGE)
    stored, batches = agent.batching.state_dict() if hasattr(agent, "batching") else ({}, {})
    write(stored, BATCHES)
    return {
        "optimizer": optimizer,
        "patches": patched,
        "references": bool(references),
        "average": average is not None,
        "batches": batches,
    }


def least_bytes(agent: Any) -> int:
    """What ``save`` writes at least, once all that learns has moments: the weights, with adapters also those below
    them, and AdamW's two moments."""
    weights = sum(parameter.nbytes for parameter in agent.target.parameters())
    moments = 2 * sum(parameter.nbytes for parameter in _parameters(agent.optimizer))
    return int(weights * (2 if agent.target.adapter_rank else 1) + moments)


def _writes(agent: Any) -> bool:
    """Whether this process is the one that writes, of those of a sharded agent."""
    return not agent.target.sharded or leads()


def fault(saved: Path) -> str | None:
    """Why training cannot go on from ``save``'s folder: a file is damaged, missing or holds what is not finite; None
    if it can."""
    damage = damage_of(saved)
    if damage:
        return damage
    missing = [name for name in (STATE, OPTIMIZER, "config.json") if not (saved / name).is_file()]
    if missing:
        return f"{saved} lacks {missing[0]}"
    state = json.loads((saved / STATE).read_text())
    if not isinstance(state, dict) or not isinstance(state.get("iteration"), int):
        return f"{saved / STATE} does not say its iteration"
    if state.get("lora_rank") and not (saved / ADAPTERS).is_file():
        return f"{saved} lacks {ADAPTERS}"
    for kept, name in (("references", REFERENCES), ("average", AVERAGE), ("batches", BATCHES)):
        if state.get(kept) and not (saved / name).is_file():
            return f"{saved} lacks {name}"
    return weights_fault(saved)


def load(
    cls: type,
    source: Any,
    env: Any = None,
    custom_objects: Mapping[str, Any] | None = None,
    print_system_info: bool = False,
    device: Any = None,
    **given: Any,
) -> Any:
    """An agent of ``cls`` from what ``save`` wrote, with the arguments that it was made with.

    Args:
        source: a folder, with or without ``.zip`` at its end, or a binary file with a zip of one.
        env: where it goes on; by default the saved agent's environment.
        custom_objects: further arguments, as stable-baselines3's callers give those that cannot be read.
        print_system_info: print the versions of what runs.
        device: where it computes; by default that of the saved agent.
        **given: arguments of the constructor, in place of those saved.

    Raises:
        UsageError: ``source`` is no saved agent of this class, an argument is unknown, or one is needed that could not
            be saved.
    """
    if print_system_info:
        print("== CURRENT SYSTEM INFO ==")
        get_system_info()
    given = {**(custom_objects or {}), **given, **({} if device is None else {"device": str(device)})}
    if "policy" in given:
        raise UsageError(f"policy={given['policy']!r}: the weights are the saved agent's; leave policy out")
    place = find(source)
    if isinstance(place, Path) and place.is_dir():
        return _load_folder(cls, place, env, given)
    folder = unpack(place)
    try:
        agent = _load_folder(cls, folder, env, given)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(agent, shutil.rmtree, folder, ignore_errors=True)  # its tokenizer goes by the folder's name
    return agent


def _load_folder(cls: type, folder: Path, env: Any, given: dict[str, Any]) -> Any:
    if not (folder / STATE).is_file():
        raise UsageError(
            f"{folder} is no saved agent: {STATE} is missing (a plain model is loaded with policy={str(folder)!r})"
        )
    try:
        state = json.loads((folder / STATE).read_text())
    except ValueError as error:
        raise UsageError(f"{folder / STATE} is damaged ({error}): start anew from its weights with policy=") from None
    if not (folder / OPTIMIZER).is_file():
        raise UsageError(f"{folder} lacks {OPTIMIZER}: start anew from its weights with policy={str(folder)!r}")
    if (folder / CRITIC).is_file() != hasattr(cls, "critic"):
        raise UsageError(f"{folder} was saved by {state.get('agent', 'another class')}: load it with that")
    arguments = restored_arguments(cls, state, given)
    slots = arguments.pop("slots", None)
    if env is None:
        env = restored_env(cls, state, folder, slots)
    elif getattr(env, "num_envs", None) is None or "slots" in given:
        arguments["slots"] = slots
    agent = cls(policy=str(folder), env=env, **arguments)
    restore(agent, folder)
    return agent


def restore(agent: Any, path: Path) -> None:
    """Counters, optimizer, adapters and learned samplers of ``save``'s folder into an agent made with its weights.

    Raises:
        UsageError: the agent trains something else than the saved one did, or a learned state has no taker: the
            agent's sampler, problem sampler or patch is another one than that which learned it.
    """
    state = json.loads((path / STATE).read_text())
    _check_trains_the_same(agent, path, state)
    if state.get("lora_rank"):
        agent.target.load_adapter_state_dict(load_file(path / ADAPTERS))
    agent.num_timesteps = state["num_timesteps"]
    agent.iteration = state["iteration"]
    _load_optimizer_state(agent.optimizer, path / OPTIMIZER, state["optimizer"])
    if hasattr(agent, "critic"):
        agent.critic.load_state_dict(load_file(path / CRITIC))
    for group in agent.optimizer.param_groups:
        group["weight_decay"] = getattr(agent, "weight_decay", group["weight_decay"])
        group["betas"] = getattr(agent, "adam_betas", group["betas"])
        group["eps"] = getattr(agent, "adam_eps", group["eps"])
    _restore_copies(agent, path, state)
    if (path / PATCHES).is_file():
        if not agent.nesting.patcher.patch.tokens:
            raise _no_taker(path, "patch", agent.nesting.patcher.patch)
        agent.nesting.patcher.load_state_dict(load_file(path / PATCHES), state["patches"])
    if state["sampler"]:
        _give(path, state, "sampler", agent.nesting.sampler)
    if state["problems"]:
        _give(path, state, "problem_sampler", agent.problem_sampler)
    here = problem_digest(agent.envs.unwrapped.task.problems)
    if hasattr(agent, "forget_problems") and state.get("problem_set", here) != here:
        agent.forget_problems()


def _check_trains_the_same(agent: Any, path: Path, state: Mapping[str, Any]) -> None:
    """Raise UsageError for adapters of another rank or dtype than the saved agent's, or other layers."""
    target, anew = agent.target, f"start anew from its weights with policy={str(path)!r}"
    rank, had = target.adapter_rank, state.get("lora_rank", 0)
    if rank != had:
        raise UsageError(
            f"{path} was saved with lora_rank={had}, so it cannot go on with lora_rank={rank}: give {had}, or {anew}"
        )
    trained = list(target.trained_layers)
    if state.get("trained_layers", trained) != trained:
        raise UsageError(
            f"{path} was saved with the layers {state['trained_layers']} trained, so it cannot go on with {trained}: "
            f"leave trained_layers out, or {anew}"
        )
    if rank and state["arguments"].get("dtype") == "bfloat16" and target.dtype != torch.bfloat16:
        raise UsageError(
            f"{path} has trained adapters in bfloat16, whose rounded sums products in float32 would not see: leave "
            f"dtype out, or {anew}"
        )


def _restore_copies(agent: Any, path: Path, state: Mapping[str, Any]) -> None:
    """The agent's references, its average and what its batches come from; what the saved agent did not have begins with
    the weights loaded."""
    anchoring, average = getattr(agent, "anchoring", None), getattr(agent, "average", None)
    if anchoring is not None:
        for copy in anchoring.copies:
            copy.take()
        if anchoring.copies and state.get("references"):
            anchoring.load_state_dict(load_file(path / REFERENCES))
    if average is not None:
        average.take()
        if state.get("average"):
            average.load_state_dict(load_file(path / AVERAGE))
    if hasattr(agent, "batching"):
        agent.batching.restart(agent.iteration)
        if state.get("batches"):
            agent.batching.load_state_dict(load_file(path / BATCHES), state["batches"])


def _give(path: Path, saved: Mapping[str, Any], name: str, taker: Any) -> None:
    """Hand a learned state to the component of the kind that learned it."""
    registry, key = {"sampler": (skip_samplers, "sampler"), "problem_sampler": (problem_samplers, "problems")}[name]
    learner = saved.get("arguments", {}).get(name)
    id = learner["id"] if isinstance(learner, dict) else learner
    if id is not None and registry.get(id) is not type(taker):
        raise _no_taker(path, name, taker)
    taker.load_state_dict(saved[key])
    if json.dumps(taker.state_dict(), sort_keys=True) != json.dumps(saved[key], sort_keys=True):
        raise _no_taker(path, name, taker)


def _no_taker(path: Path, name: str, taker: Any) -> UsageError:
    return UsageError(
        f"{path} holds what its {name} has learned, which {name}={taker!r} cannot go on with: leave {name} out, or "
        f"start anew from the weights with policy={str(path)!r}"
    )


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    packed, parameters = optimizer.state_dict(), _parameters(optimizer)
    tensors = {
        f"{number}.{name}": collected(parameters[number], value) if value.dim() else value
        for number, values in packed["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    return {name: value.contiguous() for name, value in tensors.items()}, packed["param_groups"]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """In the order in which an optimizer's state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _load_optimizer_state(optimizer: torch.optim.Optimizer, path: Path, groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = _parameters(optimizer)
    with safe_open(path, "pt") as tensors:  # one at a time: a process may keep a part of each alone
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            number, name = key.split(".", 1)
            value = tensors.get_tensor(key)
            state.setdefault(int(number), {})[name] = placed(parameters[int(number)], value) if value.dim() else value
    groups = [{**group, "betas": tuple(group["betas"])} if "betas" in group else group for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
