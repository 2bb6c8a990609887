"""What a report is made of: sections of blocks, each shown in HTML, in Markdown, or in one of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from benchmarks.report.figures import svg

STYLE = Path(__file__).parent / "style.css"


class Block(Protocol):
    """A part of a report; empty text where there is nothing to show."""

    def html(self) -> str: ...

    def markdown(self) -> str: ...


@dataclass(frozen=True)
class Section:
    """Blocks under a heading, and what a reader must know of them; without anything to show there is no heading.

    Attributes:
        level: of the heading, 1 is the page's title.
    """

    heading: str
    level: int
    blocks: Sequence[Block]
    note: str = ""

    def html(self) -> str:
        if not (shown := _shown(block.html() for block in self.blocks)):
            return ""
        return "\n".join([f"<h{self.level}>{escape(self.heading)}</h{self.level}>", *shown, _soft(self.note)])

    def markdown(self) -> str:
        if not (shown := _shown(block.markdown() for block in self.blocks)):
            return ""
        return "\n\n".join(_shown([f"{'#' * self.level} {self.heading}", *shown, self.note]))


def _soft(note: str) -> str:
    return note and f'<p class="soft">{escape(note)}</p>'


def _shown(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text]


@dataclass(frozen=True)
class Sentences:
    """A list of findings."""

    sentences: Sequence[str]

    def html(self) -> str:
        return f'<ul class="summary">{"".join(f"<li>{escape(one)}</li>" for one in self.sentences)}</ul>'

    def markdown(self) -> str:
        return "\n".join(f"- {one}" for one in self.sentences)


@dataclass(frozen=True)
class Facts:
    """Names and their values."""

    facts: Sequence[tuple[str, str]]

    def html(self) -> str:
        return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in self.facts)}</dl>"

    def markdown(self) -> str:
        return "\n".join(f"- {name}: {value}" for name, value in self.facts)


@dataclass(frozen=True)
class Figures:
    """Pictures beside each other, in HTML alone: what each shows, for screen readers, and what draws it; and a note."""

    figures: Sequence[tuple[str, Callable[[], Figure]]]
    note: str = ""

    def html(self) -> str:
        shown = "".join(f"<figure>{svg(draw(), words)}</figure>" for words, draw in self.figures)
        return f'<div class="figures">{shown}</div>{_soft(self.note)}' if shown else ""

    def markdown(self) -> str:
        return ""


@dataclass(frozen=True)
class Written:
    """What is written out for each; empty for the one that does not show it."""

    as_html: str = ""
    as_markdown: str = ""

    def html(self) -> str:
        return self.as_html

    def markdown(self) -> str:
        return self.as_markdown


def html(section: Section) -> str:
    """A self-contained page: no script, no font, no picture from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(section.heading)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n{section.html()}\n</body>\n</html>\n"
    )
