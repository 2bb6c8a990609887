"""From what a user writes (an id, a few assignments) to a complete ``RunSpec``."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from typing import Any

import gymnasium as gym

from agents.saving.configuration import COMPONENTS
from benchmarks.experiment import BUDGETS
from benchmarks.experiment.data import fingerprint_data
from benchmarks.experiment.spec import OWN_FIELDS, EvaluationSpec, RunSpec, check_names
from envs import check_id
from envs.shaping import whole_parts
from envs.task import TaskSpec
from policies.dtype import AUTO, settle_dtype
from policies.pretrained.fingerprint import fingerprint
from policies.pretrained.load import BUILT_IN
from registry import UnknownField, UsageError, fields_of, parse_value, problem_sources, reward_parts
from registry import agents as agent_registry
from registry.fields import REQUIRED

NOT_OF_AGENT = {*fields_of(RunSpec), "verbose", "tensorboard_log"}  # what an agent takes and a spec's agent leaves out


def resolve(agent: str, *, settings: Mapping[str, Any] | None = None, **given: Any) -> RunSpec:
    """A complete spec from an agent id, the run's own fields and ``--set`` assignments.

    Args:
        agent: an id such as ``nested-reft/uniform/retrace``.
        settings: values by name, as text or typed: ``learning_rate`` (``by_plain_names``); ``correction.lam`` and so on
            for ``sampler``, ``patch``, ``advantage``, ``aggregation`` and ``problem_sampler``; ``env.template``;
            ``env.problem_options.level``; ``env.reward_parts`` and then ``env.reward_parts.length-penalty.weight``;
            ``evaluation.problems``; ``evaluation.sets`` and then ``evaluation.problem_options.mine.csv.answer``;
            ``iterations``. A component goes before its fields, whatever the order they were given in.
        **given: fields of ``RunSpec`` (``policy``, ``env`` as an id, ``seed``, ...); None leaves the default.

    Raises:
        UsageError: an unknown name, field or value, with the nearest known one.
    """
    draft = _Draft(agent, given)
    for name, value in _components_first(by_plain_names(settings or {})):
        draft.assign(name, value)
    return draft.spec()


def applicable(agent: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, UnknownField]]:
    """The settings that an agent has a field for, and of the others why they are none of its own. Raises UsageError for
    a bad value."""
    draft = _Draft(agent, {})
    missed: dict[str, UnknownField] = {}
    settings = by_plain_names(settings)
    for name, value in _components_first(settings):
        try:
            draft.assign(name, value)
        except UnknownField as error:
            missed[name] = error
    return {name: value for name, value in settings.items() if name not in missed}, missed


def by_plain_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the one name that each has: ``agent.learning_rate`` is ``learning_rate``."""
    return {name.removeprefix("agent."): value for name, value in settings.items()}


