"""A run as data: what is trained, on what, from which seed. Its hash names its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import gymnasium as gym

import agents  # noqa: F401 (registers the agents)
import envs  # noqa: F401 (registers the env ids)
from envs.task import TaskSpec
from registry import (
    Registry,
    UnknownField,
    UsageError,
    advantages,
    aggregations,
    corrections,
    fields_of,
    parse_value,
    problem_samplers,
    skip_samplers,
)
from registry import agents as agent_registry

# Arguments of an agent that name a component, and the prefix that `--set` reaches its fields by.
PARTS: dict[str, Registry] = {
    "sampler": skip_samplers,
    "correction": corrections,
    "advantage": advantages,
    "aggregation": aggregations,
    "problems": problem_samplers,
}
GIVEN_ELSEWHERE = {"policy", "env", "seed", "verbose", "tensorboard_log", "device"}


@dataclass(frozen=True)
class EvaluationSpec:
    """How accuracy is measured.

    Attributes:
        split: problems never trained on.
        problems: how many of the split, its first ones; all of them if it has fewer.
        every: iterations between evaluations of the learning curve; 0 for none between first and last.
        samples: completions per problem of the sampled accuracy.
    """

    split: str = "test"
    problems: int = 256
    every: int = 5
    samples: int = 4


@dataclass(frozen=True)
class RunSpec:
    """One run, JSON-able and complete: every default is resolved when it is made by ``resolve``.

    Attributes:
        agent: ``{"id": ..., hyper-parameter: value}``, components as ``{"id": ..., field: value}``.
        policy: the target: ``tiny``, a folder or a hub id.
        env: ``{"id": ..., argument: value}``.
        seed: of everything drawn.
        iterations: of the agent's loop.
        evaluation: see ``EvaluationSpec``.
        checkpoint_every: iterations between checkpoints; what a killed run may lose.
        device: ``cpu`` or ``cuda``.
    """

    agent: dict[str, Any]
    policy: str = "tiny"
    env: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    iterations: int = 20
    evaluation: dict[str, Any] = field(default_factory=dict)
    checkpoint_every: int = 10
    device: str = "cpu"

    @property
    def hash(self) -> str:
        """12 hex digits of the canonical JSON."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(path: Path) -> RunSpec:
        """A spec from its file; raises UsageError where it is none."""
        try:
            loaded = json.loads(path.read_text())
        except OSError as error:
            raise UsageError(f"spec {str(path)!r} cannot be read: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise UsageError(f"spec {str(path)!r} is not JSON: {error}") from None
        known = {f.name for f in fields(RunSpec)}
        for name in loaded:
            if name not in known:
                raise UnknownField(f"spec {path.name!r}", name, known)
        if "agent" not in loaded:
            raise UsageError(f"spec {str(path)!r} has no 'agent'")
        return RunSpec(**loaded)


def resolve(agent: str, *, settings: Iterable[str] = (), **given: Any) -> RunSpec:
    """A complete spec from an agent id, the run's own fields and ``--set`` assignments.

    Args:
        agent: an id such as ``nested-reft/uniform/retrace``.
        settings: assignments: ``learning_rate=1e-4`` or ``agent.learning_rate=1e-4``; ``correction.lam=0.9`` and so on
            for ``sampler``, ``advantage``, ``aggregation`` and ``problems``; ``env.template=chat``;
            ``env.problem_options.level=2``; ``evaluation.problems=100``; ``iterations=30``.
        **given: fields of ``RunSpec`` (``policy``, ``env`` as an id, ``seed``, ...).

    Raises:
        UsageError: an unknown name, field or value, with the nearest known one.
    """
    draft = _Draft(agent, given)
    for assignment in settings:
        draft.assign(assignment)
    return draft.spec()


class _Draft:
    """A spec in the making: the namespaces that an assignment may reach."""

    def __init__(self, agent: str, given: dict[str, Any]) -> None:
        component, fixed = agent_registry.resolve(agent)
        given = {name: value for name, value in given.items() if value is not None}
        self.id = agent
        self.known = {name: f for name, f in fields_of(component).items() if name not in GIVEN_ELSEWHERE}
        self.values = {**{name: f.default for name, f in self.known.items()}, **fixed}
        self.env: dict[str, Any] = {"id": given.pop("env", "MathReason-v0")}
        self.evaluation = {f.name: f.default for f in fields(EvaluationSpec)}
        self.run = {**{f.name: f.default for f in fields(RunSpec) if f.default is not MISSING}, **given}
        self.parts: dict[str, dict[str, Any]] = {name: {} for name in PARTS if name in self.known}

    def assign(self, assignment: str) -> None:
        """Apply one ``name=value``."""
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r} is no assignment: write --set name=value")
        prefix, dot, rest = name.partition(".")
        if not dot and name in ("iterations", "checkpoint_every", "seed"):
            self.run[name] = parse_value(text, int, name)
        elif not dot or prefix == "agent":
            self._assign_agent(rest if dot else name, name, text)
        elif prefix in self.parts:
            known = PARTS[prefix].fields(self.values[prefix])
            _check(f"{prefix} {self.values[prefix]!r}", rest, known)
            self.parts[prefix][rest] = parse_value(text, known[rest].type, name)
        elif prefix == "env":
            self._assign_env(rest, name, text)
        elif prefix == "evaluation":
            _check("evaluation", rest, fields_of(EvaluationSpec))
            self.evaluation[rest] = parse_value(text, fields_of(EvaluationSpec)[rest].type, name)
        else:
            raise UnknownField("--set", prefix, [*self.parts, "agent", "env", "evaluation"])

    def _assign_agent(self, field_name: str, name: str, text: str) -> None:
        _check(f"agent {self.id!r}", field_name, self.known)
        if field_name in self.parts:
            PARTS[field_name].check(text)
            self.values[field_name] = text
            return
        kind = self.known[field_name].type
        # A learning rate may be a schedule in Python; on a command line it is a number.
        self.values[field_name] = parse_value(text, float if "Callable" in str(kind) else kind, name)

    def _assign_env(self, rest: str, name: str, text: str) -> None:
        field_name, dot, option = rest.partition(".")
        known = fields_of(TaskSpec)
        _check("env", field_name, known)
        if dot and field_name == "problem_options":
            self.env.setdefault("problem_options", {})[option] = _guess(text)
        else:
            self.env[field_name] = parse_value(text, known[field_name].type, name)

    def spec(self) -> RunSpec:
        """The spec; components are made once, so that a bad value fails here and not in the run."""
        for name, chosen in self.parts.items():
            registry, id = PARTS[name], self.values[name]
            registry.make(id, **chosen)
            # A product's factors may share a field's name, so only what was set is kept.
            defaults = {} if "*" in id else {field: f.default for field, f in registry.fields(id).items()}
            self.values[name] = {"id": id, **defaults, **chosen}
        if self.run["iterations"] < 1 or self.run["checkpoint_every"] < 1:
            raise UsageError("iterations and checkpoint_every must be at least 1")
        _known_env(self.env["id"])
        agent = {"id": self.id, **self.values}
        return RunSpec(agent=agent, env=self.env, evaluation=self.evaluation, **_without(self.run))


def _without(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in ("agent", "env", "evaluation")}


def _check(owner: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UnknownField(owner, name, known)


def _guess(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _known_env(id: str) -> None:
    try:
        gym.spec(id)
    except gym.error.Error as error:
        raise UsageError(f"env {id!r}: {error}") from None
