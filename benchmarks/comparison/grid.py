"""A comparison as data: agents x policies x environments x variants x seeds, from presets and the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_origin

from benchmarks.experiment.resolve import by_plain_names
from benchmarks.experiment.spec import check_names
from registry import UnknownName, UsageError, fields_of, parse_value
from registry import agents as agent_registry
from registry.errors import did_you_mean
from registry.fields import REQUIRED

PRESETS = Path(__file__).parents[1] / "presets"
CONTROLS = ("random-reward", "uncorrected", "fewer")


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


def without_replaced(published: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's or a preset's settings, but for the fields of a component instead of which another is chosen."""

    def is_replaced(name: str) -> bool:
        component, dot, _ = name.partition(".")
        return bool(dot) and chosen.get(component, published.get(component)) != published.get(component)

    return {name: value for name, value in published.items() if not is_replaced(name)}
