"""The paper index: every arXiv id that the code cites, what of it is here, what is our reading, and the command."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import docstrings
from components import KINDS, by_class, path_of
from components import registry as components

from agents.saving.configuration import COMPONENTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("agents", "benchmarks", "envs", "policies")
OURS = re.compile(r"\breadings?\b|\b(is|are) ours\b|^Ours\b", re.IGNORECASE)
SETTINGS = {registry.kind: setting for setting, registry in COMPONENTS.items()} | {
    "reward part": "env.reward_parts",
    "template": "env.template",
    "problem source": "env.problems",
}
"""What ``--set`` chooses components of each kind by."""


@dataclass(frozen=True)
class Citation:
    """A place of the code that cites a paper.

    Attributes:
        owner: what cites it: the qualified name of a module, class or function, or a file of settings.
        line: number in its file, for the order.
        path: of the file, from the repository's root.
        says: the sentence that cites it, as Markdown.
        ours: the sentences of the same text that say what is our reading.
        page: of the component, within the site, if it has one.
        command: how to run it, if a name or a setting chooses it.
    """

    owner: str
    path: str
    line: int
    says: str
    ours: tuple[str, ...]
    page: str = ""
    command: str = ""


@cache
def citations() -> dict[str, list[Citation]]:
    """All of them by arXiv id, newest papers first."""
    cited: dict[str, list[Citation]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for id, citation in _of_module(path):
                cited.setdefault(id, []).append(citation)
        for path in sorted((ROOT / package).rglob("*.toml")):
            for id, citation in _of_settings(path):
                cited.setdefault(id, []).append(citation)
    return {id: cited[id] for id in sorted(cited, reverse=True)}


def page() -> str:
    """The index as Markdown."""
    titles = tomllib.loads((ROOT / "docs" / "papers.toml").read_text(encoding="utf-8"))
    parts = [
        "# Papers",
        "Every arXiv id that the code cites, newest first, made from the docstrings: what is here, what is our reading "
        "and the command. A reading is ours where the source leaves it open or is not public.",
    ]
    for id, places in citations().items():
        title = f"{titles[id]} " if id in titles else ""
        parts.append(f"## {title}[{id}](https://arxiv.org/abs/{id}) {{ #{id.replace('.', '-')} }}")
        parts.append("\n".join(_entry(place) for place in places))
        if ours := list(dict.fromkeys(sentence for place in places for sentence in place.ours)):
            parts.append("*Our reading:* " + " ".join(ours))
        if commands := list(dict.fromkeys(place.command for place in places if place.command)):
            parts.append("```bash\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def _entry(place: Citation) -> str:
    name = f"[`{place.owner}`](../{place.page})" if place.page else f"`{place.owner}`"
    return f"- {name}: {place.says}"


def _of_module(path: Path) -> list[tuple[str, Citation]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    where = path.relative_to(ROOT).as_posix()
    module = where.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
            owner, page, command = _component(name) or (name, "", "")
            line = getattr(node, "lineno", 0)
            ours = _readings(text)
            for setting, sentence, id in _cited_sentences(text):
                command_of = f"python -m benchmarks.run --set {setting}=" if setting and _is_agent(name) else command
                said = f"`{setting}`: {sentence}" if setting else sentence
                found.append((id, Citation(owner, where, line, said, ours, page, command_of)))
    return found + _of_the_rest(path, where, module, {id for id, _ in found})


def _of_the_rest(path: Path, where: str, module: str, known: set[str]) -> list[tuple[str, Citation]]:
    """What is cited in comments and in what stands below a name alone: the lines from the one before."""
    lines = [line.strip().removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for number, line in enumerate(lines):
        around = " ".join(lines[max(0, number - 1) : number + 2])
        for id in docstrings.ARXIV.findall(line) if docstrings.cited(around) else []:
            if id not in known:
                said = next((one for one in docstrings.sentences(around) if id in one), around)
                found.append((id, Citation(module, where, number + 1, docstrings.markdown(said.strip('"')), ())))
    return found


def _of_settings(path: Path) -> list[tuple[str, Citation]]:
    where = path.relative_to(ROOT).as_posix()
    found = []
    if path.name == "recipes.toml":
        for name, recipe in tomllib.loads(path.read_text(encoding="utf-8")).items():
            for id in docstrings.cited(recipe["source"]):
                said = f"settings of {recipe['source']}; here {recipe['differs']}"
                command = f"python -m benchmarks.compare --recipe {name}"
                found.append((id, Citation(name, where, 0, docstrings.markdown(said), (), "", command)))
        return found
    comment = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    for _, sentence, id in _cited_sentences(comment):
        command = f"python -m benchmarks.compare --preset {path.stem}"
        found.append((id, Citation(path.stem, where, 0, sentence, _readings(comment), "", command)))
    return found


def _cited_sentences(text: str) -> list[tuple[str, str, str]]:
    """Setting or ``""``, sentence as Markdown, arXiv id: of prose, and of what is said of arguments and fields."""
    if not docstrings.cited(text):
        return []
    prose, section = docstrings._sections(text)
    found = []
    for paragraph in prose.split("\n\n"):
        for sentence in docstrings.sentences(paragraph):
            ids = docstrings.ARXIV.findall(sentence) if docstrings.cited(paragraph) else []
            found += [("", docstrings.markdown(sentence), id) for id in ids]
    for name, said in docstrings._entries(section).items():
        for sentence in docstrings.sentences(said):
            ids = list(dict.fromkeys(docstrings.ARXIV.findall(sentence)))
            found += [(name, sentence, id) for id in ids]
    return found


def _readings(text: str) -> tuple[str, ...]:
    prose = docstrings._sections(text)[0]
    return tuple(
        docstrings.markdown(sentence)
        for paragraph in prose.split("\n\n")
        for sentence in docstrings.sentences(paragraph)
        if OURS.search(sentence)
    )


@cache
def _registered() -> dict[str, tuple[str, str, str]]:
    """Qualified names of registered components -> id, page, command."""
    known = {}
    folders = {kind.registry.kind: kind for kind in KINDS}
    for registry in vars(components).values():
        if not isinstance(registry, components.Registry):
            continue
        for id in registry:
            component = registry.get(id)
            name = f"{component.__module__}.{component.__qualname__}"
            kind = folders.get(registry.kind)
            chosen = "--agent " if registry is components.agents else f"--set {SETTINGS[registry.kind]}="
            command = f"python -m benchmarks.run {chosen}{id}"
            page = path_of(kind, next(ids[0] for ids in by_class(kind) if id in ids)) if kind else ""
            known.setdefault(name, (id, page, command))
    return known


def _component(name: str) -> tuple[str, str, str] | None:
    return _registered().get(name)


def _is_agent(name: str) -> bool:
    return name in {f"{c.__module__}.{c.__qualname__}" for c in (components.agents.get(id) for id in components.agents)}