def _components_first(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(settings.items(), key=lambda setting: setting[0].count("."))


class _Draft:
    """A spec in the making: the namespaces that an assignment may reach."""

    def __init__(self, agent: str, given: dict[str, Any]) -> None:
        component, fixed = agent_registry.resolve(agent)
        given = {name: value for name, value in given.items() if value is not None}
        self.id = agent
        self.known = {name: f for name, f in fields_of(component).items() if name not in NOT_OF_AGENT}
        self.values = {**{name: f.default for name, f in self.known.items()}, **fixed}
        self.env: dict[str, Any] = {"id": given.pop("env", "MathReason-v0")}
        self.evaluation = asdict(EvaluationSpec())
        del self.evaluation["problem_options"]  # there where it is given, so that other runs keep their hashes
        self.run = given
        self.parts: dict[str, dict[str, Any]] = {name: {} for name in COMPONENTS if name in self.known}
        for name, value in fixed.items():
            if isinstance(value, Mapping):
                self.parts[name] = {field: of_it for field, of_it in value.items() if field != "id"}
                self.values[name] = value["id"]

    def assign(self, name: str, value: Any) -> None:
        """Set what ``name`` reaches; raises UnknownField where that is nothing."""
        prefix, dot, rest = name.partition(".")
        if name in OWN_FIELDS:
            self.run[name] = parse_value(value, OWN_FIELDS[name].type, name)
        elif not dot:
            self._assign_agent(name, value)
        elif prefix in self.parts:
            known = COMPONENTS[prefix].fields(self.values[prefix])
            check_names(f"{prefix} {self.values[prefix]!r}", [rest], known)
            self.parts[prefix][rest] = parse_value(value, known[rest].type, name)
        elif prefix == "env":
            self._assign_env(rest, name, value)
        elif prefix == "evaluation":
            self._assign_evaluation(rest, name, value)
        else:
            raise UnknownField("--set", prefix, [*self.parts, "agent", "env", "evaluation"])

    def _assign_agent(self, name: str, value: Any) -> None:
        if name not in self.known:
            raise UnknownField(f"agent {self.id!r}", name, [*self.known, *OWN_FIELDS])
        if name in self.parts:
            chosen = parse_value(value, str, name)
            COMPONENTS[name].check(chosen)
            if chosen != self.values[name]:
                self.values[name], self.parts[name] = chosen, {}
            return
        kind = self.known[name].type
        # A learning rate may be a schedule in Python; on a command line it is a number.
        self.values[name] = parse_value(value, float if "Callable" in str(kind) else kind, name)

    def _assign_env(self, rest: str, name: str, value: Any) -> None:
        field_name, dot, option = rest.partition(".")
        known = fields_of(TaskSpec)
        check_names("env", [field_name], known)
        if dot and field_name == "problem_options":
            self.env.setdefault("problem_options", {})[option] = _guess(value)
        elif dot and field_name == "reward_parts":
            self._assign_reward_part(option, name, value)
        else:
            self.env[field_name] = parse_value(value, known[field_name].type, name)

    def _assign_evaluation(self, rest: str, name: str, value: Any) -> None:
        field_name, dot, option = rest.partition(".")
        known = fields_of(EvaluationSpec)
        check_names("evaluation", [field_name], known)
        if dot and field_name == "problem_options":
            source, _, option = option.rpartition(".")  # a file's name has dots
            self.evaluation.setdefault(field_name, {}).setdefault(source, {})[option] = _guess(value)
        else:
            check_names("evaluation", [rest], known)
            self.evaluation[rest] = parse_value(value, known[rest].type, name)

    def _assign_reward_part(self, rest: str, name: str, value: Any) -> None:
        id, _, field_name = rest.partition(".")
        parts = whole_parts({**_registered(self.env["id"]), **self.env}.get("reward_parts", ()))
        if id not in [part["id"] for part in parts]:
            chosen = ",".join([*(part["id"] for part in parts), id])
            raise UsageError(f"{name}: {id!r} is not among the reward parts; --set env.reward_parts={chosen} as well")
        known = reward_parts.fields(id)
        check_names(f"reward part {id!r}", [field_name], known)
        parsed = parse_value(value, known[field_name].type, name)
        self.env["reward_parts"] = [{**part, field_name: parsed} if part["id"] == id else part for part in parts]

    def spec(self) -> RunSpec:
        """The spec; components are made once, so that a bad value fails here and not in the run."""
        self._settle_paths()
        for name, chosen in self.parts.items():
            registry, id = COMPONENTS[name], self.values[name]
            missing = [f for f, known in registry.fields(id).items() if known.default is REQUIRED and f not in chosen]
            if missing:
                raise UsageError(f"{name} {id!r} needs {missing[0]!r}: --set {name}.{missing[0]}=...")
            registry.make(id, **chosen)
            # A product's factors may share a field's name, so only what was set is kept.
            defaults = {} if "*" in id else {field: f.default for field, f in registry.fields(id).items()}
            self.values[name] = {"id": id, **defaults, **chosen}
        if self.values.get("dtype") == AUTO:  # settled here, so that a repeat on another machine computes the same
            policy, device = (self.run.get(name, getattr(RunSpec, name)) for name in ("policy", "device"))
            self.values["dtype"] = settle_dtype(AUTO, policy, device)
        EvaluationSpec(**self.evaluation)  # refuses options of sets that are not measured
        agent = {"id": self.id, **self.values}
        # Lists for tuples, as a file gives them back, so that a spec equals itself read again.
        plain = json.loads(json.dumps({"agent": agent, "env": self._whole_env(), "evaluation": self.evaluation}))
        if "iterations" not in self.run and set(BUDGETS) & set(self.run):
            self.run["iterations"] = None  # the budget given is the only one
        spec = RunSpec(**plain, **self.run, weights=fingerprint(self.run.get("policy", RunSpec.policy)))
        return replace(spec, data=fingerprint_data(spec.problem_sets))

    def _settle_paths(self) -> None:
        """One spelling for a folder or a file, so that work on it is one run however its path is written."""
        named: list[tuple[dict[str, Any], str, Container[Any]]]
        named = [(self.run, "policy", BUILT_IN), (self.env, "tokenizer", ("builtin",))]
        named += [(self.env, "problems", problem_sources), (self.evaluation, "source", problem_sources)]
        for owner, name, known in named:
            if isinstance(owner.get(name), str):
                owner[name] = _plain_path(owner[name], known)
        self.evaluation["sets"] = tuple(_plain_path(name, problem_sources) for name in self.evaluation["sets"])
        if options := self.evaluation.get("problem_options"):
            plain = {_plain_path(name, problem_sources): of_it for name, of_it in options.items()}
            self.evaluation["problem_options"] = plain

    def _whole_env(self) -> dict[str, Any]:
        """Every argument of the environment: its defaults, what its id sets, what was set; the policy's tokenizer."""
        given = self.env
        defaults = asdict(TaskSpec(**{**_registered(given["id"]), **{k: v for k, v in given.items() if k != "id"}}))
        policy = self.run.get("policy", RunSpec.policy)
        if policy != RunSpec.policy and "tokenizer" not in given:
            defaults["tokenizer"] = policy
        defaults["reward_parts"] = whole_parts(defaults["reward_parts"])
        return {"id": given["id"], **defaults}


def _plain_path(name: str, known: Container[Any]) -> str:
    """A local path as it is written most plainly; what is none, or would then be a known name, as it is."""
    path = os.path.expanduser(name)
    plain = os.path.normpath(path)
    is_same = os.path.exists(path) and os.path.exists(plain) and os.path.samefile(path, plain)
    return plain if is_same and plain not in known else name


def _guess(value: Any) -> Any:
    """Text as JSON where it is that; a typed value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _registered(env: str) -> dict[str, Any]:
    check_id(env)
    try:
        return dict(gym.spec(env).kwargs)
    except gym.error.Error as error:  # of the form module:id
        raise UsageError(f"env {env!r}: {error}") from None
