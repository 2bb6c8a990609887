"""A run as data: what is trained, on what, from which seed. Its hash names its folder."""

from __future__ import annotations

import hashlib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import agents  # noqa: F401 (registers the agents)
import envs  # noqa: F401 (registers the env ids)
from agents.saving.configuration import COMPONENTS
from benchmarks.experiment import BUDGETS
from benchmarks.measuring.durable import json_text, write_whole
from envs.task import TaskSpec
from registry import (
    Field,
    UnknownField,
    UsageError,
    did_you_mean,
    fields_of,
)
from registry import agents as agent_registry

LATER = ("data", "trained_layers")
"""Fields of a run and arguments of agents that came when runs were there already. At its default such a one is left out
of the hash, so that a run keeps the hash that it had before."""


@dataclass(frozen=True)
class EvaluationSpec:
    """How accuracy is measured.

    Attributes:
        split: problems never trained on.
        source: the problem set, a name or a file; None: the one that is trained on.
        subset: of the source, ``start:stop``, for a single file that has no splits.
        problems: how many of the split, its first ones; all of them if it has fewer.
        every: iterations between evaluations of the learning curve; 0 for none between first and last.
        samples: completions per problem of the sampled accuracy, avg@k and pass@k.
        sets: further problem sets, names or files, measured before and after: public sets are contaminated for some
            models, generated ones are not.
        problem_options: options of ``source`` and of further sets by their names: ``{"mine.csv": {"answer": "key"}}``.
    """

    split: str = "test"
    source: str | None = None
    subset: str | None = None
    problems: int = 256
    every: int = 5
    samples: int = 4
    sets: tuple[str, ...] = ()
    problem_options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("problems", 1), ("samples", 1), ("every", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"evaluation.{name}={value} must be at least {least}")
        others = [name for name in (self.source, *self.sets) if name is not None]
        for name in self.problem_options:
            if name not in others:
                known = did_you_mean(name, others) if others else "evaluation.sets and evaluation.source name none"
                raise UsageError(f"evaluation.problem_options of {name!r}, which is not measured: {known}")


@dataclass(frozen=True)
class RunSpec:
    """One run, JSON-able and complete: every default is resolved when it is made by ``benchmarks.experiment.resolve``.

    Attributes:
        agent: ``{"id": ..., hyper-parameter: value}``, components as ``{"id": ..., field: value}``.
        policy: the target: ``tiny``, a folder or a hub id.
        weights: fingerprint of the policy's files, so that a run is never taken for one from other weights; None for a
            hub id.
        data: fingerprint of the problem sets that are files, likewise; None where none is one.
        env: ``{"id": ..., argument: value}``.
        seed: of everything drawn.
        iterations, tokens, seconds: budgets of the agent's loop, of rollout tokens and of training time without
            evaluation. The iteration that reaches the first of them is the last; None: no such limit. What a budget of
            seconds buys depends on the machine's speed, so such a run does not repeat exactly.
        evaluation: fields of ``EvaluationSpec``.
        checkpoint_every: iterations between checkpoints; what a killed run may lose.
        device: ``cpu`` or ``cuda``.
    """

    agent: dict[str, Any]
    policy: str = "tiny"
    weights: str | None = None
    data: str | None = None
    env: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    iterations: int | None = 20
    tokens: int | None = None
    seconds: float | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    checkpoint_every: int = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in (*BUDGETS, "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name}={value} must be positive")
        if all(getattr(self, name) is None for name in BUDGETS):
            raise UsageError("a run needs a budget: give iterations, tokens or seconds")
        _refuse_infinities(asdict(self))

    @property
    def hash(self) -> str:
        """12 hex digits of the canonical JSON."""
        fields = _without_later(asdict(self), RunSpec)
        if set(LATER) & set(self.agent):
            fields["agent"] = _without_later(self.agent, agent_registry.resolve(self.agent["id"])[0])
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def used(self, iterations: int, tokens: int, seconds: float) -> float:
        """How much of its budget a run has spent, by the one nearest to its end; at 1 it is over."""
        spent = ((iterations, self.iterations), (tokens, self.tokens), (seconds, self.seconds))
        return max(amount / limit for amount, limit in spent if limit is not None)

    @property
    def problem_sets(self) -> list[Any]:
        """What is trained on and what is measured, as they are named."""
        return [self.env.get("problems"), self.evaluation.get("source"), *self.evaluation.get("sets", ())]

    @property
    def evaluated(self) -> EvaluationSpec:
        """``evaluation`` with its types."""
        return EvaluationSpec(**{**self.evaluation, "sets": tuple(self.evaluation.get("sets", ()))})

    def write(self, path: Path) -> None:
        """Save as JSON."""
        write_whole(path, json_text(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(path: Path) -> RunSpec:
        """A spec from its file; raises UsageError where it is none, or where a name in it is unknown."""
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"spec {str(path)!r} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"spec {str(path)!r} is not JSON: {error}") from None
        if not isinstance(loaded, dict) or not isinstance(loaded.get("agent"), dict) or "id" not in loaded["agent"]:
            raise UsageError(f"spec {str(path)!r} has no 'agent' with an 'id'")
        check_names(f"spec {path.name!r}", loaded, fields_of(RunSpec))
        spec = RunSpec(**loaded)
        agent_arguments(spec.agent)
        check_names("env", [name for name in spec.env if name != "id"], fields_of(TaskSpec))
        check_names("evaluation", spec.evaluation, fields_of(EvaluationSpec))
        return spec


def _refuse_infinities(value: Any, name: str = "") -> None:
    """Raise UsageError for a number that JSON, and so spec.json, cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name}={value} is not a finite number: give one, for no limit a large one such as 1e9")
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, child in children:
        _refuse_infinities(child, f"{name}.{key}".removeprefix("."))


def _without_later(given: Mapping[str, Any], component: type) -> dict[str, Any]:
    """Fields but for those of ``LATER`` at the defaults of ``component``."""
    defaults = {name: field.default for name, field in fields_of(component).items() if name in LATER}
    return {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}


OWN_FIELDS: dict[str, Field] = {
    name: field
    for name, field in fields_of(RunSpec).items()
    if name not in ("agent", "weights", "data", "env", "evaluation")
}
"""What a run has beside its agent, its environment and its evaluation, and what ``--set`` reaches by a bare name."""


def check_names(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``UnknownField`` for the first name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UnknownField(owner, name, known)


def agent_arguments(agent: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The class that a spec's ``agent`` names, and its arguments as the class takes them (JSON has no tuples)."""
    component, _ = agent_registry.resolve(agent["id"])
    known = fields_of(component)
    given = {name: value for name, value in agent.items() if name != "id"}
    check_names(f"agent {agent['id']!r}", given, known)
    arguments = {}
    for name, value in given.items():
        if name in COMPONENTS and isinstance(value, Mapping):
            parts = COMPONENTS[name].fields(value["id"])
            check_names(f"{name} {value['id']!r}", [part for part in value if part != "id"], parts)
            value = {part: _restore_tuple(given_value, parts.get(part)) for part, given_value in value.items()}
        arguments[name] = _restore_tuple(value, known[name])
    return component, arguments


def _restore_tuple(value: Any, known: Field | None) -> Any:
    """A JSON list as a tuple where the field is one."""
    if known is not None and isinstance(value, list) and typing.get_origin(known.type) is tuple:
        return tuple(value)
    return value
