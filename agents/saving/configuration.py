"""An agent's constructor arguments as JSON, and back: what a saved agent goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.arguments import check_numbers
from envs.vector import MathReasonVector
from registry import (
    Registry,
    UnknownField,
    UsageError,
    advantages,
    aggregations,
    anchors,
    batches,
    corrections,
    fields_of,
    patches,
    problem_samplers,
    rewards,
    schedules,
    skip_samplers,
    writers,
)

COMPONENTS: dict[str, Registry] = {
    "sampler": skip_samplers,
    "patch": patches,
    "correction": corrections,
    "advantage": advantages,
    "aggregation": aggregations,
    "problem_sampler": problem_samplers,
    "schedule": schedules,
    "anchor": anchors,
    "batch": batches,
    "reward": rewards,
    "writer": writers,
}
"""Arguments that name a component, and the registry of each."""
SAVED_BY = ("ReFT", "SFT", "SB3PPO", "TRLGRPO")
"""The classes whose folders others than their subclasses cannot go on from."""
READ_ONCE = ("sampler", "patch", "anchor", "batch", "writer")
"""Components that setting an agent up reads; another one that is set on it later does nothing."""
APART = ("policy", "env")
"""Arguments that are not stored as such: the weights are the folder's, the environment has a place of its own."""
SPEC_TUPLES = ("stop_token_ids", "reward_parts")


class NotStorable(Exception):
    """JSON cannot hold this value."""


def constructor_arguments(cls: type, scope: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``cls`` as its constructor was given them; ``scope`` is the constructor's ``locals()``. Raises
    UsageError for one that is no such number as its annotation says."""
    check_numbers(cls, scope)
    return {name: scope[name] for name in fields_of(cls) if name not in APART}


def in_force(agent: Any) -> dict[str, Any]:
    """What the agent has of its arguments as attributes, now."""
    return {name: getattr(agent, name) for name in agent.arguments if name not in READ_ONCE and hasattr(agent, name)}


def stored_arguments(agent: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The agent's arguments that JSON can hold, and those that it cannot as texts. What was set on the agent since it
    was set up (``agent.ent_coef = 0``, another correction) is stored as it is now, and so is what a policy given as an
    object brought."""
    stored, left_out = {}, {}
    now = in_force(agent)
    changed = {name: now[name] for name, made in agent.made.items() if now[name] is not made}
    trained = agent.target.trained_layers
    brought = {
        "lora_rank": agent.target.adapter_rank,
        "trained_layers": list(trained) if len(trained) < agent.target.num_layers else None,
        "dtype": str(agent.target.dtype).removeprefix("torch."),
        "gradient_checkpointing": agent.target.gradient_checkpointing,
    }
    own = {
        name: getattr(agent, name) for name in _all_fields(type(agent)) if name not in APART and hasattr(agent, name)
    }
    for name, given in {**own, **agent.arguments, **changed}.items():
        value = brought.get(name, given)
        try:
            stored[name] = _as_json(value, COMPONENTS.get(name))
        except NotStorable:
            left_out[name] = repr(value)
    return stored, left_out


def restored_arguments(cls: type, state: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to make ``cls`` with: those of ``given``, else those that ``stored_arguments`` left in ``state``.

    Raises:
        UsageError: ``given`` holds no argument of ``cls``, or lacks one that could not be stored.
    """
    saved = state.get("agent")
    if saved in SAVED_BY and saved not in {base.__name__ for base in cls.__mro__}:
        raise UsageError(
            f"the agent was saved by {saved}: load it with that, or give {cls.__name__} its folder as policy="
        )
    known = _all_fields(cls)
    for name in given:
        if name not in known:
            raise UnknownField(cls.__name__, name, known)
    if "arguments" not in state:
        raise UsageError(
            "the saved agent holds no constructor arguments (an older version wrote it): start anew from its weights "
            f"with {cls.__name__}(policy=FOLDER, ...)"
        )
    left_out = {name: text for name, text in state["left_out"].items() if name not in given}
    own = [name for name in known if name not in (*APART, *state["arguments"], *state["left_out"], *given)]
    if missing := [*(f"{name} ({text})" for name, text in left_out.items()), *own]:
        raise UsageError(
            f"not saved, since JSON cannot hold it or the class alone knows it: {', '.join(missing)}; "
            f"pass it to {cls.__name__}.load"
        )
    return {**{name: _with_tuples(value) for name, value in state["arguments"].items()}, **given}


def _all_fields(cls: type) -> list[str]:
    """The constructor's arguments, those that a subclass passes on included."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            names |= dict.fromkeys(fields_of(base))
            if base.__module__.startswith("agents."):
                break
    return list(names)


def describe(component: Any, registry: Registry) -> dict[str, Any]:
    """``{"id": ..., field: value}``, from which ``registry.build`` makes an equal component.

    Raises:
        NotStorable: it is not registered, or a field of its constructor cannot be read from it.
    """
    factors = component.factors if registry.product and hasattr(component, "factors") else (component,)
    ids, fields = [], {}
    for factor in factors:
        names = [name for name in registry if registry.get(name) is type(factor)]
        if not names:
            raise NotStorable
        ids.append(names[0])
        for name, field in fields_of(registry.get(names[0])).items():
            if not hasattr(factor, name):
                raise NotStorable
            value = getattr(factor, name)
            if value != field.default:
                if name in fields:
                    raise NotStorable
                fields[name] = _as_json(value, None)
    described = {"id": "*".join(ids), **fields}
    try:
        again = registry.build(_with_tuples(described))
    except UsageError:
        raise NotStorable from None
    if is_dataclass(component) and again != component:
        raise NotStorable
    return described


def stored_env(venv: Any) -> dict[str, Any]:
    """What ``restored_env`` makes the agent's vector env of; of a wrapper or a class of the user's own, its name."""
    if type(venv) is not MathReasonVector or venv.max_episode_steps is not None:
        return {"class": type(venv).__name__}
    try:
        return {"spec": _as_json(asdict(venv.task.spec), None), "slots": venv.num_envs}
    except NotStorable:
        return {"class": f"{type(venv).__name__} with options that JSON cannot hold"}


def restored_env(cls: type, state: Mapping[str, Any], folder: Path, slots: int | None) -> MathReasonVector:
    """The saved agent's vector env. Its tokenizer, unless it is the built-in one, is that of ``folder``.

    Raises:
        UsageError: the agent was trained in an environment that its specification does not say.
    """
    env = state["env"]
    if "spec" not in env:
        raise UsageError(
            f"the agent was trained in a {env['class']}, which is not saved: pass it as {cls.__name__}.load(path, env)"
        )
    spec = {name: _with_tuples(value) if name in SPEC_TUPLES else value for name, value in env["spec"].items()}
    if spec["tokenizer"] != "builtin":
        spec["tokenizer"] = str(folder)
    return MathReasonVector(num_envs=slots or env["slots"], copy=False, **spec)


def _as_json(value: Any, registry: Registry | None) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_as_json(one, None) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _as_json(one, None) for key, one in value.items()}
    if registry is not None:
        return describe(value, registry)
    raise NotStorable


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples, which components hold."""
    if isinstance(value, list):
        return tuple(_with_tuples(one) for one in value)
    if isinstance(value, dict):
        return {key: _with_tuples(one) for key, one in value.items()}
    return value
