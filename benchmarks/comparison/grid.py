"""A comparison as data: agents x policies x environments x variants x seeds, from presets and the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin

from benchmarks.experiment.resolve import applicable, by_plain_names, resolve
from benchmarks.experiment.spec import RunSpec, check_names
from policies.skipping.samplers import FullDepth
from registry import UnknownField, UnknownName, UsageError, fields_of, parse_value, skip_samplers
from registry import agents as agent_registry
from registry.errors import did_you_mean
from registry.fields import REQUIRED

PRESETS = Path(__file__).parents[1] / "presets"
CONTROLS = ("random-reward", "uncorrected", "fewer")
DECIDED = {"seed": "--seeds, or seeds of a preset", "policy": "--policy, or policies of a preset"}
"""Fields of a run that a grid says for every arm, and where."""


@dataclass(frozen=True)
class Variant:
    """Overrides that make matching agents once more. ``agents`` is a pattern."""

    name: str
    agents: str = "*"
    set: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", by_plain_names(self.set))


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} must be from 0 to 2**32 - 1")


@dataclass(frozen=True)
class Start:
    """The run whose trained model all arms of a policy and an environment start from: a warm-up, most often.

    Attributes:
        agent: its id.
        seed: its own; the arms of all seeds start from one model.
        set: values by name. Those of the grid for the environment, the evaluation, ``dtype`` and ``device`` hold, too.
    """

    agent: str
    seed: int = 0
    set: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", by_plain_names(self.set))
        _check_seed(self.seed)


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        title, source: for the report; where the settings come from.
        agents: ids or shell patterns of ids.
        baseline: the id that every other arm is compared with.
        seeds, policies, envs: each agent runs on every combination.
        recipe: the name of published settings (presets/recipes.toml), which ``set`` overrides.
        set: values by name (see ``benchmarks.experiment.resolve``) for every run that has the field.
        start: what every run starts from; None: the policy as it is. See ``Start``.
        variants: see ``Variant``; an agent that matches none of them runs once, as it is.
        controls: ``random-reward``: the baseline, in its first variant, with a coin for a reward; ``uncorrected``: each
            nested agent without its correction; ``fewer``: the baseline with fewer completions, as many as the time
            that skipping saves would pay for at best.
        threads: CPU threads of a run; None leaves torch's default.
        margin: points of accuracy within which two arms are equivalent.
    """

    title: str = "Comparison"
    source: str = ""
    agents: tuple[str, ...] = ("reft",)
    baseline: str = "reft"
    seeds: tuple[int, ...] = (0,)
    policies: tuple[str, ...] = ("tiny",)
    envs: tuple[str, ...] = ("MathReason-v0",)
    recipe: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    variants: tuple[Variant, ...] = ()
    controls: tuple[str, ...] = ()
    threads: int | None = None
    margin: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", by_plain_names(self.set))
        if not 0 < self.margin < 100:
            raise UsageError(f"margin {self.margin} must be above 0 and below 100 points of accuracy")
        for control in self.controls:
            if control not in CONTROLS:
                raise UsageError(f"unknown control {control!r}: {did_you_mean(control, CONTROLS)}")
        for name in ("agents", "seeds", "policies", "envs"):
            if not getattr(self, name):
                raise UsageError(f"the comparison has no {name}: give at least one")
        for seed in self.seeds:
            _check_seed(seed)
            if self.seeds.count(seed) > 1:
                raise UsageError(f"seeds {list(self.seeds)} have {seed} more than once: it is one run, give each once")


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


def preset_names() -> list[str]:
    """Of the committed grids."""
    return sorted(path.stem for path in PRESETS.glob("*.toml") if path.stem != "recipes")


def preset(name: str) -> Grid:
    """A committed grid by name, or a TOML file's. Raises UsageError where there is none or a name in it is unknown."""
    known = preset_names()
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not name.endswith(".toml") and name not in known:
        raise UnknownName("preset", name, known)
    try:
        loaded = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"preset {name!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"preset {name!r} is not TOML: {error}") from None
    grid: Grid = _of_table(Grid, loaded, f"preset {name!r}")
    if "baseline" in loaded and grid.baseline not in (compared := agent_ids(grid.agents)):
        tail = did_you_mean(grid.baseline, compared)
        raise UsageError(f"baseline {grid.baseline!r} of preset {name!r} is not compared: {tail}")
    return grid


def _of_table(kind: type, table: Any, owner: str) -> Any:
    """A dataclass of this module from a TOML table; raises UsageError for what it lacks, and for a name or a value that
    it cannot have."""
    if not isinstance(table, dict):
        raise UsageError(f"{owner} is {table!r}: make it a table")
    known = fields_of(kind)
    check_names(owner, table, known)
    for name, of_it in known.items():
        if of_it.default is REQUIRED and name not in table:
            raise UsageError(f"{owner} has no {name!r}: give it one")
    return kind(**{name: _typed(value, known[name].type, f"{owner}: {name}") for name, value in table.items()})


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as a field of this type; raises UsageError, which names ``where``, if it is none."""
    if kind in (Start | None, Variant):
        return _of_table(Variant if kind is Variant else Start, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}={value!r} must be a list: write [{value!r}]")
        return tuple(_typed(one, args[0], f"{where}[{n}]") for n, one in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise UsageError(
                f"{where}={value!r} must be a table: write {where.rpartition(' ')[2]} = {{ NAME = VALUE }}"
            )
        return value
    return parse_value(value, kind, where)


def recipe(name: str) -> dict[str, Any]:
    """The settings of a published recipe, none for the name ``""``. Raises ``UnknownName`` with the nearest names."""
    if not name:
        return {}
    recipes = tomllib.loads((PRESETS / "recipes.toml").read_text(encoding="utf-8"))
    if name not in recipes:
        raise UnknownName("recipe", name, recipes)
    return dict(recipes[name]["set"])


def agent_ids(patterns: Iterable[str]) -> list[str]:
    """The ids that each pattern names, without repeats. An id that can be made stands for itself, products included."""
    ids: dict[str, None] = {}
    every = agent_registry.ids()
    whole = [id for id in every if not any(other.startswith(f"{id}/") for other in every)]
    for pattern in patterns:
        if pattern in agent_registry:
            ids[pattern] = None
            continue
        matching = [id for id in whole if fnmatchcase(id, pattern)]
        if not matching and not set(pattern) & set("*?["):
            agent_registry.resolve(pattern)  # raises, and names the part that is unknown
        if not matching:
            raise UsageError(f"no agent id matches {pattern!r}: {did_you_mean(pattern, whole)}")
        ids.update(dict.fromkeys(matching))
    return list(ids)


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


def without_missed(settings: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Settings but for those that none of the agents of these ids or patterns has a field for."""
    missed = [applicable(id, settings)[1] for id in agent_ids(tuple(patterns))]
    return {name: value for name, value in settings.items() if not all(name in one for one in missed)}


def group_name(policy: str, env: str) -> str:
    """What the arms of a policy and an environment are called together."""
    return f"{Path(policy).name} on {env}"


def without_replaced(published: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's or a preset's settings, but for the fields of a component instead of which another is chosen."""

    def is_replaced(name: str) -> bool:
        component, dot, _ = name.partition(".")
        return bool(dot) and chosen.get(component, published.get(component)) != published.get(component)

    return {name: value for name, value in published.items() if not is_replaced(name)}


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
