"""A table of texts, shown in a terminal, in Markdown or in HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import rich.table
from rich.console import Console
from rich.text import Text

T = TypeVar("T")
WIDTH = 160  # of lines where there is no terminal


@dataclass(frozen=True)
class Table:
    """C columns under their heads. A table without rows is shown as nothing in Markdown and in HTML.

    Attributes:
        heads: [C].
        rows: each [C].
        title: above the table in a terminal; pages have headings instead.
        note: below it in a terminal.
        left: which columns are aligned left; the others are aligned right.
        whole: which columns' cells are never broken in a narrow terminal.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    left: tuple[int, ...] = (0,)
    whole: tuple[int, ...] = ()

    @staticmethod
    def of(items: Iterable[T], columns: Mapping[str, Callable[[T], str]], **looks: Any) -> Table:
        """A row for each item; ``columns`` are heads and what each says of an item, ``looks`` the other attributes."""
        return Table(list(columns), [[cell(item) for cell in columns.values()] for item in items], **looks)

    def rich(self) -> rich.table.Table:
        """For a terminal."""
        shown = rich.table.Table(title=self.title or None, title_justify="left", caption=self.note or None)
        shown.caption_justify = "left"
        for n, head in enumerate(self.heads):
            shown.add_column(
                Text(head), justify="left" if n in self.left else "right", overflow="fold", no_wrap=n in self.whole
            )
        for row in self.rows:
            shown.add_row(*map(Text, row))
        return shown

    def markdown(self) -> str:
        """Lines with pipes between the cells, and escaped ones within."""
        if not self.rows:
            return ""
        rule = ("---" if n in self.left else "---:" for n in range(len(self.heads)))
        cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (self.heads, *self.rows)]
        return "\n".join([f"| {cells[0]} |", f"|{'|'.join(rule)}|", *(f"| {line} |" for line in cells[1:])])

    def html(self) -> str:
        """A ``table`` in a box that scrolls; the style sheet aligns it."""
        if not self.rows:
            return ""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.heads)
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def console() -> Console:
    """Standard output, ``WIDTH`` wide where it is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=max(WIDTH, terminal.width))
