"""From what a user writes (an id, a few assignments) to a complete ``RunSpec``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

import gymnasium as gym

from benchmarks.experiment.spec import GIVEN_ELSEWHERE, PARTS, EvaluationSpec, RunSpec, check_names, fingerprint
from envs.shaping import whole_parts
from envs.task import TaskSpec
from registry import UnknownField, UsageError, fields_of, parse_value, reward_parts
from registry import agents as agent_registry
from registry.fields import REQUIRED

RUN_FIELDS = ("iterations", "checkpoint_every", "seed", "tokens", "seconds", "policy", "device")
PARSED_AS = {"tokens": int, "seconds": float, "policy": str, "device": str}  # the others are integers


def resolve(agent: str, *, settings: Iterable[str] = (), **given: Any) -> RunSpec:
    """A complete spec from an agent id, the run's own fields and ``--set`` assignments.

    Args:
        agent: an id such as ``nested-reft/uniform/retrace``.
        settings: assignments: ``learning_rate=1e-4`` or ``agent.learning_rate=1e-4``; ``correction.lam=0.9`` and so on
            for ``sampler``, ``advantage``, ``aggregation`` and ``problems``; ``env.template=chat``;
            ``env.problem_options.level=2``; ``env.reward_parts=format,length-penalty`` and then
            ``env.reward_parts.length-penalty.weight=0.01``; ``evaluation.problems=100``; ``iterations=30``.
        **given: fields of ``RunSpec`` (``policy``, ``env`` as an id, ``seed``, ...); None leaves the default.

    Raises:
        UsageError: an unknown name, field or value, with the nearest known one.
    """
    draft = _Draft(agent, given)
    # A component before its fields, whatever the order they were given in.
    for assignment in sorted(settings, key=lambda text: text.partition("=")[0].count(".")):
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
        self.run = given
        self.parts: dict[str, dict[str, Any]] = {name: {} for name in PARTS if name in self.known}

    def assign(self, assignment: str) -> None:
        """Apply one ``name=value``."""
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r} is no assignment: write --set name=value")
        prefix, dot, rest = name.partition(".")
        if not dot and name in RUN_FIELDS:
            self.run[name] = parse_value(text, PARSED_AS.get(name, int), name)
        elif not dot or prefix == "agent":
            self._assign_agent(rest if dot else name, name, text)
        elif prefix in self.parts:
            known = PARTS[prefix].fields(self.values[prefix])
            check_names(f"{prefix} {self.values[prefix]!r}", [rest], known)
            self.parts[prefix][rest] = parse_value(text, known[rest].type, name)
        elif prefix == "env":
            self._assign_env(rest, name, text)
        elif prefix == "evaluation":
            check_names("evaluation", [rest], fields_of(EvaluationSpec))
            self.evaluation[rest] = parse_value(text, fields_of(EvaluationSpec)[rest].type, name)
        else:
            raise UnknownField("--set", prefix, [*self.parts, "agent", "env", "evaluation"])

    def _assign_agent(self, field_name: str, name: str, text: str) -> None:
        if field_name not in self.known:
            raise UnknownField(f"agent {self.id!r}", field_name, [*self.known, *RUN_FIELDS])
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
        check_names("env", [field_name], known)
        if dot and field_name == "problem_options":
            self.env.setdefault("problem_options", {})[option] = _guess(text)
        elif dot and field_name == "reward_parts":
            self._assign_reward_part(option, name, text)
        else:
            self.env[field_name] = parse_value(text, known[field_name].type, name)

    def _assign_reward_part(self, rest: str, name: str, text: str) -> None:
        id, _, field_name = rest.partition(".")
        parts = whole_parts({**_registered(self.env["id"]), **self.env}.get("reward_parts", ()))
        if id not in [part["id"] for part in parts]:
            chosen = ",".join([*(part["id"] for part in parts), id])
            raise UsageError(f"{name}: {id!r} is not among the reward parts; --set env.reward_parts={chosen} as well")
        known = reward_parts.fields(id)
        check_names(f"reward part {id!r}", [field_name], known)
        value = parse_value(text, known[field_name].type, name)
        self.env["reward_parts"] = [{**part, field_name: value} if part["id"] == id else part for part in parts]

    def spec(self) -> RunSpec:
        """The spec; components are made once, so that a bad value fails here and not in the run."""
        for name, chosen in self.parts.items():
            registry, id = PARTS[name], self.values[name]
            missing = [f for f, known in registry.fields(id).items() if known.default is REQUIRED and f not in chosen]
            if missing:
                raise UsageError(f"{name} {id!r} needs {missing[0]!r}: --set {name}.{missing[0]}=...")
            registry.make(id, **chosen)
            # A product's factors may share a field's name, so only what was set is kept.
            defaults = {} if "*" in id else {field: f.default for field, f in registry.fields(id).items()}
            self.values[name] = {"id": id, **defaults, **chosen}
        agent = {"id": self.id, **self.values}
        plain = json.loads(json.dumps({"agent": agent, "env": self._whole_env(), "evaluation": self.evaluation}))
        if "iterations" not in self.run and {"tokens", "seconds"} & set(self.run):
            self.run["iterations"] = None  # the budget given is the only one
        return RunSpec(**plain, **self.run, weights=fingerprint(self.run.get("policy", "tiny")))

    def _whole_env(self) -> dict[str, Any]:
        """Every argument of the environment: its defaults, what its id sets, what was set; the policy's tokenizer."""
        given = self.env
        defaults = asdict(TaskSpec(**{**_registered(given["id"]), **{k: v for k, v in given.items() if k != "id"}}))
        policy = self.run.get("policy", RunSpec.policy)
        if policy != RunSpec.policy and "tokenizer" not in given:
            defaults["tokenizer"] = policy
        defaults["reward_parts"] = whole_parts(defaults["reward_parts"])
        return {"id": given["id"], **defaults}


def _guess(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _registered(env: str) -> dict[str, Any]:
    try:
        return dict(gym.spec(env).kwargs)
    except gym.error.Error as error:
        raise UsageError(f"env {env!r}: {error}") from None
