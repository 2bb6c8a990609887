"""What holds a component to its word: the tests that name it, and the rows of committed results that are of it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks/results")
MOST_ROWS = 8
WORD = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Test:
    """A test function.

    Attributes:
        path: of its file, from the repository's root.
        name: of the function.
        names: the identifiers that it mentions, those of the module's constants that it reads included.
        ids: the texts that it mentions, taken apart where ids compose.
        whole: the registries of which it takes every component.
    """

    path: str
    name: str
    names: frozenset[str]
    ids: frozenset[str]
    whole: frozenset[str]


@dataclass(frozen=True)
class Rows:
    """Rows of a table of a committed result.

    Attributes:
        path: of the file, from the repository's root.
        title: the heading above the table.
        table: head and rows, as Markdown.
    """

    path: str
    title: str
    table: str


@cache
def tests() -> tuple[Test, ...]:
    """All tests of the repository."""
    return tuple(test for path in sorted((ROOT / "tests").rglob("test_*.py")) for test in _tests_of(path))


def tests_of(id: str, class_name: str, registry: str, ambiguous: bool) -> tuple[list[Test], list[Test]]:
    """Tests that name the component, and those that take every component of its registry. An ``ambiguous`` id, which
    several registries have, counts by its class alone."""
    named = [t for t in tests() if class_name in t.names or (id in t.ids and not ambiguous)]
    every = [t for t in tests() if registry in t.whole]
    return [test for test in named if test not in every], every


@cache
def tables() -> tuple[Rows, ...]:
    """All tables of the committed results, each with its whole head and body."""
    found: list[Rows] = []
    for path in sorted((ROOT / RESULTS).rglob("*.md")):
        title, block = "", list[str]()
        for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
            if line.startswith("|"):
                block.append(line)
                continue
            if len(block) > 2:
                found.append(Rows(path.relative_to(ROOT).as_posix(), title, "\n".join(block)))
            block = []
            if line.startswith("#"):
                title = line.lstrip("# ").partition(" ([")[0]
    return tuple(found)


def rows_of(ids: list[str]) -> list[Rows]:
    """Of each report's first table that sets the component beside others: its head, and the rows whose first cell names
    the component by one of its ids."""
    chosen: dict[str, Rows] = {}
    for one in tables():
        head, rule, *body = one.table.splitlines()
        mine = [row for row in body if set(ids) & set(WORD.findall(row.replace(r"\|", "").split("|")[1]))]
        if mine and len(mine) < len(body) and one.path not in chosen:
            chosen[one.path] = Rows(one.path, one.title, "\n".join([head, rule, *mine[:MOST_ROWS]]))
    return list(chosen.values())


def _tests_of(path: Path) -> list[Test]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            constants |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("test"):
            constants[node.name] = node
    found = []
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test"):
            nodes = [part for node in _reached(function, constants) for part in ast.walk(node)]
            names = frozenset(n.id for n in nodes if isinstance(n, ast.Name)) | {
                n.attr for n in nodes if isinstance(n, ast.Attribute)
            }
            texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            ids = frozenset(part for text in texts if " " not in text for part in re.split(r"[/*=:]", text))
            whole = frozenset(registry for node in nodes if (registry := _enumerated(node)))
            found.append(Test(path.relative_to(ROOT).as_posix(), function.name, names, ids, whole))
    return found


def _reached(function: ast.AST, constants: dict[str, ast.AST]) -> list[ast.AST]:
    """The function and the module's constants and functions that it reads, directly or not."""
    reached, waiting = [function], [function]
    while waiting:
        for node in ast.walk(waiting.pop()):
            known = constants.get(node.id) if isinstance(node, ast.Name) else None
            if known is not None and known not in reached:
                reached.append(known)
                waiting.append(known)
    return reached


def _enumerated(node: ast.AST) -> str:
    """The name of what is gone through: ``for id in registry``, ``registry.ids()``."""
    if isinstance(node, ast.comprehension | ast.For) and isinstance(node.iter, ast.Name):
        return node.iter.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "ids":
        every = not node.args and isinstance(node.func.value, ast.Name)
        return node.func.value.id if every and isinstance(node.func.value, ast.Name) else ""
    return ""
