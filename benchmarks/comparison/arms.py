"""The runs of a grid: which agent with which settings, seed by seed, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.comparison.grid import Grid, Variant, agent_ids, recipe, without_replaced
from benchmarks.experiment.resolve import applicable, resolve
from benchmarks.experiment.spec import RunSpec
from policies.skipping.samplers import FullDepth
from registry import UnknownField, UsageError, skip_samplers
from registry import agents as agent_registry

DECIDED = {"seed": "--seeds, or seeds of a preset", "policy": "--policy, or policies of a preset"}
"""Fields of a run that a grid says for every arm, and where."""


@dataclass(frozen=True)
class Arm:
    """One line of the comparison: what runs with every seed.

    Attributes:
        label: unique within the comparison.
        specs: one a seed, in the order of the seeds.
        missed: assignments that this arm's agent has no field for.
        control: which of ``CONTROLS`` this arm is; None for what is compared.
        skips: whether its agent writes with fewer layers.
        group: the arms that may be compared with each other: the policy and the environment.
    """

    label: str
    specs: tuple[RunSpec, ...]
    missed: tuple[str, ...] = ()
    control: str | None = None
    skips: bool = False
    group: str = ""


@dataclass(frozen=True)
class _Plan:
    """An arm before its policy, environment and seeds: an agent id and the settings that are wanted for it."""

    label: str
    id: str
    wanted: Mapping[str, Any]
    control: str | None = None

    @cached_property
    def missed(self) -> dict[str, UnknownField]:
        """Of what is wanted, what the agent has no field for, and why."""
        return applicable(self.id, self.wanted)[1]

    def resolve(self, **given: Any) -> RunSpec:
        """The spec; ``given`` as for ``benchmarks.experiment.resolve``."""
        kept = {name: value for name, value in self.wanted.items() if name not in self.missed}
        return resolve(self.id, settings=kept, **given)


def arms(grid: Grid, starts: Mapping[tuple[str, str], str] | None = None) -> list[Arm]:
    """The arms of a grid; the baseline's first.

    Args:
        grid: what is compared.
        starts: the folder of the model that the arms of a (policy, environment) start from, where it is not the policy.

    Raises:
        UsageError: an assignment that no agent has a field for.
    """
    starts = starts or {}
    ids = agent_ids(grid.agents)
    if grid.baseline in ids:
        ids = [grid.baseline, *(id for id in ids if id != grid.baseline)]
    common = {**without_replaced(recipe(grid.recipe), grid.set), **grid.set}
    for settings in (common, *(variant.set for variant in grid.variants)):
        _refuse_decided(settings, DECIDED)
    plans = [_plan(id, variant, common) for id in ids for variant in _variants(id, grid.variants)]
    for plan in plans:
        _refuse_contradictions(plan)
    _refuse_what_all_miss(common, plans)
    for variant in grid.variants:
        _refuse_typos(variant, ids, common)
    plans += [plan for control in grid.controls for plan in _controls(control, grid.baseline, plans, common)]
    many = len(grid.policies) * len(grid.envs) > 1
    distinct: dict[tuple[str, ...], Arm] = {}
    for policy in grid.policies:
        for env in grid.envs:
            for plan in plans:
                place = f" @ {policy}, {env}" if many else ""
                start = starts.get((policy, env), policy)
                arm = _arm(plan, place, policy=start, env=env, seeds=grid.seeds)
                arm = replace(arm, group=group_name(policy, env))
                distinct.setdefault(tuple(spec.hash for spec in arm.specs), arm)
    return list(distinct.values())


def start_arms(grid: Grid) -> dict[tuple[str, str], Arm]:
    """What comes before the arms of each (policy, environment): one run of one seed; none without ``Grid.start``."""
    if grid.start is None:
        return {}
    common = {**recipe(grid.recipe), **grid.set}
    shared = {
        name: value
        for name, value in common.items()
        if name.partition(".")[0] in ("env", "evaluation") or name in ("dtype", "device")
    }
    _refuse_decided(grid.start.set, {**DECIDED, "seed": "seed in the table [start] of a preset"})
    plan = _Plan(f"start: {grid.start.agent}", grid.start.agent, {**shared, **grid.start.set})
    _refuse_what_all_miss(grid.start.set, [plan])
    return {
        (policy, env): _arm(plan, f" @ {group_name(policy, env)}", policy=policy, env=env, seeds=(grid.start.seed,))
        for policy in grid.policies
        for env in grid.envs
    }


def without_missed(settings: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Settings but for those that none of the agents of these ids or patterns has a field for."""
    missed = [applicable(id, settings)[1] for id in agent_ids(tuple(patterns))]
    return {name: value for name, value in settings.items() if not all(name in one for one in missed)}


def group_name(policy: str, env: str) -> str:
    """What the arms of a policy and an environment are called together."""
    return f"{Path(policy).name} on {env}"


def _variants(id: str, variants: Sequence[Variant]) -> Sequence[Variant]:
    """Those that an agent matches; one that matches none runs once as it is, so that no arm is lost."""
    return [variant for variant in variants if fnmatchcase(id, variant.agents)] or [Variant("")]


