"""A component's docstring, taken apart: its text, when to use it, its fields, the papers it cites."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{4,5}(?![\d.])")
CITATION = re.compile(r"arXiv:?\s+\d{4}\.\d{4,5}")
SENTENCE_END = re.compile(r"(?<!\beq\.)(?<!\bsec\.)(?<!\bal\.)(?<!\bDr\.)(?<!\bch\.)(?<=\.)\s+(?=[A-Z`\"(])")
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:")
USE = "Use:"


@dataclass(frozen=True)
class Docstring:
    """Of one component.

    Attributes:
        text: the paragraphs, as Markdown.
        use: when to use it, the paragraph that begins with ``Use:``; ``""`` without one.
        fields: what is said of each field or argument, as Markdown.
    """

    text: list[str]
    use: str
    fields: dict[str, str]


def read(component: Any) -> Docstring:
    """The docstring of ``component``; what it does not say of its fields may stand in those of its base classes."""
    described: dict[str, str] = {}
    for base in reversed(inspect.getmro(component) if inspect.isclass(component) else [component]):
        if base is not object:
            described |= _entries(_sections(vars(base).get("__doc__") or "")[1])
    prose, _ = _sections(inspect.getdoc(component) or "")
    paragraphs = [markdown(part) for part in prose.split("\n\n") if part.strip()]
    use = [part.removeprefix(USE).strip() for part in paragraphs if part.startswith(USE)]
    text = [part for part in paragraphs if not part.startswith((USE, ">>>"))]
    return Docstring(text, use[0][:1].upper() + use[0][1:] if use else "", described)


def markdown(text: str) -> str:
    """A docstring's paragraph as Markdown: one line, code in single backticks, arXiv ids as links."""
    line = " ".join(text.split()).replace("``", "`")
    if CITATION.search(line):
        line = ARXIV.sub(lambda id: f"[{id[0]}](https://arxiv.org/abs/{id[0]})", line)
    return "".join(part if code else part.replace("<", "&lt;").replace("*", r"\*") for part, code in _by_code(line))


def cited(text: str) -> list[str]:
    """The arXiv ids that a text cites, in order. Where one is cited, any number of that form is one."""
    return list(dict.fromkeys(ARXIV.findall(text))) if CITATION.search(text) else []


def sentences(text: str) -> list[str]:
    """Of a paragraph of prose."""
    return SENTENCE_END.split(" ".join(text.split()))


def _sections(docstring: str) -> tuple[str, str]:
    """What stands before the first section, and the sections of fields."""
    lines = inspect.cleandoc(docstring).splitlines()
    heads = [number for number, line in enumerate(lines) if line in SECTIONS or line.startswith(">>>")]
    start = heads[0] if heads else len(lines)
    fields: list[str] = []
    inside = False
    for line in lines[start:]:
        if line and not line.startswith(" "):
            inside = line in ("Args:", "Attributes:")
        elif inside:
            fields.append(line)
    return "\n".join(lines[:start]), "\n".join(fields)


def _entries(section: str) -> dict[str, str]:
    """``name: text`` and ``one, other: text``, continued on deeper lines."""
    entries: dict[str, str] = {}
    for block in re.split(r"\n(?=    \S)", section):
        names, colon, text = block.strip().partition(":")
        if colon and re.fullmatch(r"[\w*, ]+", names):
            entries |= {name.strip(): markdown(text) for name in names.split(",")}
    return entries


def _by_code(line: str) -> list[tuple[str, bool]]:
    """The parts of a line, and whether each is code or a link, which stay as they are."""
    pattern = r"(`[^`]*`|\[[^\]]*\]\(https://arxiv[^)]*\))"
    return [(part, bool(number % 2)) for number, part in enumerate(re.split(pattern, line))]
