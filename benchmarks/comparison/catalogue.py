"""All that can be chosen by a name, with a sentence on each: for ``python -m benchmarks.run --list`` and the README."""

from __future__ import annotations

import inspect
import re
import tomllib
from dataclasses import dataclass
from typing import Any

from agents.saving.configuration import COMPONENTS
from benchmarks.comparison.grid import PRESETS, preset, preset_names
from benchmarks.measuring.table import Table
from envs.problems import list_sources
from registry import Registry, reward_parts, templates
from registry import agents as agent_registry

SENTENCE = re.compile(r".*?\.(?=\s+[A-Z`]|$)")
PLURALS = {"patch": "patches"}


@dataclass(frozen=True)
class Kind:
    """Things of one kind.

    Attributes:
        name: of the kind, in the plural.
        chosen_by: what stands before a name where it is chosen, such as ``--set sampler=``.
        about: of each name one sentence, in Markdown.
    """

    name: str
    chosen_by: str
    about: dict[str, str]

    def lines(self) -> list[str]:
        """A heading, then a line for each name: how it is chosen, and the sentence."""
        width = max(map(len, self.about), default=0)
        texts = (f"{self.chosen_by}{name:{width}}  {text.replace('`', '')}" for name, text in self.about.items())
        return [f"# {self.name}", *texts]

    def markdown(self) -> str:
        """A table of two columns."""
        rows = [[f"`{name}`", text] for name, text in self.about.items()]
        return Table([f"`{self.chosen_by}`", self.name], rows, left=(0, 1)).markdown()


def catalogue() -> list[Kind]:
    """Every kind, agents first."""
    return [
        _agents(),
        *(components(name, registry) for name, registry in COMPONENTS.items()),
        Kind("problem sources", "--set env.problems=", list_sources()),
        components("env.template", templates),
        components("env.reward_parts", reward_parts),
        _presets(),
        _recipes(),
    ]


def evaluated() -> list[Kind]:
    """What ``benchmarks.evaluate`` chooses by name."""
    about = {name: first_sentence(templates.get(name)) for name in templates}
    return [Kind("problem sets", "--sets ", list_sources()), Kind("templates", "--template ", about)]


def components(name: str, registry: Registry) -> Kind:
    """Those of a registry, which ``--set name=`` chooses from."""
    about = {}
    for id in registry:
        same = [other for other in registry if other != id and registry.get(other) is registry.get(id)]
        about[id] = " ".join([first_sentence(registry.get(id)), *(f"The same as `{other}`." for other in same)])
    return Kind(PLURALS.get(registry.kind, f"{registry.kind}s"), f"--set {name}=", about)


def first_sentence(component: Any) -> str:
    """Of a docstring, with its code as Markdown has it."""
    paragraph = " ".join((inspect.getdoc(component) or "").partition("\n\n")[0].split())
    sentence = SENTENCE.match(paragraph)
    return (sentence[0] if sentence else paragraph).replace("``", "`")


def _agents() -> Kind:
    """An agent's id may set some of its parts, and may name others."""
    about = {}
    for name in agent_registry:
        component, fixed = agent_registry.resolve(name)
        parts = ", ".join(f"{part}={id['id'] if isinstance(id, dict) else id}" for part, id in fixed.items())
        about[agent_registry.form(name)] = first_sentence(component) + (f" Unless set: {parts}." if parts else "")
    return Kind("agents", "--agent ", about)


def _presets() -> Kind:
    return Kind("presets of benchmarks.compare", "--preset ", {name: preset(name).title for name in preset_names()})


def _recipes() -> Kind:
    recipes = tomllib.loads((PRESETS / "recipes.toml").read_text(encoding="utf-8"))
    about = {name: f"For {one['for']}: {one['source']}." for name, one in recipes.items()}
    return Kind("recipes of benchmarks.compare", "--recipe ", about)