def _plan(id: str, variant: Variant, common: Mapping[str, Any]) -> _Plan:
    """An agent under a variant; one that has none of its fields keeps its name."""
    plan = _Plan(id, id, {**common, **variant.set})
    return replace(plan, label=f"{id} {variant.name}".strip()) if set(variant.set) - set(plan.missed) else plan


def _refuse_decided(settings: Mapping[str, Any], decided: Mapping[str, str]) -> None:
    """Raise UsageError for a setting of what is said elsewhere, which would be lost or belie a label."""
    for name in settings:
        if name in decided:
            raise UsageError(f"{name}={settings[name]} is not a setting of a comparison's runs: give {decided[name]}")


def _refuse_contradictions(plan: _Plan) -> None:
    """Raise UsageError for another component than the agent's id says: the arm would be called what it is not."""
    fixed = agent_registry.resolve(plan.id)[1]
    for name in fixed if "/" in plan.id else {"sampler"} & set(fixed):
        if (chosen := plan.wanted.get(name, fixed[name])) != fixed[name]:
            raise UsageError(
                f"{name}={chosen} contradicts the agent {plan.id!r}, whose {name} is {fixed[name]!r}: "
                "choose agents by their ids (--agents)"
            )


def _refuse_typos(variant: Variant, ids: Sequence[str], common: Mapping[str, Any]) -> None:
    """Raise UsageError for a variant's pattern that matches no agent, or a name in it that all such agents miss. Those
    of ``ids`` may miss it if another has it: a preset is also run with agents of the command line's choice."""
    own = [_plan(id, variant, common) for id in ids if fnmatchcase(id, variant.agents)]
    if own and not any(all(name in plan.missed for plan in own) for name in variant.set):
        return
    every = [_plan(id, variant, common) for id in agent_registry.ids(variant.agents)]
    if not own and not every:
        agent_ids([variant.agents])  # raises, with the nearest ids
    typos = [name for name in variant.set if all(name in plan.missed for plan in every)]
    try:
        _refuse_what_all_miss(typos, own or every)
    except UnknownField as error:
        raise UsageError(f"variant {variant.name!r}: {error}") from None


def _refuse_what_all_miss(common: Iterable[str], plans: Sequence[_Plan]) -> None:
    """Raise the most helpful of the plans' errors for a name that none of them has a field for."""
    for name in common:
        errors = [plan.missed[name] for plan in plans if name in plan.missed]
        if len(errors) == len(plans):
            raise max(errors, key=lambda error: len(error.near))


def _arm(plan: _Plan, place: str, *, policy: str, env: str, seeds: Sequence[int]) -> Arm:
    first = plan.resolve(policy=policy, env=env)
    return Arm(
        label=plan.label + place,
        specs=tuple(replace(first, seed=seed) for seed in seeds),
        missed=tuple(f"{name}={plan.wanted[name]}" for name in plan.missed),
        control=plan.control,
        skips=skips_layers(first.agent),
    )


def skips_layers(agent: Mapping[str, Any]) -> bool:
    """Whether a spec's agent has a sampler that skips any."""
    sampler = agent.get("sampler")
    return sampler is not None and not issubclass(skip_samplers.get(sampler["id"]), FullDepth)


def _controls(control: str, baseline: str, plans: Sequence[_Plan], common: Mapping[str, Any]) -> list[_Plan]:
    """The further arms of a control."""
    base = next((plan for plan in plans if plan.id == baseline), _Plan(baseline, baseline, common))
    if control == "random-reward":
        return [_Plan(f"{base.label} random reward", base.id, {**base.wanted, "env.reward": "random"}, control)]
    agents = [(plan, plan.resolve().agent) for plan in plans]
    nested = [(plan, agent) for plan, agent in agents if skips_layers(agent)]
    if control == "uncorrected":
        return [_uncorrected(plan) for plan, _ in nested]
    rivals: dict[str, _Plan] = {}
    for _, agent in nested:
        left = fewer_completions(agent)
        label = f"{base.id} {left} of {agent['group_size']} completions"
        rivals[label] = _Plan(label, base.id, {**base.wanted, "group_size": left}, control)
    return list(rivals.values())


def _uncorrected(plan: _Plan) -> _Plan:
    """A nested agent's plan without its correction, be it a part of the id or a setting."""
    id = agent_registry.replace_part(plan.id, "correction", "none")
    label = id + plan.label.removeprefix(plan.id) if id != plan.id else f"{plan.label} uncorrected"
    wanted = {name: value for name, value in plan.wanted.items() if name.partition(".")[0] != "correction"}
    return _Plan(label, id, wanted, "uncorrected")


def fewer_completions(agent: Mapping[str, Any]) -> int:
    """The group size of a nested agent's honest rival: as many completions of the full model as cost the same, if
    skipping saved its whole share of the layers."""
    return max(2, round(int(agent["group_size"]) * (1 - float(agent["sampler"].get("ratio", 0.0)))))
