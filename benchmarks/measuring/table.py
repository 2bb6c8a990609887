"""A table of texts, shown in a terminal, in Markdown or in HTML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import rich.table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod
from rich.text import Text

T = TypeVar("T")
WIDTH = 160  # of lines where there is no terminal
BESIDE = 3  # a column's padding and rule
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode categories: controls, bidirectional marks, surrogates, ...
_CODE_OR_MARKUP = re.compile(r"(?P<code>(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))|<(?=[A-Za-z/!?])|\]\(")
_PLAIN = {"<": "&lt;", "](": "]\\("}


@dataclass(frozen=True)
class Table:
    """C columns under their heads. A table without rows is shown as nothing in Markdown and in HTML.

    Attributes:
        heads: [C].
        rows: each [C].
        title: above the table in a terminal; pages have headings instead.
        note: below it in a terminal.
        left: which columns are aligned left; the others are aligned right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    left: tuple[int, ...] = (0,)

    @staticmethod
    def of(items: Iterable[T], columns: Mapping[str, Callable[[T], str]], **looks: Any) -> Table:
        """A row for each item; ``columns`` are heads and what each says of an item, ``looks`` the other attributes."""
        return Table(list(columns), [[cell(item) for cell in columns.values()] for item in items], **looks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[rich.table.Table | Text]:
        """For a terminal: whole where there is room, else its columns in parts below each other, the first before each
        of them. No cell is broken that fits into a line."""
        cells = [max([1, *(cell_len(row[n]) for row in self.rows)]) for n in range(len(self.heads))]
        least = [max([size, *map(cell_len, head.split())]) for size, head in zip(cells, self.heads, strict=True)]
        whole = [max(size, cell_len(head)) for size, head in zip(cells, self.heads, strict=True)]
        if self.title:
            yield Text(self.title, style="italic")
        for part in _parts(least, options.max_width):
            shown = rich.table.Table()
            for n, size in _widened(part, whole, options.max_width).items():
                justify: JustifyMethod = "left" if n in self.left else "right"
                shown.add_column(Text(self.heads[n]), justify=justify, overflow="fold", width=size)
            for row in self.rows:
                shown.add_row(*(Text(row[n]) for n in part))
            yield shown
        if self.note:
            yield Text(self.note, style="dim")

    def markdown(self) -> str:
        """Lines with pipes between the cells, and escaped ones within."""
        if not self.rows:
            return ""
        rule = ("---" if n in self.left else "---:" for n in range(len(self.heads)))
        cells = [
            " | ".join(markdown_text(cell).replace("|", "\\|") for cell in row) for row in (self.heads, *self.rows)
        ]
        return "\n".join([f"| {cells[0]} |", f"|{'|'.join(rule)}|", *(f"| {line} |" for line in cells[1:])])

    def html(self) -> str:
        """A ``table`` in a box that scrolls; the style sheet aligns it."""
        if not self.rows:
            return ""
        head = "".join(f"<th>{html_text(name)}</th>" for name in self.heads)
        lines = "".join(f"<tr>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>\n" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def one_line(text: str) -> str:
    """Untrusted text in a line: ends of lines and tabs are spaces, and what else is not seen by itself, or would change
    how its surroundings read, is its code point."""
    return "".join(
        " " if one in "\n\r\t" else f"U+{ord(one):04X}" if unicodedata.category(one) in UNSEEN else one for one in text
    )


def html_text(text: str) -> str:
    """``one_line`` of it, escaped."""
    return escape(one_line(text))


def markdown_text(text: str) -> str:
    """``one_line`` of it, without what begins HTML or the target of a link; code is text as it is."""
    return _CODE_OR_MARKUP.sub(lambda found: found[0] if found["code"] else _PLAIN[found[0]], one_line(text))


def _parts(sizes: Sequence[int], width: int) -> list[dict[int, int]]:
    """The columns of each part with their widths, at most ``sizes``; all in one part where they fit into ``width``."""
    if sum(size + BESIDE for size in sizes) < width:
        return [dict(enumerate(sizes))]
    first = min(sizes[0], width // 2)
    room = width - 1 - (first + BESIDE)
    parts: list[dict[int, int]] = [{}]
    left = room
    for n, size in enumerate(sizes[1:], 1):
        size = max(1, min(size, room - BESIDE))
        if parts[-1] and size + BESIDE > left:
            parts.append({})
            left = room
        parts[-1][n] = size
        left -= size + BESIDE
    return [{0: first, **part} for part in parts]


def _widened(part: Mapping[int, int], whole: Sequence[int], width: int) -> dict[int, int]:
    """A part's columns with the room that is left, so that heads need not be broken: those that lack least first."""
    sizes = dict(part)
    left = width - 1 - sum(size + BESIDE for size in sizes.values())
    for n in sorted(sizes, key=lambda n: whole[n] - sizes[n]):
        more = max(0, min(whole[n] - sizes[n], left))
        sizes[n] += more
        left -= more
    return sizes


def console() -> Console:
    """Standard output, ``WIDTH`` wide where it is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=max(WIDTH, terminal.width))
